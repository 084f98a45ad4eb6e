"""GPTQModel, with or without its GPTAQ option, on a job of race.py; runs in GPTQModel's own environment."""

import torch
from gptqmodel import BACKEND, GPTQModel, QuantizeConfig
from gptqmodel.quantization.config import GPTAQConfig
from seen import Stopwatch, Tokens, finish, job


def main() -> None:
    read, windows = job()
    settings, watch, tokens = read["settings"], Stopwatch(), Tokens()
    config = QuantizeConfig(
        bits=settings["bits"],
        group_size=settings["group_size"] or -1,
        sym=settings["symmetric"],
        damp_percent=settings["damping"],
        desc_act=settings["desc_act"],
        act_group_aware=settings["act_group_aware"],
        static_groups=settings["static_groups"],
        gptaq=GPTAQConfig(alpha=settings["gptaq_alpha"]) if settings["gptaq_alpha"] is not None else None,
        offload_to_disk=False,
        device="cpu",
    )
    with watch("load"):
        model = GPTQModel.load(read["source"], config)
    data = [{"input_ids": window.tolist(), "attention_mask": [1] * len(window)} for window in windows]
    with watch("quantize"):
        model.quantize(data, batch_size=1, calibration_sort=None)
    seen = tokens.check(windows)
    with watch("save"):
        model.save(read["out"])

    @torch.no_grad()
    def logits() -> torch.Tensor:
        again = GPTQModel.load(
            read["out"], backend=BACKEND.GPTQ_TORCH, device="cpu", dtype=torch.bfloat16
        )  # its kernel has no float32
        return again.model(input_ids=windows[:1], use_cache=False).logits[0]

    finish(read, watch, seen, "gptqmodel", logits)


if __name__ == "__main__":
    main()
