"""The recipe that a run follows: every default written out for this model, and what cannot be done refused by name."""

import math
from pathlib import Path

from leangrid.data.corpora import NAMED
from leangrid.errors import FormatError, RecipeError, ShapeError
from leangrid.formats import FORMATS
from leangrid.formats.base import Format
from leangrid.machine.arithmetic import choose_compute_dtype, choose_products
from leangrid.mixture import beside_own_text, split_mixture
from leangrid.models.skeleton import Skeleton
from leangrid.planning.budget import estimated_recipe
from leangrid.planning.sizes import layers_alike, stored_schemes
from leangrid.recipe import Recipe
from leangrid.storage.remote import Remote
from leangrid.storage.source import Checkpoint, open_source

OWN_TOKENS = 65_536  # with fewer calibration tokens the model writes some itself for the effort best
_MOST_PARAMETERS = 4_000_000_000  # of a model that does: it is whole in memory then, in float32 on a CPU


def open_checkpoint(
    directory: Path,
    recipe: Recipe,
    device: str = "cpu",
    remote: Remote | None = None,
    *,
    adds_text: bool = True,
) -> tuple[Checkpoint, Skeleton, Recipe]:
    """Open a checkpoint directory: its files, the model that they hold, and the recipe resolved for that model.

    Args:
        adds_text: whether the effort ``best`` may add text that the model writes; not where windows are given as a
            tensor.

    Raises:
        LeangridError: the directory is no checkpoint, or the recipe asks for something that its shapes do not allow.
    """
    checkpoint = open_source(directory, remote=remote)
    skeleton = Skeleton(checkpoint)
    skeleton.select(recipe.ignore, recipe.only)
    resolved = resolve_recipe(recipe, skeleton, device, adds_text=adds_text)
    skeleton.compute_dtype = choose_compute_dtype(resolved.products, skeleton.dtype)
    refuse_impossible(resolved, skeleton)
    _ = estimated_recipe(resolved, skeleton)  # refuses a budget that is out of range
    return checkpoint, skeleton, resolved


def resolve_recipe(recipe: Recipe, skeleton: Skeleton, device: str = "cpu", *, adds_text: bool = True) -> Recipe:
    """Write out every default; the scheme ``auto`` becomes W4A16 in the first of the container's ``AUTO_GROUPS`` (128
    for most) that divides the columns of every layer, else in whole rows. The effort ``best`` adds text that the model
    writes (``_with_own_text``) where it may (``adds_text``)."""
    columns = {cols for (_, cols), _ in skeleton.names_by_shape}
    groups = FORMATS[recipe.format].AUTO_GROUPS if recipe.format in FORMATS else Format.AUTO_GROUPS
    size = next((size for size in groups if all(cols % size == 0 for cols in columns)), None)
    resolved = recipe.resolved(f"W4A16_G{size}" if size else "W4A16")
    if adds_text and resolved.effort == "best":
        resolved = _with_own_text(resolved, skeleton)
    if resolved.products != "auto":
        return resolved
    return resolved.model_copy(update={"products": choose_products(skeleton.dtype, device)})


def _with_own_text(recipe: Recipe, skeleton: Skeleton) -> Recipe:
    """This recipe with calibration windows that the model writes itself beside those of its source, where that gives
    fewer than ``OWN_TOKENS`` tokens: what tuning learns from few tokens holds for those tokens (docs/log.md). Only for
    language models of up to 4 billion parameters that are not streamed, and not where the source may have rows with
    pictures."""
    parameters = sum(math.prod(tensor.shape) for tensor in skeleton.checkpoint.tensors.values())
    may_show = skeleton.takes_pictures and recipe.calibration not in NAMED
    answers = skeleton.has_lm_head and not getattr(skeleton.config, "is_encoder_decoder", False)
    streamed = getattr(skeleton.checkpoint, "remote", None) is not None
    if streamed or not answers or may_show or parameters > _MOST_PARAMETERS:
        return recipe
    calibration = beside_own_text(recipe.calibration, recipe.samples, recipe.length, OWN_TOKENS)
    samples = sum(part.windows for part in split_mixture(calibration)) or recipe.samples
    return recipe.model_copy(update={"calibration": calibration, "samples": samples})


