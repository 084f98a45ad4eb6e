"""An exported model in onnxruntime-genai, on the CPU. On a job of benchmarks/interop.py."""

import json

import onnxruntime_genai
import torch
from answer import finish, job


def main() -> None:
    read = job()
    config = onnxruntime_genai.Config(read["model"])
    config.overlay(json.dumps({"model": {"decoder": {"session_options": {"intra_op_num_threads": read["threads"]}}}}))
    model = onnxruntime_genai.Model(config)
    parameters = onnxruntime_genai.GeneratorParams(model)
    parameters.set_search_options(do_sample=False, max_length=len(read["tokens"]) + read["new"], batch_size=1)
    generator = onnxruntime_genai.Generator(model, parameters)
    generator.append_tokens(read["tokens"])
    logits = torch.from_numpy(generator.get_output("logits").copy())[0]
    while not generator.is_done():
        generator.generate_next_token()
    tokens = [int(token) for token in generator.get_sequence(0)][len(read["tokens"]) :]
    finish(read, tokens, logits, "onnxruntime-genai", "float32", "onnxruntime")


main()
