"""What every runner does besides asking its engine: reading the job, keeping the logits and the tokens. Needs torch and
safetensors."""

import json
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch


def job() -> dict[str, Any]:
    """{"model", "tokens", "new", "logits", "result", "threads"} from stdin; torch is held to the threads."""
    read = json.load(sys.stdin)
    torch.set_num_threads(read["threads"])
    return read


def finish(
    read: dict[str, Any],
    tokens: list[int],
    logits: torch.Tensor | None,
    engine: str,
    dtype: str,
    *packages: str,
    rounds: bool | None = None,
    note: str | None = None,
) -> None:
    """Write the answer; ``engine`` is the package whose version is the engine's, ``dtype`` what it computes in,
    ``rounds`` whether its weights are rounded to the model's dtype (where that differs from run to run), ``note`` what
    a reader of the figures must know."""
    if logits is not None:
        from safetensors.torch import save_file

        save_file({"logits": logits.float().contiguous()}, read["logits"])
    versions = {"engine": version(engine), **{name: version(name) for name in (engine, *packages)}}
    answer = {"tokens": tokens, "dtype": dtype, "versions": versions, "rounds": rounds, "note": note}
    Path(read["result"]).write_text(
        json.dumps({key: value for key, value in answer.items() if value is not None}), encoding="utf-8"
    )
