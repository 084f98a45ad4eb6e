"""A result in mlx-lm, on mlx's CPU backend. On a job of benchmarks/interop.py.

In float32: off Apple's processors mlx's quantized products add up in the model's own dtype, which in bfloat16 hides
everything else. Scales and biases become float32 without a change, so the weight is s q + b, not rounded."""

import mlx.core as mx
import numpy as np
import torch
from answer import finish, job
from mlx_lm import load
from mlx_lm.generate import generate_step


def main() -> None:
    read = job()
    mx.set_default_device(mx.cpu)
    model, _ = load(read["model"])
    model.set_dtype(mx.float32)
    prompt = mx.array(read["tokens"])
    logits = torch.from_numpy(np.array(model(prompt[None])[0]))
    tokens = [int(token) for token, _ in generate_step(prompt, model, max_tokens=read["new"])]
    finish(read, tokens, logits, "mlx-lm", "float32", "mlx")


main()
