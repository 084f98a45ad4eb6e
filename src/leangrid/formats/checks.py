"""What all containers check of stored tensors."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from leangrid.errors import CheckpointError, FormatError
from leangrid.grids import AffineGrid, Grid, Precision
from leangrid.recipe import Scheme

_LEAST_IN_BOTH, _MOST_IN_BOTH = 2.0**-17, 65280.0  # bfloat16 numbers between them are float16 numbers too


def exactly(values: Float[Tensor, "rows n"], dtype: torch.dtype, what: str) -> Float[Tensor, "rows n"]:
    """``values`` in ``dtype``, contiguous; FormatError if that changes one of them or one is not finite."""
    stored = values.to(dtype).contiguous()
    if not torch.equal(stored.to(values.dtype), values):  # NaN differs from itself
        way_out = "Round the grid to the stored dtype before solving: grid.rounded(dtype)"
        raise FormatError(f"the grid's {what} are not exact in {str(dtype).removeprefix('torch.')}", None, way_out)
    return stored


def half_precision(dtype: torch.dtype) -> Precision:
    """Of a container whose scales are float16 whatever the model is: they must be exact there and in a bfloat16 model's
    own dtype."""
    return Precision(dtype, _LEAST_IN_BOTH, _MOST_IN_BOTH) if dtype == torch.bfloat16 else Precision(torch.float16)


def exactly_in_half(scale: Float[Tensor, "rows groups"], dtype: torch.dtype) -> Float[Tensor, "rows groups"]:
    """``scale`` in float16; FormatError naming how many it, or readers in a bfloat16 model, would round."""
    for target in dict.fromkeys((torch.float16, half_precision(dtype).dtype)):
        wrong = scale.to(target).to(scale.dtype) != scale
        if bool(wrong.any()):
            worst = float(scale[wrong].abs().min())
            what = f"{int(wrong.sum())} of {scale.numel()} scales are not exact in {str(target).removeprefix('torch.')}, such as {worst:.4g}"
            raise FormatError(
                what, None, "Use format compressed-tensors, or quantize again with --format and this one's name"
            )
    return scale.half()


def stored_groups(grid: Grid, scheme: Scheme, cols: int, container: str) -> AffineGrid:
    """``grid`` with one (S, Z) for each group of ``scheme``, repeated where its own groups are longer; FormatError for
    another kind."""
    if not isinstance(grid, AffineGrid) or grid.bits != scheme.bits:
        what = (
            f"{container} holds affine grids of {scheme.bits} bits here, not {type(grid).__name__} of {grid.bits} bits"
        )
        raise FormatError(what, None, "Use format lut for non-uniform grids")
    return grid.regrouped(cols, scheme.group_size)


def repeated(scheme: Scheme, columns: set[int], groups: tuple[int, ...]) -> Scheme:
    """``scheme`` in the first of ``groups`` that divides its own: whole rows and longer groups are repeated; the last
    where none does."""
    widths = {scheme.group_size or cols for cols in columns}
    size = next((group for group in groups if all(width % group == 0 for width in widths)), groups[-1])
    return scheme.model_copy(update={"group_size": size})


def check_scales(scales: Float[Tensor, "rows groups"], name: str) -> None:
    """CheckpointError if one is NaN, infinite or 0."""
    if not bool(torch.isfinite(scales).all()) or bool((scales == 0).any()):
        raise CheckpointError("a scale is NaN, infinite or 0", name, "The file is damaged: quantize or copy it again")


def check_layout(tensors: dict[str, Tensor], layout: dict[str, tuple[torch.dtype, tuple[int, ...]]], name: str) -> None:
    """CheckpointError on the first tensor of a layer that is absent, extra, or has another shape or dtype."""
    way_out = "The file is damaged or was written by another version: quantize or copy it again"
    for suffix in sorted(set(tensors) ^ set(layout)):
        raise CheckpointError(
            "is missing" if suffix in layout else "does not belong to this format", f"{name}.{suffix}", way_out
        )
    for suffix, (dtype, shape) in layout.items():
        stored = tensors[suffix]
        if stored.dtype != dtype or tuple(stored.shape) != shape:
            raise CheckpointError(
                f"is {_text(stored.dtype, tuple(stored.shape))}, the config asks for {_text(dtype, shape)}",
                f"{name}.{suffix}",
                way_out,
            )


def check_padding(words: Int[Tensor, "rows words"], count: int, bits: int, name: str) -> None:
    """CheckpointError if a bit behind the last code of a row is set."""
    used = count * bits - 32 * (words.shape[1] - 1)
    if (
        words.numel()
        and used < 32
        and bool((words[:, -1].to(torch.int64) & 0xFFFFFFFF).bitwise_right_shift(used).any())
    ):
        raise CheckpointError(
            "bits are set behind the last code of a row", name, "The file is damaged: quantize or copy it again"
        )


def _text(dtype: torch.dtype, shape: tuple[int, ...]) -> str:
    return f"{str(dtype).removeprefix('torch.')} {list(shape)}"