def describe_own_text(asked: Recipe, resolved: Recipe) -> list[str]:
    """One sentence where an effort added windows that the model writes; none where it did not."""
    if resolved.calibration == asked.calibration:
        return []
    what = (
        f"--effort {resolved.effort} adds {resolved.written_windows} calibration windows that the model writes itself"
    )
    return [f"{what} to the {asked.samples} of {asked.calibration}; --calibration {resolved.calibration} names them"]


def refuse_impossible(recipe: Recipe, skeleton: Skeleton) -> None:
    """ShapeError for a group that does not divide, FormatError for what the container cannot hold: names the layer."""
    container = FORMATS.get(recipe.format)
    if container is None or container.EXPORT_ONLY:
        known = ", ".join(name for name, row in FORMATS.items() if not row.EXPORT_ONLY)
        then = "" if container is None else f"; {recipe.format} by leangrid export, afterwards"
        raise FormatError(
            f"'{recipe.format}' is no format that quantize writes", "--format", f"Choose one of: auto, {known}{then}"
        )
    if recipe.parsed.block and not container.BLOCKS:
        what = f"{recipe.scheme} is a block type of llama.cpp, which format {recipe.format} does not hold"
        raise FormatError(
            what, "--format", f"Use format gguf, or a scheme such as W{min(recipe.parsed.bits, 4)}A16_G32"
        )
    for alike in layers_alike(skeleton, recipe):
        name, scheme, cols = alike.names[0], alike.scheme, alike.cols
        if scheme.group_size and cols % scheme.group_size and not scheme.block:
            fits = [g for g in (128, 64, 32) if cols % g == 0]
            instead = f"W{scheme.bits}A16_G{fits[0]} or W{scheme.bits}A16" if fits else f"W{scheme.bits}A16"
            raise ShapeError(f"groups of {scheme.group_size} do not divide {cols} columns", name, f"Use {instead}")
        reason = container.refuse(scheme, name, alike.rows, cols, alike.kind)
        if reason:
            raise FormatError(reason)
    if recipe.layers:
        _refuse_mixture(recipe, skeleton)


def _refuse_mixture(recipe: Recipe, skeleton: Skeleton) -> None:
    """RecipeError for an entry of ``layers`` that names no layer, or parts linears that engines fuse (q, k, v; gate,
    up)."""
    names = skeleton.all_linear_names()
    idle = set(recipe.layers) - {recipe.find_key(name) for name in names}
    if idle:
        raise RecipeError(
            f"'{min(idle)}' names no layer that is quantized", "layers", f"Names are such as {names[-1]}, or its end"
        )
    for index in range(len(skeleton.blocks)):
        for group in skeleton.groups(index):
            fused = [skeleton.linear_name(index, name) for name in group]
            schemes = {recipe.layers.get(recipe.find_key(name) or "", recipe.scheme) for name in fused}
            if len(schemes) > 1:
                shared = ", ".join(name.rpartition(".")[2] for name in fused)
                several = " and ".join(sorted(schemes))
                what = f"{shared} share an input and engines fuse them, so they need one scheme, not {several}"
                raise RecipeError(what, fused[0], "Name all of them, or none")
    FORMATS[recipe.format].config(stored_schemes(skeleton, recipe), [])  # refuses where it stores one scheme only


def describe_narrow_types(recipe: Recipe, skeleton: Skeleton) -> list[str]:
    """One sentence for each width whose layers take another block type than the scheme's, because 256 does not divide
    it."""
    widths = [skeleton.shape(name)[1] for name in skeleton.all_linear_names()]
    others = {
        cols: recipe.scheme_name(cols) for cols in sorted(set(widths)) if recipe.scheme_name(cols) != recipe.scheme
    }
    return [
        f"{recipe.scheme}: {widths.count(cols)} layers of {cols} columns take {other}, 256 does not divide them"
        for cols, other in others.items()
    ]
