"""The part of a type's trial that never imports leangrid: the source and its facts before, the judgement after.

What is judged, each against what transformers itself says of the source:

* stored: the weights that changed are exactly those that should (zoo_uses.wanted), all other bytes are the source's;
* error: the logits are no further from the source's than those of plain rounding of the same weights, times 1.5;
* reopened: leangrid.load gives the logits of the source with the stored weights put in;
* plain: so does transformers without leangrid, for the affine result and the dense export;
* walked, original: the streams of the run leave the last block with the states of the model with the stored weights put
  in, and of the source;
* inputs: what each linear reads with the weights left alone sums to what hooks on transformers' model see.
"""

import copy
import json
import re
import shutil
import sys
import traceback
from pathlib import Path
from typing import Any

import torch
import transformers
import zoo_files
import zoo_models as zoo
import zoo_uses
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D
from zoo_configs import NOT_PLAIN, PARTLY
from zoo_storage import Storage, round_stored, store_as

CLOSE = 1e-4  # relative distance of logits that should be the same
ROUNDING = 1.5  # how much further than plain rounding a result may be


def windows(place: Path) -> Tensor:
    """The calibration windows of a trial, int64 [4, 32], which are judged on as well."""
    return load_file(place / "windows.safetensors")["ids"]


def distance(a: Tensor, b: Tensor) -> float:
    """The norm of the difference by that of ``b``, over what is finite in ``b``."""
    if a.shape != b.shape:
        return float("inf")
    a, b = a.double(), b.double()
    whole = b.isfinite()
    return float((a - b)[whole].norm() / b[whole].norm().clamp_min(1e-30))


# ---------------------------------------------------------------- before

_SAME = 1e-3  # of two logits of one model the relative distance, at most


def make(
    model_type: str, family: str, work: str, seed: int = 0, vary: int | None = None, schemes: list[str] | None = None
) -> dict[str, Any]:
    """Write the source and what is to be known of it before leangrid sees it; a few facts for the record.

    Which ``schemes`` are tried follows from the model where None. ``runs`` is False for a model that text alone cannot
    run: leangrid has to refuse it.
    """
    place = Path(work)
    model: Any = zoo.build(model_type, family, seed, vary)
    ids = zoo.tokens(4, 32, 1, model.config)
    save_file({"ids": ids}, place / "windows.safetensors")
    way = Storage() if vary is None else Storage.drawn(model_type, vary)
    varied = [*model.varied, *way.words()]
    record = {"transformers": transformers.__version__, "class": type(model).__name__, "varied": varied}
    if way.halved:
        round_stored(model)
    _save(model, place / "source", seed, way)
    try:
        logits = zoo.run(model, ids)
    except (TypeError, ValueError, AttributeError) as error:
        return record | {"runs": False, "needs": str(error)[:200], "schemes": schemes or ["RTN8"], "cover": 0.0}
    if not logits.isfinite().any():
        raise ValueError("the tiny model gives no finite number")
    again = _reopened(model, place / "source", seed, way, ids, logits)
    if again > _SAME and way.older:  # a type that never had the older names: with them it is another model
        way = way._replace(older=False)
        shutil.rmtree(place / "source")
        _save(model, place / "source", seed, way)
        again = _reopened(model, place / "source", seed, way, ids, logits)
        record["varied"] = [*model.varied, *way.words()]
    save_file({"logits": logits.contiguous()}, place / "logits.safetensors")
    real = zoo.real_shapes(model_type, family)
    kind = torch.bfloat16 if way.halved else torch.float32
    return record | {"runs": True, "reopens": again} | _facts(model, place, ids, logits, real, schemes, kind)


