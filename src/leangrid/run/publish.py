"""The end of a run: side texts, the config with its quantization entry, the manifest, and the final name."""

import json
from collections.abc import Iterator, Mapping
from copy import deepcopy
from importlib.metadata import version as installed
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from leangrid._version import __version__
from leangrid.data.calibration import windows_hash
from leangrid.formats import FORMATS, config_entries, config_of
from leangrid.machine import devices
from leangrid.machine.arithmetic import products
from leangrid.machine.flops import Work
from leangrid.machine.memory import peak_bytes
from leangrid.machine.stopwatch import Clock
from leangrid.models.gguf import is_gguf
from leangrid.models.skeleton import Skeleton
from leangrid.planning.sizes import sizes, stored_schemes
from leangrid.report.experts import expert_figures
from leangrid.report.facts import RECORDS, RUN
from leangrid.report.records import LayerRecord, to_lines, totals
from leangrid.report.run_log import run_log
from leangrid.report.views import TIMED, views
from leangrid.run import quality_gate
from leangrid.run.open_run import Prepared
from leangrid.run.result import QuantizeResult
from leangrid.run.unseen import unseen_windows
from leangrid.storage import writer
from leangrid.storage.config import with_older_ropes
from leangrid.storage.hub import locate_source
from leangrid.storage.safetensors import TensorInfo

_NOT_COPIED = ("auto_map", "transformers_version")


def publish(
    prepared: Prepared,
    windows: Tensor,
    clock: Clock,
    device: str,
    max_rescued: float,
    max_kl: float | None = None,
    judged_on: str = "cpu",
) -> QuantizeResult:
    """Write everything that is not a block, the manifest last, rename, and say what the run did."""
    skeleton, recipe, journal = prepared.skeleton, prepared.recipe, prepared.journal
    infos = [journal.block_info(index) for index in range(len(skeleton.blocks))]
    records = [LayerRecord.from_json(record) for info in infos for record in info["records"]]
    figures = _figures(prepared, records, windows, sorted({info["kernels"] for info in infos}))
    manifest: dict[str, Any] = {
        "recipe": recipe.model_dump(),
        "recipe_fingerprint": recipe.fingerprint(),
        "source": prepared.checkpoint.fingerprint,
        "source_name": prepared.source,
        "calibration": prepared.calibration,
        "versions": {"leangrid": __version__, "torch": torch.__version__, "transformers": installed("transformers")},
        "devices": sorted({info["device"] for info in infos}),
        "products": sorted({info["products"] for info in infos}),
        "threads": sorted({info["threads"] for info in infos}),
        "memory": [step for info in infos for step in info.get("memory", [])],
        "determinism": _determinism(infos),
        "result": figures,
    }

    def judged(staged: Path) -> dict[str, Any]:
        begin = clock.elapsed()
        with products(recipe.products):
            found = quality_gate.judge(
                skeleton, staged, windows, recipe, judged_on, unseen_windows(prepared, windows), _file_doubts(prepared)
            )
        spent = clock.elapsed() - begin
        clock.add("check", spent)
        clock.add("save", -spent)  # the stage in which this happens
        return {"quality": found}

    def told(so_far: Mapping[str, Any]) -> Mapping[str, str]:
        last = clock.lap()
        last["save"] += round(clock.elapsed() - began, 3)  # the stage in which this happens is not over
        took = run_log(infos, last, sizes(skeleton, recipe).bytes_before, device)
        return {RUN: json.dumps(took) + "\n", **views(so_far, records, took)}

    began = clock.elapsed()
    with clock.stage("save"):
        written = writer.publish(
            journal,
            prepared.out,
            _outside_blocks(skeleton),
            output_config(prepared),
            prepared.checkpoint.side_files(),
            {RECORDS: to_lines(records)},
            manifest,
            overwrite=prepared.overwrite,
            judge=judged,
            views=told,
        )
    return _result(prepared.out, written, clock.report(), clock.work.report(), device, max_rescued, max_kl)


def finished_result(
    out: Path, state_dir: Path | None, max_rescued: float, max_kl: float | None = None
) -> QuantizeResult | None:
    """The result of a run that was killed after its directory got its final name and before its journal was gone; else
    None."""
    manifest = writer.settle(out, state_dir)
    return (
        None
        if manifest is None
        else _result(out, manifest, {"total": 0.0}, Work().report(), "cpu", max_rescued, max_kl)
    )


def _file_doubts(prepared: Prepared) -> list[str]:
    """Differences between a .gguf source and the directory it was dequantized to, by a reader that the importer does
    not use."""
    if not is_gguf(Path(prepared.source)):
        return []
    from leangrid.models.gguf_check import check_against_file

    return check_against_file(locate_source(prepared.source), prepared.checkpoint.directory)


