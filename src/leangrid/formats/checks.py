"""Checks, casts and refusals that several containers share."""

from collections.abc import Mapping

import torch
from jaxtyping import Float, Int
from torch import Tensor

from leangrid.errors import CheckpointError, FormatError
from leangrid.formats.base import Layout
from leangrid.grids import AffineGrid, Grid, Precision
from leangrid.schemes import Scheme
from leangrid.storage.dtypes import CODES, NAMES, torch_name
from leangrid.storage.safetensors import TensorInfo

DAMAGED = "The file is damaged: quantize or copy it again"
# Every bfloat16 number between these is a float16 number too.
_LEAST_IN_BOTH, _MOST_IN_BOTH = 2.0**-17, 65280.0


def cast_exactly(values: Float[Tensor, "rows n"], dtype: torch.dtype, what: str) -> Float[Tensor, "rows n"]:
    """``values`` in ``dtype``, contiguous; FormatError where that changes one of them or one is not finite."""
    stored = values.to(dtype).contiguous()
    if not torch.equal(stored.to(values.dtype), values):  # NaN differs from itself
        way_out = "Round the grid to the stored dtype before solving: grid.rounded(dtype)"
        raise FormatError(f"the grid's {what} are not exact in {torch_name(dtype)}", None, way_out)
    return stored


def half_precision(dtype: torch.dtype) -> Precision:
    """The precision of a container that stores float16 scales for a model of any dtype: they must be exact in float16,
    and in bfloat16 where that is the model's dtype."""
    return Precision(dtype, _LEAST_IN_BOTH, _MOST_IN_BOTH) if dtype == torch.bfloat16 else Precision(torch.float16)


def cast_exactly_to_half(scale: Float[Tensor, "rows groups"], dtype: torch.dtype) -> Float[Tensor, "rows groups"]:
    """``scale`` in float16; FormatError with the number of scales that float16, or a reader in a bfloat16 model, would
    round."""
    for target in dict.fromkeys((torch.float16, half_precision(dtype).dtype)):
        wrong = scale.to(target).to(scale.dtype) != scale
        if bool(wrong.any()):
            worst = float(scale[wrong].abs().min())
            count = f"{int(wrong.sum())} of {scale.numel()}"
            what = f"{count} scales are not exact in {torch_name(target)}, such as {worst:.4g}"
            raise FormatError(
                what, None, "Use format compressed-tensors, or quantize again with --format and this one's name"
            )
    return scale.half()


def affine_grid(grid: Grid, scheme: Scheme, container: str) -> AffineGrid:
    """``grid``, if it is an affine one of the scheme's bits and, for a symmetric scheme, of zero points 2^(bits-1).

    Raises:
        FormatError: it is not.
    """
    if not isinstance(grid, AffineGrid) or grid.bits != scheme.bits:
        what = (
            f"{container} holds affine grids of {scheme.bits} bits here, not {type(grid).__name__} of {grid.bits} bits"
        )
        raise FormatError(what, None, "Use format lut for non-uniform grids")
    if scheme.symmetric and not bool((grid.zero_point == scheme.levels // 2).all()):
        raise FormatError(
            "a symmetric scheme needs every zero point in the middle", None, "Use the scheme without _SYM"
        )
    return grid


def scheme_in_groups(scheme: Scheme, columns: set[int], groups: tuple[int, ...]) -> Scheme:
    """``scheme`` with the first of ``groups`` (columns) that divides its own group in every layer, in which whole rows
    and longer groups are repeated; with the last where none does."""
    widths = {scheme.group_size or cols for cols in columns}
    size = next((group for group in groups if all(width % group == 0 for width in widths)), groups[-1])
    return scheme.model_copy(update={"group_size": size})


def holds_codes(stored: Mapping[str, TensorInfo], name: str, layout: Layout) -> bool:
    """Whether a file holds the packed codes of layer ``name``. A dense weight is called ``weight`` too, so a tensor of
    that name counts only where it is stored as integers."""
    codes = (suffix for suffix, (dtype, _) in layout.items() if NAMES[dtype] in CODES)
    found = ((suffix, stored.get(f"{name}.{suffix}")) for suffix in codes)
    return any(info is not None and (suffix != "weight" or info.dtype in CODES) for suffix, info in found)


def affine_only(container: str, name: str, bits: int, affine_scheme: str) -> str:
    """Why a container that holds affine grids does not hold layer ``name`` on another grid, and the way out."""
    return f"{name}: {container} holds affine grids only. Use format lut for NU{bits}, or scheme {affine_scheme}"


def no_conv1d(name: str, why: str, bits: int) -> str:
    """Why a container does not hold layer ``name``, one of GPT-2's Conv1D, and the way out."""
    return f"{name} is a Conv1D, {why}. Use scheme NU{min(bits, 4)} (format lut)"


def uneven_groups(name: str, scheme: Scheme, cols: int) -> str | None:
    """Why groups that do not divide the ``cols`` columns of layer ``name`` cannot be stored; None where they do."""
    if cols % (scheme.group_size or cols) == 0:
        return None
    what = f"{name}: groups of {scheme.group_size} do not divide its {cols} columns"
    return f"{what}. Use a group that does, or whole rows (no _G)"


def check_scales(scales: Float[Tensor, "rows groups"], name: str) -> None:
    """CheckpointError where a scale is NaN, infinite or 0."""
    if not bool(torch.isfinite(scales).all()) or bool((scales == 0).any()):
        raise CheckpointError("a scale is NaN, infinite or 0", name, DAMAGED)


def check_layout(tensors: dict[str, Tensor], layout: Layout, name: str) -> None:
    """CheckpointError for the first tensor of a layer that is absent, extra, or has another shape or dtype."""
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
    """CheckpointError where a bit behind the last of a row's ``count`` codes is set."""
    used = count * bits - 32 * (words.shape[1] - 1)
    if words.numel() and used < 32:
        last = words[:, -1].to(torch.int64) & 0xFFFFFFFF
        if bool(last.bitwise_right_shift(used).any()):
            raise CheckpointError("bits are set behind the last code of a row", name, DAMAGED)


def _text(dtype: torch.dtype, shape: tuple[int, ...]) -> str:
    return f"{torch_name(dtype)} {list(shape)}"