def _facts(
    model: Any,
    place: Path,
    ids: Tensor,
    logits: Tensor,
    real: dict[str, tuple[int, ...]] | None,
    schemes: list[str] | None,
    kind: torch.dtype,
) -> dict[str, Any]:
    """What should be quantized, how far plain rounding is, and each weight's sum of x x^T: to files, and in short."""

    def run() -> Any:
        return zoo.run_out(model, ids)

    uses, lists = zoo_uses.products(model, run), zoo_uses.block_lists(model, run)
    wanted = zoo_uses.wanted(model, lists, uses, real)
    transposed = any(isinstance(m, Conv1D) for m in model.modules())
    schemes = schemes or _schemes(transposed, any(expert >= 0 for _, expert in wanted.weights))
    noise = {scheme: _rounded_error(model, wanted.weights, scheme, kind, ids, logits) for scheme in schemes}
    hessians = {f"{n} {e}": use.hessian for (n, e), use in uses.items() if use.hessian is not None}
    save_file({name: hessian.contiguous() for name, hessian in hessians.items()}, place / "hessians.safetensors")
    facts = {"wanted": sorted(wanted.weights), "transposed": transposed, "noise": noise, "lists": lists}
    (place / "facts.json").write_text(json.dumps(facts))
    return {
        "schemes": schemes,
        "blocks": lists,
        "cover": wanted.numbers / max(1, wanted.matrices),
        "quantized": _patterns(name for name, _ in wanted.weights),
        "kept": _reasons(wanted.kept),
        "twice": _patterns(wanted.twice),
    }


def _save(model: Any, source: Path, seed: int, way: Storage, published: bool = True) -> None:
    """Write the source as transformers does, then as ``way`` says."""
    zoo.save(model, source, seed, published)
    if way != Storage():
        store_as(source, way)


def _reopened(model: Any, source: Path, seed: int, way: Storage, ids: Tensor, logits: Tensor) -> float:
    """How far the source that transformers wrote is from its model when transformers opens it; one that it cannot open
    is written under the modules' names."""
    try:
        return distance(zoo.run(zoo.open_plain(source), ids), logits)
    except ValueError:
        shutil.rmtree(source)
        _save(model, source, seed, way, published=False)
        return distance(zoo.run(zoo.open_plain(source), ids), logits)


def _schemes(transposed: bool, experts: bool) -> list[str]:
    """Non-uniform 4 bits, and affine 8 bits as plain transformers reads them: experts symmetric, a Conv1D not at
    all."""
    return ["NU4"] if transposed else ["RTN8_SYM" if experts else "RTN8", "NU4"]


def _rounded_error(
    model: nn.Module, weights: set[zoo_uses.Weight], scheme: str, kind: torch.dtype, ids: Tensor, logits: Tensor
) -> float:
    """How far plain rounding to nearest of the same weights takes the logits, steps and results stored in ``kind``."""
    twin = copy.deepcopy(model)
    owners = {f"{path}.{leaf}": module for path, module in twin.named_modules()
              for leaf, _ in module.named_parameters(recurse=False)}  # fmt: skip
    for name in {name for name, _ in weights}:
        weight = twin.get_parameter(name).data
        turned = isinstance(owners[name], Conv1D) or getattr(owners[name], "is_transposed", False)
        weight.copy_(_nearest(weight.mT, scheme, kind).mT if turned else _nearest(weight, scheme, kind))
    return distance(zoo.run(twin, ids), logits)


