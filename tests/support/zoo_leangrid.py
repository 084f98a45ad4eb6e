"""The part of a type's trial that leangrid does: quantize, open again, export; what came out goes to files."""

import json
import shutil
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
import zoo_models as zoo
from safetensors.torch import save_file
from zoo_adapter import Walked, ends_watched, hessians_watched
from zoo_plain import windows

import leangrid


def quantize(work: str, scheme: str, command: bool = False) -> dict[str, Any]:
    """Quantize the source into ``<work>/<scheme>``, by the command line with ``command``, and open it with
    leangrid.load. Where the streams of the run ended is noted beside it, but not of a command."""
    zoo.stand_in_for_timm()
    place, ids = Path(work), windows(Path(work))
    facts: dict[str, Any] = {}
    if command:
        _by_command(place, scheme)
    else:
        with ends_watched() as seen:
            done = leangrid.quantize(place / "source", place / scheme, _recipe(scheme, ids), windows=ids)
        facts = {"layers": done.layers}
        save_file({n: x.clone() for n, x in seen.ends.items()}, place / f"{scheme}.ends.safetensors")
        (place / f"{scheme}.ends.json").write_text(json.dumps({"block": seen.block}), encoding="utf-8")
    model, _ = leangrid.load(place / scheme, dtype=torch.float32)
    save_file({"reopened": zoo.run(model, ids).contiguous()}, place / f"{scheme}.logits.safetensors")
    if scheme == "NU4":
        leangrid.export(place / scheme, place / f"{scheme}.dense", to="dense")
    return facts


def sum_inputs(work: str, scheme: str) -> dict[str, Any]:
    """Run as for ``scheme`` with the weights left alone, and note what each linear read."""
    zoo.stand_in_for_timm()
    place, ids = Path(work), windows(Path(work))
    with hessians_watched() as seen, suppress(Walked):
        leangrid.quantize(place / "source", place / "alone", _recipe(scheme, ids), windows=ids)
    shutil.rmtree(place / "alone.partial")
    save_file({name: h.clone() for name, h in seen.hessians.items()}, place / "alone.safetensors")
    return {}


def _recipe(scheme: str, ids: torch.Tensor) -> leangrid.Recipe:
    return leangrid.Recipe(scheme=scheme, samples=len(ids), length=ids.shape[1])


def _by_command(place: Path, scheme: str) -> None:
    """``leangrid quantize`` with a text, as a user gives it."""
    text = place / "text.txt"
    text.write_text("\n".join(f"The {n}th line says what the {n - 1}th did not say of it." for n in range(400)))
    call = [sys.executable, "-m", "leangrid", "quantize", place / "source", place / scheme, "--scheme", scheme,
            "--calibration", text, "--samples", "4", "--length", "32"]  # fmt: skip
    done = subprocess.run([str(part) for part in call], capture_output=True, text=True, timeout=200, check=False)
    print(done.stdout[-2000:], done.stderr[-2000:])
    if done.returncode:
        raise RuntimeError(f"exit code {done.returncode}: {done.stderr.strip()[-400:]}")
