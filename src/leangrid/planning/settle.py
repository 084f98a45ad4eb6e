"""The recipe that a run follows: every default written out for this model, and what cannot be done refused by name."""

from pathlib import Path

from leangrid.errors import FormatError, RecipeError, ShapeError
from leangrid.formats import EXPORT_ONLY, FORMATS, config_of, mlx
from leangrid.machine.arithmetic import best_products, compute_dtype
from leangrid.models.skeleton import Skeleton
from leangrid.planning.sizes import stored_schemes
from leangrid.recipe import Recipe
from leangrid.storage.remote import Remote
from leangrid.storage.source import Checkpoint, open_source

_DEFAULT_GROUP = 128


def open_model(
    directory: Path, recipe: Recipe, device: str = "cpu", remote: Remote | None = None
) -> tuple[Checkpoint, Skeleton, Recipe]:
    """A directory as checkpoint and skeleton, with the recipe settled for its shapes; refuses what cannot be done."""
    checkpoint = open_source(directory, remote=remote)
    skeleton = Skeleton(checkpoint)
    settled = settle(recipe, skeleton, device)
    skeleton.compute_dtype = compute_dtype(settled.products, skeleton.dtype)
    refuse_impossible(settled, skeleton)
    return checkpoint, skeleton, settled


def settle(recipe: Recipe, skeleton: Skeleton, device: str = "cpu") -> Recipe:
    """Write out every default; ``auto`` becomes W4A16_G128 where all columns divide by 128, else W4A16 (in MLX
    W4A16_G64 or _G32)."""
    columns = {skeleton.shape(name)[1] for name in skeleton.linear_names(0)}
    fits = [size for size in (_DEFAULT_GROUP, *mlx.GROUPS[1:]) if all(cols % size == 0 for cols in columns)]
    # MLX stores whole rows in groups too, so that narrower ones cost it nothing.
    grouped = bool(fits) and (fits[0] == _DEFAULT_GROUP or recipe.format == "mlx")
    settled = recipe.resolved(f"W4A16_G{fits[0]}" if grouped else "W4A16")
    if settled.products != "auto":
        return settled
    return settled.model_copy(update={"products": best_products(skeleton.dtype, device)})


def refuse_impossible(recipe: Recipe, skeleton: Skeleton) -> None:
    """ShapeError for a group that does not divide, FormatError for what the container cannot hold: names the layer."""
    if recipe.format not in FORMATS or recipe.format in EXPORT_ONLY:
        known = ", ".join(name for name in FORMATS if name not in EXPORT_ONLY)
        then = f"; {recipe.format} by leangrid export, afterwards" if recipe.format in EXPORT_ONLY else ""
        raise FormatError(
            f"'{recipe.format}' is no format that quantize writes", "--format", f"Choose one of: auto, {known}{then}"
        )
    if recipe.parsed.block and recipe.format != "gguf":
        what = f"{recipe.scheme} is a block type of llama.cpp, which format {recipe.format} does not hold"
        raise FormatError(
            what, "--format", f"Use format gguf, or a scheme such as W{min(recipe.parsed.bits, 4)}A16_G32"
        )
    for index in range(len(skeleton.blocks)):
        for name in skeleton.linear_names(index):
            rows, cols = skeleton.shape(name)
            scheme = recipe.for_layer(name).parsed
            if scheme.group_size and cols % scheme.group_size and not scheme.block:
                fits = [g for g in (128, 64, 32) if cols % g == 0]
                instead = f"W{scheme.bits}A16_G{fits[0]} or W{scheme.bits}A16" if fits else f"W{scheme.bits}A16"
                raise ShapeError(f"groups of {scheme.group_size} do not divide {cols} columns", name, f"Use {instead}")
            reason = FORMATS[recipe.format].refuse(scheme, name, rows, cols, skeleton.architecture.layer)
            if reason:
                raise FormatError(reason)
    if recipe.layers:
        _refuse_mixture(recipe, skeleton)


def _refuse_mixture(recipe: Recipe, skeleton: Skeleton) -> None:
    """RecipeError for an entry of ``layers`` that names no layer, or parts linears that engines fuse (q, k, v; gate,
    up)."""
    names = [name for index in range(len(skeleton.blocks)) for name in skeleton.linear_names(index)]
    idle = set(recipe.layers) - {recipe.key_of(name) for name in names}
    if idle:
        raise RecipeError(
            f"'{min(idle)}' names no layer that is quantized", "layers", f"Names are such as {names[-1]}, or its end"
        )
    for index in range(len(skeleton.blocks)):
        for group in skeleton.groups(index):
            fused = [f"{skeleton.block_name(index)}.{name}" for name in group]
            schemes = {recipe.for_layer(name).scheme for name in fused}
            if len(schemes) > 1:
                shared = ", ".join(name.rpartition(".")[2] for name in fused)
                what = f"{shared} share an input and engines fuse them, so they need one scheme, not {' and '.join(sorted(schemes))}"
                raise RecipeError(what, fused[0], "Name all of them, or none")
    config_of(
        FORMATS[recipe.format], stored_schemes(skeleton, recipe), [], skeleton.dtype
    )  # refuses, if it holds one scheme only


def narrowed(recipe: Recipe, skeleton: Skeleton) -> list[str]:
    """One sentence for each width whose layers take another block type than the scheme's, because 256 does not divide
    it."""
    widths = [skeleton.shape(name)[1] for index in range(len(skeleton.blocks)) for name in skeleton.linear_names(index)]
    return [
        f"{recipe.scheme}: {widths.count(cols)} layers of {cols} columns take {recipe.scheme_name(cols)}, 256 does not divide them"
        for cols in sorted(set(widths))
        if recipe.scheme_name(cols) != recipe.scheme
    ]
