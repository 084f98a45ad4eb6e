"""A gptq or awq result in transformers' own reader, which calls GPTQModel (and optimum for gptq). On a job of
benchmarks/interop.py."""

import json
import os
from pathlib import Path

os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")  # the same products without minutes of compiling

import torch
from answer import finish, job
from transformers import AutoModelForCausalLM


@torch.no_grad()
def main() -> None:
    read = job()
    config = json.loads((Path(read["model"]) / "config.json").read_text(encoding="utf-8"))
    dtype = torch.bfloat16 if config["dtype"] == "bfloat16" else torch.float16
    model = AutoModelForCausalLM.from_pretrained(read["model"], dtype=dtype, device_map="cpu").eval()
    prompt = torch.tensor([read["tokens"]])
    out = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=read["new"], do_sample=False)
    logits = model(prompt, use_cache=False).logits[0]
    name = str(dtype).removeprefix("torch.")
    finish(read, out[0, prompt.shape[1] :].tolist(), logits, "transformers", name, "torch", "gptqmodel", "optimum")


main()
