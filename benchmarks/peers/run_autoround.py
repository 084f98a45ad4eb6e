"""AutoRound, sign descent on the blocks' outputs, on a job of race.py; runs in AutoRound's own environment."""

from pathlib import Path

import torch
from auto_round import AutoRound
from seen import Stopwatch, Tokens, finish, job
from transformers import AutoModelForCausalLM, AutoTokenizer


def main() -> None:
    read, windows = job()
    settings, watch, tokens = read["settings"], Stopwatch(), Tokens()
    with watch("load"):
        model = AutoModelForCausalLM.from_pretrained(read["source"], dtype="auto")
        tokenizer = AutoTokenizer.from_pretrained(read["source"])
    with watch("quantize"):
        quantizer = AutoRound(
            model,
            tokenizer=tokenizer,
            bits=settings["bits"],
            group_size=settings["group_size"] or -1,
            sym=settings["symmetric"],
            iters=settings["iterations"],
            batch_size=settings["batch_size"],
            dataset=list(windows.split(1)),
            nsamples=len(windows),
            seqlen=windows.shape[1],
            device_map="cpu",
        )
        quantizer.quantize()
    seen = tokens.check(windows)
    with watch("save"):
        quantizer.save_quantized(read["out"], format="llm_compressor")
        tokenizer.save_pretrained(read["out"])

    @torch.no_grad()
    def logits() -> torch.Tensor:
        # as read back by the library whose format it writes
        where = next(path.parent for path in Path(read["out"]).rglob("config.json"))
        again = AutoModelForCausalLM.from_pretrained(where, dtype=torch.float32)
        return again(input_ids=windows[:1]).logits[0]

    finish(read, watch, seen, "auto-round", logits)


if __name__ == "__main__":
    main()