def _nearest(weight: Tensor, scheme: str, kind: torch.dtype) -> Tensor:
    """Each row, or group of its columns, on 2^bits steps: from its least to its largest number, 0 among them, or as far
    on both sides of 0. Steps and results are those that ``kind`` has."""
    found = re.match(r"\D+(\d)(?:A16)?(?:_G(\d+))?", scheme)
    if found is None:
        raise ValueError(f"not a scheme of the zoo: {scheme}")
    codes, size = 2 ** int(found[1]), int(found[2] or weight.shape[-1])
    shape, weight = weight.shape, weight.unflatten(-1, (-1, size))
    low, high = weight.amin(-1, keepdim=True).clamp_max(0), weight.amax(-1, keepdim=True).clamp_min(0)
    if scheme.endswith("_SYM"):
        high = torch.maximum(high, -low)
        low = -high
    step = ((high - low) / (codes - 1)).clamp_min(1e-12).to(kind).to(weight.dtype)
    zero = torch.full_like(step, codes // 2) if scheme.endswith("_SYM") else (-low / step).round()
    return ((((weight / step) + zero).round().clamp(0, codes - 1) - zero) * step).to(kind).reshape(shape)


def _patterns(names: Any) -> list[str]:
    """Names with every number in them as ``*``, each once, without the ``.weight``."""
    return sorted({re.sub(r"(?<=\.)\d+(?=\.)", "*", name).removesuffix(".weight") for name in names})


def _reasons(kept: dict[str, str]) -> dict[str, list[str]]:
    return {why: _patterns(name for name, other in kept.items() if other == why) for why in sorted(set(kept.values()))}


# ---------------------------------------------------------------- after


def judge(model_type: str, family: str, work: str, scheme: str) -> dict[str, Any]:
    """How the result of ``scheme`` compares: the record's ``figures`` and ``faults``, the latter as sentences."""
    if "leangrid" in sys.modules:
        raise RuntimeError("leangrid is imported where plain transformers judges")
    place, ids = Path(work), windows(Path(work))
    facts = json.loads((place / "facts.json").read_text())
    refilled = zoo_files.refill(place / "source", place / scheme, facts["transposed"])
    zoo_files.write(refilled, place / "source", place / f"{scheme}.refilled")
    source, filled = zoo.open_plain(place / "source"), zoo.open_plain(place / f"{scheme}.refilled")
    want = {(name, expert) for name, expert in facts["wanted"]}
    faults = _name_faults(refilled, source) + _config_faults(place, scheme) + _stored_faults(source, filled, want)
    logits, stored = load_file(place / "logits.safetensors")["logits"], zoo.run(filled, ids)
    figures = {"weights": _worst(source, filled, want), "error": distance(stored, logits),
               "rounding": facts["noise"][scheme], "renamed": float(len(refilled.lost))}  # fmt: skip
    faults += _far("error", figures["error"], ROUNDING * figures["rounding"] + 1e-6)
    figures["reopened"] = distance(load_file(place / f"{scheme}.logits.safetensors")["reopened"], stored)
    figures |= _ends(place, scheme, source, filled, ids)
    faults += [
        fault for name in ("reopened", "walked", "original") for fault in _far(name, figures.get(name, 0), CLOSE)
    ]
    opened = place / scheme if scheme != "NU4" else place / f"{scheme}.dense"
    if opened.is_dir():
        try:
            figures["plain"] = distance(zoo.run(zoo.open_plain(opened), ids), stored)
            faults += _far("plain", figures["plain"], CLOSE)
        except Exception as error:  # whatever transformers raises
            traceback.print_exc()
            known = (family, model_type) in NOT_PLAIN or _has_fused_experts(place / "source")
            if scheme != "NU4" and known:  # the dense export has to open
                return {"figures": figures, "faults": faults}
            faults.append(f"plain transformers does not open it: {type(error).__name__}: {str(error)[:200]}")
    return {"figures": figures, "faults": faults}


def _has_fused_experts(source: Path) -> bool:
    """Whether a checkpoint holds all experts of a block in one tensor, so that transformers knows no name for one."""
    stored = zoo_files.read_tensors(source)
    return any(x.ndim == 3 and min(x.shape) > 1 and re.search("expert|moe", name) for name, x in stored.items())


def _ends(place: Path, scheme: str, source: nn.Module, filled: nn.Module, ids: Tensor) -> dict[str, float]:
    """How far the states in which the run's streams left the last block are from those of the models; empty where no
    run was watched."""
    path = place / f"{scheme}.ends.json"
    if not path.is_file():
        return {}
    block, ends = json.loads(path.read_text())["block"], load_file(place / f"{scheme}.ends.safetensors")
    models = {"walked": filled, "original": source}
    return {name: distance(states, _leaves(models[name], block, ids)) for name, states in ends.items()}


def _leaves(model: nn.Module, block: str, ids: Tensor) -> Tensor:
    """The hidden states that leave ``block`` in its last call."""
    found: list[Tensor | None] = []
    hook = model.get_submodule(block).register_forward_hook(lambda _, __, out: found.append(zoo_uses.first_tensor(out)))
    zoo.run(model, ids)
    hook.remove()
    return torch.empty(0) if not found or found[-1] is None else found[-1]


def judge_inputs(work: str) -> dict[str, Any]:
    """How the sums of x x^T of a run with the weights left alone compare with those of hooks on the source."""
    place = Path(work)
    ours, theirs = load_file(place / "alone.safetensors"), load_file(place / "hessians.safetensors")
    wanted = {f"{name} {expert}" for name, expert in json.loads((place / "facts.json").read_text())["wanted"]}
    far: dict[str, float] = {}
    for path, hessian in ours.items():
        names = [f"{path}.weight -1", *_expert_keys(path, theirs)]
        fitting = [name for name in names if name in theirs and theirs[name].shape == hessian.shape]
        wanted -= set(fitting)
        unseen = 0.0 if not hessian.any() else float("inf")  # an expert to which no token was routed
        far[path] = min((distance(hessian, theirs[name]) for name in fitting), default=unseen)
    worst = max(far, key=lambda path: far[path], default="")
    faults = [f"{len(wanted)} weights were not walked to: {sorted(wanted)[:3]}"] if wanted & theirs.keys() else []
    faults += [f"the inputs of {worst}: {fault}" for fault in _far("distance", far.get(worst, 1.0), CLOSE)]
    return {"figures": {"inputs": far.get(worst, 1.0)}, "faults": faults}


def _expert_keys(path: str, theirs: dict[str, Tensor]) -> list[str]:
    """The fused weights that may hold the linear ``<module>.<expert>.<leaf>``."""
    found = re.fullmatch(r"(.*)\.(\d+)\.[^.]+", path)
    if found is None:
        return []
    return [key for key in theirs if key.rpartition(".")[0] == found[1] and key.endswith(f" {found[2]}")]


def _name_faults(refilled: zoo_files.Refilled, source: nn.Module) -> list[str]:
    """Tensors beside the quantized that differ in bytes or in name; a name may be the module's own, where transformers
    would not find the source's beside packed weights."""
    own = source.state_dict().keys()
    strange = [name for name in refilled.new if name not in own]
    lost = refilled.lost if not refilled.new or strange else []
    shown = {"bytes changed in": refilled.changed, "lost": lost, "neither of the source nor of the model": strange}
    return [f"{len(names)} tensors {what}: {names[:2]}" for what, names in shown.items() if names]


def _config_faults(place: Path, scheme: str) -> list[str]:
    """Fields of the source's config that the result's lacks or has otherwise; it may have more, and the rotary tables
    also under the older name that the source leaves empty."""
    theirs, ours = (json.loads((place / name / "config.json").read_text()) for name in ("source", scheme))
    theirs.pop("transformers_version", None)
    if theirs.get("rope_scaling", ...) is None:
        del theirs["rope_scaling"]
    wrong = sorted(key for key, value in theirs.items() if key not in ours or ours[key] != value)
    return [f"config.json differs in {wrong[:3]}"] if wrong else []


def _stored_faults(source: nn.Module, filled: nn.Module, want: set[zoo_uses.Weight]) -> list[str]:
    """Which weights changed that should not, and the other way round."""
    changed: set[zoo_uses.Weight] = set()
    ours = dict(filled.named_parameters(remove_duplicate=False))
    for name, parameter in source.named_parameters():
        other = ours[name]
        if parameter.ndim == 3 and any(n == name for n, _ in want):
            changed |= {(name, e) for e in range(len(parameter)) if not torch.equal(parameter[e], other[e])}
        elif not torch.equal(parameter, other):
            changed.add((name, -1))
    groups = {"not quantized": want - changed, "quantized though it should stay": changed - want}
    return [f"{len(found)} {what}: {_patterns(n for n, _ in found)[:4]}" for what, found in groups.items() if found]


def _worst(source: nn.Module, filled: nn.Module, want: set[zoo_uses.Weight]) -> float:
    """The largest relative change of a weight."""
    ours = dict(filled.named_parameters(remove_duplicate=False))
    theirs = dict(source.named_parameters(remove_duplicate=False))
    return max((distance(ours[name], theirs[name]) for name in {name for name, _ in want}), default=0.0)


def _far(what: str, value: float, most: float) -> list[str]:
    return [] if value <= most else [f"{what} {value:.2g}, at most {most:.2g}"]


def cover_faults(model_type: str, cover: float) -> list[str]:
    """A type that covers less than it should, without a sentence why."""
    return [f"covers {cover:.2f} of its blocks' matrices"] if cover < 0.9 and model_type not in PARTLY else []
