"""MLX's affine container: w = s q + b per group of columns, read by mlx-lm.

Source: mlx 0.32, ``mx.quantize`` and ``mx.dequantize`` (ops.cpp, backend/*/quantized*), and mlx-lm 0.32, ``load_model``. mlx-lm takes a
layer for quantized where the weights hold ``NAME.scales``; config.json says the bits and the group size once for all, and again by name
for the layers that differ. docs/formats.md has the layout and what each of its kernels rounds.
"""

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import UInt8
from torch import Tensor

from leangrid.errors import CheckpointError, FormatError
from leangrid.formats.stored import check_layout, exactly
from leangrid.grids import AffineGrid, Grid, OffsetGrid
from leangrid.packing import pack as pack_bits
from leangrid.packing import packed_width
from leangrid.packing import unpack as unpack_bits
from leangrid.recipe import Scheme

QUANT_METHOD: str = "mlx"  # not written: MLX's config has no quant_method, and transformers refuses it for that
GROUPS = (128, 64, 32)  # what mlx's kernels are built for
BITS = (2, 3, 4, 8)
_WHERE = "config.json: quantization"
_DAMAGED = "The config is damaged: quantize or copy it again"


def group_size(scheme: Scheme, cols: int) -> int:
    """Columns that share a stored scale and bias. Whole rows repeat theirs for the widest group that divides them; 0 if none does."""
    return scheme.group_size or next((size for size in GROUPS if cols % size == 0), 0)


def refuse(scheme: Scheme, name: str, rows: int, cols: int, kind: str = "linear") -> str | None:
    """Non-uniform grids, GPT-2's Conv1D (mlx-lm transposes it after reading) and groups that mlx has no kernel for."""
    if scheme.grid != "affine":
        return f"{name}: MLX holds affine grids only. Use format lut for NU{scheme.bits}, or scheme W{scheme.bits}A16_G64"
    if kind == "conv1d":
        return f"{name} is a Conv1D, which mlx-lm transposes after reading. Use scheme NU{min(scheme.bits, 4)} (format lut)"
    if scheme.group_size and scheme.group_size not in GROUPS:
        fits = next((size for size in reversed(GROUPS) if cols % size == 0), None)
        other = f"W{scheme.bits}A16_G{fits}" if fits else "format compressed-tensors"
        return f"{name}: MLX has groups of 32, 64 and 128 columns, not {scheme.group_size}. Use {other}"
    size = group_size(scheme, cols)
    if not size or cols % size:
        fits = next((size for size in GROUPS if cols % size == 0), None)
        other = f"W{scheme.bits}A16_G{fits}" if fits else "format compressed-tensors with whole rows (no _G)"
        return f"{name}: MLX's groups of {size or '32, 64 or 128'} do not divide its {cols} columns. Use {other}"
    return None


def layout(scheme: Scheme, shape: tuple[int, int], dtype: torch.dtype) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """weight uint32 [rows, cols * bits / 32]; scales and biases ``dtype`` [rows, groups]."""
    rows, cols = shape
    groups = cols // (group_size(scheme, cols) or cols)
    return {
        "weight": (torch.uint32, (rows, packed_width(cols, scheme.bits))),
        "scales": (dtype, (rows, groups)),
        "biases": (dtype, (rows, groups)),
    }


def pack(codes: UInt8[Tensor, "rows cols"], grid: Grid, dtype: torch.dtype, scheme: Scheme) -> dict[str, Tensor]:
    """codes and an offset grid, or an affine one whose -S Z ``dtype`` holds, -> the layer's tensors.

    Raises:
        FormatError: a non-uniform grid, or a scale or an offset that ``dtype`` would round.
    """
    rows, cols = codes.shape
    offset_grid = _as_offset(grid, dtype, scheme)
    repeat = cols // group_size(scheme, cols) // offset_grid.scale.shape[1]
    tensors = {
        "weight": pack_bits(codes, scheme.bits).view(torch.uint32),
        "scales": exactly(offset_grid.scale, dtype, "scales").repeat_interleave(repeat, dim=1),
        "biases": exactly(offset_grid.offset, dtype, "offsets").repeat_interleave(repeat, dim=1),
    }
    check(tensors, scheme, (rows, cols), "the packed layer")
    return tensors


