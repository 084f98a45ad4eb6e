"""A result in transformers as it is: no leangrid in this environment. On a job of benchmarks/interop.py."""

import torch
from answer import finish, job
from transformers import AutoModelForCausalLM


@torch.no_grad()
def main() -> None:
    read = job()
    model = AutoModelForCausalLM.from_pretrained(read["model"], dtype=torch.float32).eval()
    prompt = torch.tensor([read["tokens"]])
    out = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=read["new"], do_sample=False)
    logits = model(prompt, use_cache=False).logits[0]
    finish(read, out[0, prompt.shape[1] :].tolist(), logits, "transformers", "float32", "torch", "compressed-tensors")


if __name__ == "__main__":
    main()
