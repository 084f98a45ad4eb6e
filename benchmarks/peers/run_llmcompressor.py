"""llm-compressor's GPTQModifier on a job of race.py; runs in llm-compressor's own environment."""

import torch
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier
from seen import Stopwatch, Tokens, finish, job
from transformers import AutoModelForCausalLM, AutoTokenizer


def main() -> None:
    read, windows = job()
    settings, watch, tokens = read["settings"], Stopwatch(), Tokens()
    weights = {"num_bits": settings["bits"], "type": "int", "symmetric": settings["symmetric"]}
    if settings["group_size"]:
        weights |= {"strategy": "group", "group_size": settings["group_size"]}
    else:
        weights |= {"strategy": "channel"}  # which knows no order of activations
    recipe = GPTQModifier(
        config_groups={"group_0": {"targets": ["Linear"], "weights": weights}},
        ignore=["lm_head"],
        dampening_frac=settings["damping"],
        actorder=settings["act_order"] if settings["group_size"] else None,
    )
    with watch("load"):
        model = AutoModelForCausalLM.from_pretrained(read["source"], dtype="auto")
        tokenizer = AutoTokenizer.from_pretrained(read["source"])
    data = Dataset.from_dict({"input_ids": windows.tolist(), "attention_mask": torch.ones_like(windows).tolist()})
    with watch("quantize"):
        oneshot(model=model, tokenizer=tokenizer, dataset=data, recipe=recipe, num_calibration_samples=len(windows),
                max_seq_length=windows.shape[1], shuffle_calibration_samples=False)  # fmt: skip
    seen = tokens.check(windows)
    with watch("save"):
        model.save_pretrained(read["out"], save_compressed=True)
        tokenizer.save_pretrained(read["out"])

    @torch.no_grad()
    def logits() -> torch.Tensor:
        # as read back by its own loader
        again = AutoModelForCausalLM.from_pretrained(read["out"], dtype=torch.float32)
        return again(input_ids=windows[:1]).logits[0]

    finish(read, watch, seen, "llmcompressor", logits)


if __name__ == "__main__":
    main()
