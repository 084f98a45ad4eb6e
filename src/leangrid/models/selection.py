"""Which of the linears that were found are quantized: what a recipe's ``ignore`` and ``only`` make of a structure.

``ignore`` keeps the linears that it names in 16 bits. ``only`` keeps all others; and where the last part of a linear's
name stands in one of its patterns, the custom (kept.py) by which that linear stays is lifted: ``*.x_proj`` quantizes
x_proj, ``model.layers.0.*`` does not. What engines hold in one matrix, linears of one module that read the same input
and the experts of a block, is quantized together or stays together."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace

from torch import nn

from leangrid.errors import RecipeError
from leangrid.models.discovery import FoundBlock, Structure
from leangrid.models.experts import Experts, modules_outside_experts
from leangrid.models.groups import group_by_input
from leangrid.models.stored import StoredTensors
from leangrid.patterns import REGEX, Pattern

IGNORE, ONLY = "--ignore", "--only"


def select(
    structure: Structure,
    model: nn.Module,
    stored: StoredTensors,
    extra: Iterable[str],
    ignore: Sequence[str],
    only: Sequence[str],
) -> Structure:
    """The structure in which other linears are quantized.

    Args:
        structure: of ``model``, as it was found.
        stored: where its tensors are; it has the linears' names in the result.
        extra: names of tensors that are no part of the model.
        ignore: patterns of the linears that stay.
        only: patterns of those beside which all stay; empty: of all that are quantized by default.

    Raises:
        RecipeError: a pattern names nothing, or linears that cannot be quantized; nothing is left; or what engines
            fuse would be parted.
    """
    chosen = _Chosen([Pattern(text) for text in ignore], [Pattern(text, ONLY) for text in only])
    blocks = tuple(_selected(block, model, stored.module_name, chosen) for block in structure.blocks)
    if idle := [pattern for pattern, met in chosen.met.items() if not met]:
        _refuse_idle(idle, structure, stored, extra)
    if not any(block.groups for block in blocks):
        option = ONLY if only else IGNORE
        raise RecipeError("no linear is left to be quantized", option, "Name other patterns; leangrid plan lists them")
    return replace(structure, blocks=blocks)


class _Chosen:
    """The patterns, and whether they have met a linear so far."""

    def __init__(self, ignore: Sequence[Pattern], only: Sequence[Pattern]) -> None:
        self.ignore, self.only = ignore, only
        self.met = dict.fromkeys((*ignore, *only), False)

    def why(self, name: str, custom: str | None) -> str | None:
        """Why the linear ``name`` stays, which stays by ``custom`` if nobody asks for it; None where it does not."""
        ignored = [pattern for pattern in self.ignore if pattern.matches(name)]
        named = [pattern for pattern in self.only if pattern.matches(name)]
        if custom is not None:
            named = [pattern for pattern in named if pattern.spells(name)]
        self.met |= dict.fromkeys((*ignored, *named), True)
        if custom is not None and not named:
            return custom
        if ignored:
            return f"{IGNORE} {ignored[0].text}"
        return f"{ONLY} names others" if self.only and not named else None


def _refuse_idle(idle: Sequence[Pattern], structure: Structure, stored: StoredTensors, extra: Iterable[str]) -> None:
    """RecipeError for the first of these patterns that names no linear that it could. To ignore what stays in any case
    is no error."""
    kept = {
        stored.module_name(f"{block.path}.{path}"): why
        for block in structure.blocks
        for path, why in (*block.kept.items(), *block.fixed.items())
    }
    quantized = [stored.module_name(f"{block.path}.{path}") for block in structure.blocks for path in _grouped(block)]
    modules = {stored.module_name(name.rpartition(".")[0]) for name in stored.places}
    outside = sorted((modules | {name.rpartition(".")[0] for name in extra}) - kept.keys() - set(quantized))
    for pattern in idle:
        matched = [name for name in (*kept, *outside) if pattern.matches(name)]
        if matched and pattern.option == ONLY:
            why = kept.get(matched[0], "no nn.Linear of a block")
            what = f"'{pattern.text}' names no linear that is quantized: {matched[0]} stays ({why})"
            lifts = matched[0] in kept and not pattern.spells(matched[0])
            hint = f"Write its name, as in '*.{matched[0].rpartition('.')[2]}'" if lifts else _such_as(quantized)
            raise RecipeError(what, ONLY, hint)
        if not matched:
            near = pattern.nearest([*quantized, *kept, *outside])
            whole = "; a regular expression has to match a whole name" if pattern.text.startswith(REGEX) else ""
            what = f"'{pattern.text}' names no linear of the model{whole}"
            raise RecipeError(what, pattern.option, f"Near are {', '.join(near)}" if near else _such_as(quantized))


def _selected(block: FoundBlock, model: nn.Module, name_of: Callable[[str], str], chosen: _Chosen) -> FoundBlock:
    """The block with the groups of the linears that are quantized."""
    inside = modules_outside_experts(model.get_submodule(block.path))
    mixtures = {path: module for path, module in inside if isinstance(module, Experts)}
    kept = dict(block.fixed)
    for path in (*_grouped(block), *(path for path in block.kept if path not in block.fixed)):
        why = chosen.why(name_of(f"{block.path}.{path}"), block.kept.get(path))
        if why is not None:
            kept[path] = why
    left_out = kept.keys() | {path for path, module in mixtures.items() if _first(path, module) in kept}
    for fused in _fused(block, mixtures):
        staying = [path for path in fused if path in kept]
        if staying and len(staying) < len(fused):
            _refuse_part(block, fused, staying, kept, name_of)
    groups, repeated = group_by_input(block.reads, left_out, mixtures)
    reasons = {path: block.kept[path] if path in block.fixed else why for path, why in kept.items()}
    return replace(block, groups=groups, repeated=repeated, kept=reasons)


def _fused(block: FoundBlock, mixtures: dict[str, Experts]) -> Iterator[tuple[str, ...]]:
    """The linears of a block that engines hold in one matrix: of one module, with the same input and, where they stay
    by custom, for the same reason; and all of a mixture of experts."""
    sets: dict[object, list[str]] = {}
    for path, places in block.reads.items():
        if path not in mixtures and path not in block.fixed:
            sets.setdefault((places, path.rpartition(".")[0], block.kept.get(path)), []).append(path)
    yield from (tuple(paths) for paths in sets.values())
    for path, module in mixtures.items():
        dot = f"{path}." if path else ""
        yield tuple(f"{dot}{n}" for number in range(module.stages) for names in module.stage(number) for n in names)


def _refuse_part(
    block: FoundBlock, fused: tuple[str, ...], staying: list[str], kept: dict[str, str], name_of: Callable[[str], str]
) -> None:
    reason, first = kept[staying[0]], name_of(f"{block.path}.{staying[0]}")
    if any(path not in block.reads for path in fused):
        what = "the experts of a block are quantized together or stay together, since engines fuse them"
    else:
        all_of_them = ", ".join(path.rpartition(".")[2] for path in fused)
        stay = ", ".join(path.rpartition(".")[2] for path in staying)
        what = f"{all_of_them} share an input and engines fuse them, but {stay} alone would stay"
    raise RecipeError(what, f"{reason}: {first}", "Name all of them, or none")


def _first(path: str, mixture: Experts) -> str:
    return ".".join(part for part in (path, mixture.stage(0)[0][0]) if part)


def _grouped(block: FoundBlock) -> Iterable[str]:
    return (path for group in block.groups for path in group)


def _such_as(names: Sequence[str]) -> str:
    return f"Names are such as {names[0]}" if names else "See leangrid plan for the names"
