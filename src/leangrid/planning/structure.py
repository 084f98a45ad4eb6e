"""What was found of a model, as plain JSON values: for the plan, the manifest, the report and the model card."""

import math
import re
from collections.abc import Iterable, Iterator
from typing import Any

from torch import Tensor, nn

from leangrid.models.discovery import FoundBlock
from leangrid.models.experts import modules_outside_experts
from leangrid.models.kept import why_kept
from leangrid.models.selection import IGNORE, ONLY
from leangrid.models.skeleton import Skeleton

_FLOWS_SHOWN = 8  # of what passes between the blocks
_NOT_OF_THE_MODEL = "is no part of transformers' model; copied"


def describe_structure(skeleton: Skeleton) -> dict[str, Any]:
    """``model``: transformers' class; ``lists``: the paths of the lists of blocks; ``blocks``: how many there are, and
    ``calls`` of them in a pass; ``kinds``: of each kind of block ``count``, the ``first`` one's path, its ``module``
    and the ``groups`` of linears by shared input, each number of an expert as ``*``; ``flows``: what passes between
    blocks beside the hidden states, numbers as ``*``; ``idle``: how many blocks text does not reach."""
    structure = skeleton.structure
    kinds: dict[object, dict[str, Any]] = {}
    opened: dict[tuple[str, ...], list[str]] = {}  # group -> its names with open numbers
    for block, module in zip(structure.blocks, skeleton.blocks, strict=True):
        for group in block.groups:
            if group not in opened:
                opened[group] = list(dict.fromkeys(map(_open_numbers, group)))
        groups = [opened[group] for group in block.groups]
        kind = (type(module).__name__, tuple(map(tuple, groups)))
        new = {"count": 0, "first": block.path, "module": type(module).__name__, "groups": groups}
        kinds.setdefault(kind, new)["count"] += 1
    flows = list(dict.fromkeys(_words(flow) for flow in structure.flows))
    return {
        "model": type(skeleton.model).__name__,
        "lists": list(structure.lists),
        "blocks": len(structure.blocks),
        "calls": len(structure.order),
        "kinds": list(kinds.values()),
        "flows": flows[:_FLOWS_SHOWN] + [f"and {len(flows) - _FLOWS_SHOWN} more"] * (len(flows) > _FLOWS_SHOWN),
        "idle": len(structure.idle),
    }


def describe_kept(skeleton: Skeleton) -> list[dict[str, Any]]:
    """What holds matrices and stays as it is stored: one entry for each summary of names and reason, with ``name``
    (numbers of blocks and experts as ``*``, a pattern of the recipe, or a module in which nothing is quantized),
    ``why`` and the ``count`` of matrices."""
    counts: dict[tuple[str, str], int] = {}
    for name, why in (*_in_blocks(skeleton), *_outside(skeleton)):
        counts[name, why] = counts.get((name, why), 0) + 1
    return [{"name": name, "why": why, "count": count} for (name, why), count in counts.items()]


def describe_choice(skeleton: Skeleton) -> Iterator[str]:
    """One sentence for each pattern of ``ignore``, and for ``only``, by which linears stay."""
    for entry in describe_kept(skeleton):
        if entry["why"].startswith((IGNORE, ONLY)):
            by = f"{IGNORE} {entry['name']}" if entry["why"] == IGNORE else entry["why"]
            yield f"{by}: {entry['count']} linears stay as they are stored"


def describe_fused(skeleton: Skeleton, merge: bool) -> list[str]:
    """A sentence where experts that are stored in one tensor are written one by one: in the mixtures of which some are
    quantized, or of whose tensors of all experts plain transformers finds none. ``merge``: what
    ``Skeleton.plain_tensors`` is asked with for the result."""
    fused = skeleton.stored.fused_mixtures
    packed = {skeleton.path(name).rsplit(".", 2)[0] for name in skeleton.all_linear_names()}
    apart = [path for path in fused if path in packed or skeleton.stored.kept_whole(path, merge) is None]
    if not apart:
        return []
    which = "they" if len(apart) == len(fused) else f"those of {len(apart)} of {len(fused)} mixtures"
    return [f"the experts of a mixture are stored in one tensor: {which} are read one by one, and written so"]