def _as_offset(grid: Grid, dtype: torch.dtype, scheme: Scheme) -> OffsetGrid:
    """The grid as S q + B. -S Z is a product of two short numbers: float64 holds it, and ``dtype`` must."""
    if not isinstance(grid, (AffineGrid, OffsetGrid)) or grid.bits != scheme.bits or grid.group_size != scheme.group_size:
        what = f"MLX holds affine grids of {scheme.bits} bits here, not {type(grid).__name__} of {grid.bits} bits"
        raise FormatError(what, None, "Use format lut for non-uniform grids")
    if isinstance(grid, OffsetGrid):
        return grid
    exact = -grid.scale.double() * grid.zero_point.double()
    offset = exact.to(dtype)
    rounded = int((offset.double() != exact).sum())
    if rounded:
        kind = str(dtype).removeprefix("torch.")
        what = f"MLX stores the offset -S Z in {kind}, which rounds {rounded} of {exact.numel()} of them"
        raise FormatError(what, None, "Quantize with --format mlx, which learns offsets that fit, or with a _SYM scheme")
    return OffsetGrid(grid.scale, offset.float(), grid.bits, grid.group_size)


def check(tensors: dict[str, Tensor], scheme: Scheme, shape: tuple[int, int], name: str) -> None:
    """CheckpointError unless shapes and dtypes are right, scales finite and not 0, and biases finite."""
    check_layout(tensors, layout(scheme, shape, tensors["scales"].dtype if "scales" in tensors else torch.float32), name)
    way_out = "The file is damaged: quantize or copy it again"
    scales = tensors["scales"]
    if not bool(torch.isfinite(scales).all()) or bool((scales == 0).any()):
        raise CheckpointError("a scale is NaN, infinite or 0", f"{name}.scales", way_out)
    if not bool(torch.isfinite(tensors["biases"]).all()):
        raise CheckpointError("a bias is NaN or infinite", f"{name}.biases", way_out)


def unpack(tensors: dict[str, Tensor], scheme: Scheme, shape: tuple[int, int], name: str = "layer") -> tuple[Tensor, OffsetGrid]:
    """The layer's tensors -> (codes uint8 [rows, cols], grid in the stored groups); checked first."""
    check(tensors, scheme, shape, name)
    codes = unpack_bits(tensors["weight"].view(torch.int32), scheme.bits, shape[1])
    return codes, OffsetGrid(tensors["scales"].float(), tensors["biases"].float(), scheme.bits, group_size(scheme, shape[1]))


def dense(tensors: dict[str, Tensor], scheme: Scheme, shape: tuple[int, int], name: str = "layer") -> Tensor:
    """s q + b, [rows, cols], computed in float32 and rounded once to the scales' dtype, as MLX's Metal kernels do."""
    codes, grid = unpack(tensors, scheme, shape, name)
    return grid.dequantize(codes).to(tensors["scales"].dtype)


def config(scheme: Scheme, layers: Mapping[str, tuple[int, int]], ignore: list[str], dtype: torch.dtype) -> dict[str, Any]:
    """What config.json holds as ``quantization`` and once more as ``quantization_config``.

    Whole rows of unequal length have unequal groups: the commonest is the default, the other layers are listed by name.
    """
    sizes = {name: group_size(scheme, cols) for name, (_, cols) in layers.items()}
    common = max(GROUPS, key=lambda size: list(sizes.values()).count(size))
    default = {"group_size": scheme.group_size or common, "bits": scheme.bits, "mode": "affine"}
    return default | {name: {**default, "group_size": size} for name, size in sizes.items() if size != default["group_size"]}


def is_config(config: dict[str, Any]) -> bool:
    """Whether a ``quantization_config`` is MLX's: the only one without a method."""
    return "quant_method" not in config and "group_size" in config and "bits" in config


def scheme_of(config: dict[str, Any]) -> Scheme:
    """The scheme of a ``quantization`` with one number of bits for all layers, ours or mlx-lm's."""
    bits, size, mode = config.get("bits"), config.get("group_size"), config.get("mode", "affine")
    if mode != "affine" or bits not in BITS or isinstance(bits, bool):
        what = f"leangrid reads MLX's mode affine at 2, 3, 4 and 8 bits, not {mode!r} at {bits!r}"
        raise FormatError(what, _WHERE, "Load it with mlx-lm")
    if size not in GROUPS:
        raise FormatError(f"group_size must be 32, 64 or 128, not {size!r}", _WHERE, _DAMAGED)
    scheme = Scheme(grid="affine", method="leanquant", bits=bits, group_size=size)
    others = {name: value for name, value in config.items() if isinstance(value, dict)}
    if not others:
        return scheme
    if any(value.get("bits") != bits or value.get("mode", "affine") != "affine" or value.get("group_size") not in GROUPS
           for value in others.values()):  # fmt: skip
        raise FormatError("leangrid reads MLX with one number of bits for all layers", _WHERE, "Load it with mlx-lm")
    return scheme.model_copy(update={"group_size": None})  # whole rows: each layer has the widest group that divides it


def covers(config: dict[str, Any], name: str) -> bool:
    """Whether the config leaves it to the file: ``NAME.scales`` decides, unless the config says false by name."""
    return config.get(name) is not False