def _determinism(infos: list[dict[str, Any]]) -> dict[str, Any]:
    """What the same recipe gives again: the same bytes where every block was made alike, else the same up to rounding.

    ``scope`` is what has to be the same for that; ``except`` the files that hold seconds.
    """
    scope: dict[str, Any] = {
        name: sorted({str(info[name]) for info in infos})
        for name in ("device", "threads", "ranks", "kernels", "products")
    }
    alike = (
        all(len(values) == 1 for values in scope.values())
        and len({json.dumps(i.get("placement"), sort_keys=True) for i in infos}) == 1
    )
    scope |= {"processor": torch.backends.cpu.get_cpu_capability(), "torch": torch.__version__, "leangrid": __version__}
    return {"claim": "same bytes" if alike else "tolerance", "scope": scope, "except": sorted(TIMED)}


def _figures(prepared: Prepared, records: list[LayerRecord], windows: Tensor, paths: list[str]) -> dict[str, Any]:
    """What the manifest keeps of the run: the same for every run of the same recipe, so no times and no memory."""
    real = [(record.name, r) for record in records for r in record.rescues if not r.is_note]
    notes = [r.kind for record in records for r in record.rescues if r.is_note]
    experts = expert_figures(records)
    return {
        "scheme": prepared.recipe.scheme,
        "format": prepared.recipe.format,
        "layers": len(records),
        "bits_per_weight": round(sizes(prepared.skeleton, prepared.recipe).bits_per_weight, 4),
        **totals(records),
        "rescues": len(real),
        "rescued_layers": sum(record.rescued for record in records),
        "rescue_lines": [f"{name}: {r.kind}: {r.detail}" for name, r in real],
        "notes": {kind: notes.count(kind) for kind in sorted(set(notes))},
        **({"experts": experts} if experts else {}),
        "kernels": dict.fromkeys(("grid", "solve"), ", ".join(paths)),
        "windows_sha256": windows_hash(windows),
    }


def _result(
    out: Path,
    manifest: dict[str, Any],
    seconds: dict[str, float],
    flops: dict[str, dict[str, float]],
    device: str,
    max_rescued: float,
    max_kl: float | None,
) -> QuantizeResult:
    quality = dict(manifest.get("quality", {}))
    if max_kl is not None and "limit" in quality:
        quality["limit"] = max_kl
    return QuantizeResult(
        out=str(out),
        bytes=sum(entry["bytes"] for entry in manifest["files"].values()),
        seconds=seconds,
        flops=flops,
        peak_ram_bytes=peak_bytes(),
        peak_gpu_bytes=devices.peak_bytes(device),
        max_rescued=max_rescued,
        quality=quality | {"passed": quality_gate.passed(quality)},
        **manifest["result"],
    )


def output_config(prepared: Prepared) -> dict[str, Any]:
    """The source's config.json with ``quantization_config``; code of the checkpoint's own is not handed on."""
    skeleton, recipe = prepared.skeleton, prepared.recipe
    quantized = stored_schemes(skeleton, recipe)
    # A router is a linear to engines, whatever class it has here; what is not named as ignored they take to be
    # quantized.
    matrices = (
        n
        for n, m in skeleton.model.named_modules()
        if not isinstance(m, nn.Embedding) and _is_matrix(m._parameters.get("weight"))
    )
    beyond = {name.rpartition(".")[0] for name in skeleton.naming.beyond}
    ignore = sorted({*matrices, *beyond} - set(quantized))
    config = deepcopy({key: value for key, value in prepared.checkpoint.config.items() if key not in _NOT_COPIED})
    config["architectures"] = [type(skeleton.model).__name__]
    config["dtype"] = str(skeleton.dtype).removeprefix("torch.")
    config.setdefault(
        "tie_word_embeddings", bool(getattr(skeleton.config, "tie_word_embeddings", False))
    )  # mlx-lm's default is tied
    if skeleton.naming.untied:
        for section in (
            config,
            *(value for value in config.values() if isinstance(value, dict) and "tie_word_embeddings" in value),
        ):
            section["tie_word_embeddings"] = False
    stored = config_of(FORMATS[recipe.format], quantized, ignore, skeleton.dtype)
    config = with_older_ropes(config) | config_entries(recipe.format, stored)
    return json.loads(json.dumps(config, default=str))


def _is_matrix(weight: Tensor | None) -> bool:
    return weight is not None and weight.ndim == 2


def _outside_blocks(skeleton: Skeleton) -> Iterator[tuple[str, TensorInfo | Tensor]]:
    """Embeddings, final norm, head: copied from where the checkpoint stores them, after a look for NaN; what is not on
    disk as it is. Then what is no part of the model."""
    for name in skeleton.parameter_names():
        if not name.startswith(skeleton.blocks_prefix):
            tensor, info = skeleton.stored(name), skeleton.stored_info(name)
            yield name, info if info.file.is_file() else tensor
    for name in skeleton.naming.beyond:
        info = skeleton.checkpoint.tensors[name]
        yield name, info if info.file.is_file() else skeleton.checkpoint.read(name)