def describe_source(skeleton: Skeleton) -> dict[str, Any] | None:
    """What a source in fewer bits than 16 is stored in: ``method``, ``what`` in words, how many ``tensors``, and the
    ``bytes`` of its files' tensors. None for other sources."""
    stored = getattr(skeleton.checkpoint, "stored_as", None)
    if stored is None:
        return None
    return {"method": stored.method, "what": stored.what, "tensors": stored.tensors, "bytes": stored.bytes}


def _in_blocks(skeleton: Skeleton) -> Iterator[tuple[str, str]]:
    """(summary, why) of each matrix of the blocks that stays."""
    for index, block in enumerate(skeleton.structure.blocks):
        for path, why in block.kept.items():
            name = _open_numbers(skeleton.linear_name(index, path))
            if why.startswith(f"{IGNORE} "):
                name, why = why.removeprefix(f"{IGNORE} "), IGNORE
            elif why.startswith(f"{ONLY} "):
                name = "others"
            yield name, why
        for path, why in _multiplied_elsewhere(block):
            yield _open_numbers(skeleton.linear_name(index, path)), why


def _multiplied_elsewhere(block: FoundBlock) -> Iterator[tuple[str, str]]:
    """The matrices of a block that no linear holds, by their modules where these have no other, and why they stay."""
    for name, shape in block.left.items():
        owner, _, leaf = name.rpartition(".")
        path = owner if leaf == "weight" and owner else name
        yield path, (why_kept(path, *shape) if len(shape) == 2 else None) or "is multiplied outside of a linear"


def _outside(skeleton: Skeleton) -> Iterator[tuple[str, str]]:
    """(summary, why) of each linear, convolution and embedding outside of the blocks, and of what is beside the
    model."""
    within = _modules_around(skeleton.all_linear_names())
    entry = next(path for path, module in skeleton.model.named_modules() if module is skeleton.entry)
    unseen = tuple(f"{path}." for path in skeleton.structure.idle)
    unseen += tuple(name for name in skeleton.structure.unused if name.startswith(f"{entry}." if entry else ""))
    for path, module in modules_outside_experts(skeleton.model):
        weight = module._parameters.get("weight")
        if not isinstance(weight, Tensor) or weight.ndim < 2 or path.startswith(skeleton.block_prefixes):
            continue
        name = skeleton.stored.module_name(path)
        if f"{path}.weight" not in skeleton.stored.places:
            continue  # tied to another
        why = "text does not reach it" if f"{path}.weight".startswith(unseen) else "outside of the blocks"
        yield _highest(name, within), "is a table of tokens" if isinstance(module, nn.Embedding) else why
    for name in skeleton.naming.extra:
        yield _highest(name, within), _NOT_OF_THE_MODEL


def _modules_around(names: Iterable[str]) -> set[str]:
    """The modules in which the linears ``names`` lie, from the innermost to the outermost."""
    found: set[str] = set()
    for name in names:
        while (at := name.rfind(".")) > 0 and (name := name[:at]) not in found:
            found.add(name)
    return found


def _highest(name: str, within: set[str]) -> str:
    """The outermost module around ``name`` in which nothing is quantized."""
    return _open_numbers(next((name[:at] for at in _dots(name) if name[:at] not in within), name))


def _dots(name: str) -> Iterator[int]:
    return (at for at, letter in enumerate(name) if letter == ".")


def _words(flow: str) -> str:
    """A flow with numbers of blocks left open; an argument without a name by its place."""
    return re.sub(r"(?<=\.)\d+\b", "*", re.sub(r"^(\d+) of ", r"argument \1 of ", flow))


def _open_numbers(name: str) -> str:
    return re.sub(r"(?<![^.])\d+(?=\.)", "*", name)


def describe_left_over(skeleton: Skeleton) -> list[str]:
    """A sentence where more than a tenth of the blocks' matrices are multiplied outside of any linear."""
    left = {name: math.prod(shape) for block in skeleton.structure.blocks for name, shape in block.left.items()}
    numbers = sum(math.prod(shape) for block in skeleton.structure.blocks for shape in block.left.values())
    taken = sum(math.prod(skeleton.shape(name)) for name in skeleton.all_linear_names())
    if numbers * 10 <= numbers + taken:
        return []
    share = 100 * numbers / (numbers + taken)
    return [
        f"{share:.0f}% of the blocks' matrices lie in no linear and stay as they are stored: {', '.join(sorted(left))}"
    ]
