"""The end of a run: side texts, the config with its quantization entry, the manifest, and the final name."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from importlib.metadata import version as installed
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from leangrid._version import __version__
from leangrid.data.calibration import hash_windows
from leangrid.data.windows import PictureRows, Windows
from leangrid.gate.judge import judge_result
from leangrid.gate.quality import Quality
from leangrid.gate.unseen import unseen_windows
from leangrid.machine import devices
from leangrid.machine.arithmetic import use_products
from leangrid.machine.flops import FlopCounts
from leangrid.machine.memory import peak_bytes
from leangrid.machine.stopwatch import Clock
from leangrid.mixture import first_read
from leangrid.models.gguf import is_gguf
from leangrid.planning.readers import merges_experts, opened_in
from leangrid.planning.sizes import compute_sizes
from leangrid.planning.structure import describe_kept, describe_source, describe_structure
from leangrid.report.budget import budget_figures
from leangrid.report.experts import expert_figures
from leangrid.report.facts import RECORDS, RUN
from leangrid.report.records import LayerRecord, to_lines, totals
from leangrid.report.run_log import run_log
from leangrid.report.shares import share_figures
from leangrid.report.tuning import finish_figures, tuning_figures
from leangrid.report.views import TIMED, render_views
from leangrid.run.inputs import RunInputs
from leangrid.run.request import Request
from leangrid.run.result import QuantizeResult
from leangrid.run.result_config import make_config
from leangrid.run.windows import unseen_rows
from leangrid.storage import writer
from leangrid.storage.hub import locate_source
from leangrid.storage.safetensors import TensorInfo


def publish(inputs: RunInputs, windows: Windows, clock: Clock, judged_on: str) -> QuantizeResult:
    """Write everything that is not a block, the manifest last, give the directory its name, and say what the run did.

    Args:
        windows: the calibration tokens, int64 [samples, length], or rows with pictures; the quality gate judges on the
            first of them.
        judged_on: the device of the quality gate.
    """
    skeleton, recipe, journal, request = inputs.skeleton, inputs.recipe, inputs.journal, inputs.request
    infos = [journal.read_block_info(index) for index in range(len(skeleton.blocks))]
    records = [LayerRecord.from_json(record) for info in infos for record in info["records"]]
    finished = journal.read_finished_info() or {}
    for name, sample in finished.get("samples", {}).items():
        infos[int(name)]["sample"] = sample

    def judge(staged: Path) -> dict[str, Any]:
        began = clock.elapsed()
        with use_products(recipe.products):
            more = unseen_rows(inputs)
            text, pictures = (None, more) if isinstance(more, PictureRows) else (more, None)
            unseen = unseen_windows(skeleton, first_read(recipe.calibration), windows.shape[1], text)
            differences = _gguf_differences(inputs)
            quality = judge_result(skeleton, staged, windows, recipe, judged_on, unseen, differences, pictures)
        spent = clock.elapsed() - began
        clock.add("check", spent)
        clock.add("save", -spent)  # the stage in which this happens
        return {"quality": quality.to_dict()}

    def pages(manifest_so_far: Mapping[str, Any]) -> Mapping[str, str]:
        last = clock.lap()
        last["save"] += round(clock.elapsed() - begin, 3)  # the stage in which this happens is not over
        log = run_log(infos, last, compute_sizes(skeleton, recipe).bytes_before, request.device)
        return {RUN: json.dumps(log) + "\n", **render_views(manifest_so_far, records, log)}

    begin = clock.elapsed()
    with clock.stage("save"):
        manifest = writer.write_result(
            journal,
            request.out,
            _outside_blocks(inputs),
            make_config(inputs.skeleton, inputs.recipe),
            inputs.checkpoint.side_files(),
            {RECORDS: to_lines(records)},
            _manifest(inputs, records, windows, infos, finished),
            overwrite=request.overwrite,
            judge=judge,
            views=pages,
        )
    return _result(request, manifest, clock.report(), clock.flops.report(), request.device)


def result_of_finished_run(request: Request) -> QuantizeResult | None:
    """The result of a run that was killed after its directory got its name and before its journal was gone; else
    None."""
    manifest = writer.finish_interrupted_rename(request.out, request.state_dir)
    if manifest is None:
        return None
    return _result(request, manifest, {"total": 0.0}, FlopCounts().report(), "cpu")


def _manifest(
    inputs: RunInputs,
    records: list[LayerRecord],
    windows: Windows,
    infos: list[dict[str, Any]],
    finished: dict[str, Any],
) -> dict[str, Any]:
    """What manifest.json says before files and quality are added; ``infos`` is the journal's word on each block,
    ``finished`` on what followed all blocks."""
    recipe = inputs.recipe
    return {
        "recipe": recipe.model_dump(),
        "recipe_fingerprint": recipe.fingerprint(),
        "source": inputs.checkpoint.fingerprint,
        "source_name": str(inputs.request.source),
        "calibration": inputs.calibration,
        "versions": {"leangrid": __version__, "torch": torch.__version__, "transformers": installed("transformers")},
        "devices": sorted({info["device"] for info in infos}),
        "products": sorted({info["products"] for info in infos}),
        "threads": sorted({info["threads"] for info in infos}),
        "memory": [reduction for info in infos for reduction in info.get("memory", [])],
        "determinism": describe_determinism(infos),
        "opened_in": opened_in(inputs.skeleton, recipe),
        "structure": describe_structure(inputs.skeleton),
        "kept": describe_kept(inputs.skeleton),
        **({"budget": inputs.budget} if inputs.budget else {}),
        **({"stored_as": stored_as} if (stored_as := describe_source(inputs.skeleton)) else {}),
        "result": _figures(inputs, records, windows, infos) | finish_figures(finished),
    }


def _gguf_differences(inputs: RunInputs) -> list[str]:
    """Differences between a .gguf source and the directory it was dequantized to, by a reader that the importer does
    not use."""
    if not is_gguf(Path(inputs.request.source)):
        return []
    from leangrid.models.gguf_check import check_against_file

    return check_against_file(locate_source(str(inputs.request.source)), inputs.checkpoint.directory)


def describe_determinism(infos: list[dict[str, Any]]) -> dict[str, Any]:
    """What the same recipe gives again: the same bytes where every block was made alike, else the same up to rounding.

    ``scope`` is what has to be the same for that; ``except`` the files that hold seconds.
    """
    scope: dict[str, Any] = {
        name: sorted({str(info[name]) for info in infos})
        for name in ("device", "threads", "ranks", "kernels", "products")
    }
    gpus = sorted({info["gpu"] for info in infos if info.get("gpu")})
    scope |= {"gpu": gpus} if gpus else {}
    alike = (
        all(len(values) == 1 for values in scope.values())
        and len({json.dumps(i.get("placement"), sort_keys=True) for i in infos}) == 1
    )
    scope |= {"processor": torch.backends.cpu.get_cpu_capability(), "torch": torch.__version__, "leangrid": __version__}
    return {"claim": "same bytes" if alike else "tolerance", "scope": scope, "except": sorted(TIMED)}


def _figures(
    inputs: RunInputs, records: list[LayerRecord], windows: Windows, infos: list[dict[str, Any]]
) -> dict[str, Any]:
    """What the manifest keeps of the run: the same for every run of the same recipe, so no times and no memory."""
    real = [(record.name, r) for record in records for r in record.rescues if not r.is_note]
    notes = [r.kind for record in records for r in record.rescues if r.is_note]
    experts = expert_figures(records)
    tuning = tuning_figures([(str(info["block"]), info["tuning"]) for info in infos if "tuning" in info])
    return {
        "scheme": inputs.recipe.scheme,
        "format": inputs.recipe.format,
        "layers": len(records),
        "bits_per_weight": round(compute_sizes(inputs.skeleton, inputs.recipe).bits_per_weight, 4),
        **totals(records),
        "rescues": len(real),
        "rescued_layers": sum(record.rescued for record in records),
        "rescue_lines": [f"{name}: {r.kind}: {r.detail}" for name, r in real],
        "notes": {kind: notes.count(kind) for kind in sorted(set(notes))},
        **({"experts": experts} if experts else {}),
        **({"correction": shares} if (shares := share_figures(inputs.recipe, records)) else {}),
        **({"tuning": tuning} if tuning else {}),
        **({"budget": budget_figures(inputs.budget)} if inputs.budget else {}),
        "kernels": dict.fromkeys(("grid", "solve"), ", ".join(sorted({info["kernels"] for info in infos}))),
        "windows_sha256": hash_windows(windows),
    }


def _result(
    request: Request,
    manifest: dict[str, Any],
    seconds: dict[str, float],
    flops: dict[str, dict[str, float]],
    device: str,
) -> QuantizeResult:
    quality = Quality.from_dict(manifest.get("quality", {}))
    if request.max_kl is not None and quality.limit is not None:
        quality = replace(quality, limit=request.max_kl)
    return QuantizeResult(
        out=str(request.out),
        bytes=sum(entry["bytes"] for entry in manifest["files"].values()),
        seconds=seconds,
        flops=flops,
        peak_ram_bytes=peak_bytes(),
        peak_gpu_bytes=devices.peak_device_bytes(device),
        max_rescued=request.max_rescued,
        quality=quality.to_dict() | {"passed": quality.passed},
        **manifest["result"],
    )


def _outside_blocks(inputs: RunInputs) -> Iterator[tuple[str, TensorInfo | Tensor]]:
    """Embeddings, final norm, head: copied from where the checkpoint stores them, after a look for NaN; what is not on
    disk as it is. Then what is no part of the model, dequantized too: the result's config does not say how the source
    stores it."""
    skeleton = inputs.skeleton
    for name, info, read in skeleton.plain_tensors(None, merges_experts(inputs.recipe)):
        tensor = read()
        yield name, info if _can_be_copied(info, tensor) else tensor
    for name in skeleton.naming.extra:
        info = inputs.checkpoint.tensors[name]
        yield name, info if info.file.is_file() and info.is_plain else inputs.checkpoint.read(name, check=False)


def _can_be_copied(info: TensorInfo, tensor: Tensor) -> bool:
    """Whether the bytes that ``info`` says are those of ``tensor``, on this machine."""
    return info.file.is_file() and info.is_plain and tuple(info.shape) == tuple(tensor.shape)
