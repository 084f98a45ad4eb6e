"""The part of a trial of exports that leangrid does: one source in every container that quantize and export write."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import zoo_models as zoo
from safetensors.torch import save_file
from zoo_plain import windows

import leangrid
from leangrid.errors import LeangridError

AFFINE = "affine"  # what is exported to every container
# Directory -> scheme and format of a run of quantize.
RUNS = {
    AFFINE: ("RTN4_G32_SYM", "auto"),
    "asymmetric": ("RTN4_G32", "auto"),
    "to_gptq": ("RTN4_G32", "gptq"),
    "to_awq": ("RTN4_G32", "awq"),
    "to_mlx": ("RTN4_G32", "mlx"),
    "blocks": ("RTN_Q4_0", "auto"),
}
# Directory -> the result that is exported, and to what.
EXPORTS = {
    **{to: (AFFINE, to) for to in ("gptq", "gptq_v1", "awq", "mlx", "dense", "gguf", "onnx")},
    "blocks.gguf": ("blocks", "gguf"),
}
FILES = ("gguf", "onnx")  # one whole file, which leangrid.load does not open


def write(work: str, names: list[str] | None = None) -> dict[str, Any]:
    """Write every directory of ``RUNS`` and ``EXPORTS`` (or those in ``names``), and the logits of leangrid.load of
    each; directory -> what became of it (empty: it was written)."""
    zoo.stand_in_for_timm()
    place, ids = Path(work), windows(Path(work))
    jobs: dict[str, Callable[[Path], Any]] = {name: _run(place, *way, ids) for name, way in RUNS.items()}
    jobs |= {name: _export(place, *way) for name, way in EXPORTS.items()}
    found: dict[str, Any] = {}
    for name, job in jobs.items():
        if names and name not in names:
            continue
        if name in EXPORTS and found.get(EXPORTS[name][0]):
            continue  # what it would be made from was refused
        found[name] = _refusal(job, place / name)
        if not found[name] and EXPORTS.get(name, ("", ""))[1] not in FILES:
            model, _ = leangrid.load(place / name, dtype=torch.float32)
            save_file({"logits": zoo.run(model, ids).contiguous()}, place / f"{name}.logits.safetensors")
    (place / "written.json").write_text(json.dumps(found), encoding="utf-8")
    return {"written": found}


def _run(place: Path, scheme: str, container: str, ids: torch.Tensor) -> Callable[[Path], Any]:
    recipe = leangrid.Recipe(scheme=scheme, format=container, samples=len(ids), length=ids.shape[1])
    return lambda out: leangrid.quantize(place / "source", out, recipe, windows=ids, max_kl=1e9)


def _export(place: Path, of: str, to: str) -> Callable[[Path], Any]:
    return lambda out: leangrid.export(place / of, out, to=to)


def _refusal(job: Callable[[Path], Any], out: Path) -> dict[str, Any]:
    """The sentence with which ``job`` was refused, and whether it had begun to write; empty where it was done."""
    try:
        job(out)
    except LeangridError as error:
        left = sorted(path.name for path in out.parent.glob(f"{out.name}*"))
        for path in left:
            shutil.rmtree(out.parent / path, ignore_errors=True)
        return {"refused": str(error), "left": left}
    return {}
