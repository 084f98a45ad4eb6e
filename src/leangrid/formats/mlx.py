"""MLX's affine container: w = s q + b per group of columns, read by mlx-lm.

Source: mlx 0.32, ``mx.quantize`` and ``mx.dequantize`` (ops.cpp, backend/*/quantized*), and mlx-lm 0.32,
``load_model``. mlx-lm takes a layer for quantized where the weights hold ``NAME.scales``; config.json says the bits and
the group size once for all, and by name for the layers that differ. docs/formats.md has the layout and what each of its
kernels rounds."""

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from jaxtyping import UInt8
from torch import Tensor

from leangrid.errors import CheckpointError, FormatError
from leangrid.formats.bit_stream import pack as pack_bits
from leangrid.formats.bit_stream import packed_width
from leangrid.formats.bit_stream import unpack as unpack_bits
from leangrid.formats.checks import check_layout, check_scales, exactly, repeated
from leangrid.grids import AffineGrid, Grid, OffsetGrid, Precision
from leangrid.grids.base import group_columns
from leangrid.recipe import Scheme

QUANT_METHOD: str = "mlx"  # not written: MLX's config has no quant_method, and transformers refuses it for that
GROUPS = (128, 64, 32)  # what mlx's kernels are built for
BITS = (2, 3, 4, 5, 6, 8)
_WHERE = "config.json: quantization"


def refuse(scheme: Scheme, name: str, rows: int, cols: int, kind: str = "linear") -> str | None:
    """Non-uniform grids, GPT-2's Conv1D (mlx-lm transposes it after reading) and groups that no group of 128, 64 or 32
    divides."""
    bits, size = scheme.bits, scheme.group_size
    if scheme.grid == "nonuniform":
        return f"{name}: MLX holds affine grids only. Use format lut for NU{bits}, or scheme W{bits}A16_G64"
    if kind == "conv1d":
        return f"{name} is a Conv1D, which mlx-lm transposes after reading. Use scheme NU{min(bits, 4)} (format lut)"
    if cols % (size or cols):
        return (
            f"{name}: groups of {size} do not divide its {cols} columns. Use a group that does, or whole rows (no _G)"
        )
    if (size or cols) % GROUPS[-1]:
        fits = next(
            (f"scheme W{bits}A16_G{group}" for group in GROUPS if cols % group == 0), "format compressed-tensors"
        )
        return f"{name}: {f'groups of {size}' if size else f'its {cols} columns'} are no multiple of 32, the least group of MLX. Use {fits}"
    return None


def stored(scheme: Scheme, columns: set[int]) -> Scheme:
    """In groups of 128, 64 or 32, the largest that divides the scheme's own: whole rows and longer groups are
    repeated."""
    return repeated(scheme, columns, GROUPS)


def precision(dtype: torch.dtype) -> Precision:
    """Scales and offsets are stored as the model is; s q + b is rounded to it, if at all."""
    return Precision(dtype)


def layout(
    scheme: Scheme, shape: tuple[int, int], dtype: torch.dtype
) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """weight uint32 [rows, cols * bits / 32]; scales and biases ``dtype`` [rows, groups]."""
    rows, cols = shape
    groups = cols // (scheme.group_size or cols)
    return {
        "weight": (torch.uint32, (rows, packed_width(cols, scheme.bits))),
        "scales": (dtype, (rows, groups)),
        "biases": (dtype, (rows, groups)),
    }


def pack(codes: UInt8[Tensor, "rows cols"], grid: Grid, dtype: torch.dtype, scheme: Scheme) -> dict[str, Tensor]:
    """codes and an offset grid, or an affine one whose -S Z ``dtype`` holds, -> the layer's tensors, in the groups of
    ``scheme``.

    Raises:
        FormatError: a non-uniform grid, or a scale or an offset that ``dtype`` would round.
    """
    if not isinstance(grid, AffineGrid | OffsetGrid) or grid.bits != scheme.bits:
        what = f"MLX holds affine grids of {scheme.bits} bits here, not {type(grid).__name__} of {grid.bits} bits"
        raise FormatError(what, None, "Use format lut for non-uniform grids")
    scale = exactly(grid.scale, dtype, "scales")
    offset = exactly(grid.offset, dtype, "offsets") if isinstance(grid, OffsetGrid) else _exact_offset(grid, dtype)
    own, size = group_columns(codes.shape[1], grid.group_size), scheme.group_size or codes.shape[1]
    if own % size:
        raise FormatError(f"groups of {size} do not divide groups of {own} columns", None, "Use a group size that does")
    tensors = {
        "weight": pack_bits(codes, scheme.bits).view(torch.uint32),
        "scales": scale.repeat_interleave(own // size, dim=1),
        "biases": offset.repeat_interleave(own // size, dim=1),
    }
    check(tensors, scheme, (codes.shape[0], codes.shape[1]), "the packed layer")
    return tensors


def _exact_offset(grid: AffineGrid, dtype: torch.dtype) -> Tensor:
    """-S Z in ``dtype``. The product of two short numbers is exact in float64; FormatError where it is not in
    ``dtype``."""
    exact = -grid.scale.double() * grid.zero_point.double()
    offset = exact.to(dtype)
    rounded = int((offset.double() != exact).sum())
    if rounded:
        kind = str(dtype).removeprefix("torch.")
        what = f"MLX stores the offset -S Z in {kind}, which rounds {rounded} of {exact.numel()} of them"
        raise FormatError(
            what, None, "Quantize with --format mlx, which learns offsets that fit, or with a _SYM scheme"
        )
    return offset


def check(tensors: dict[str, Tensor], scheme: Scheme, shape: tuple[int, int], name: str) -> None:
    """CheckpointError unless shapes and dtypes are right, scales finite and not 0, and biases finite."""
    check_layout(
        tensors, layout(scheme, shape, tensors["scales"].dtype if "scales" in tensors else torch.float32), name
    )
    check_scales(tensors["scales"], f"{name}.scales")
    if not bool(torch.isfinite(tensors["biases"]).all()):
        raise CheckpointError(
            "a bias is NaN or infinite", f"{name}.biases", "The file is damaged: quantize or copy it again"
        )


def unpack(
    tensors: dict[str, Tensor], scheme: Scheme, shape: tuple[int, int], name: str = "layer"
) -> tuple[Tensor, OffsetGrid]:
    """The layer's tensors -> (codes uint8 [rows, cols], grid in the stored groups); checked first."""
    check(tensors, scheme, shape, name)
    codes = unpack_bits(tensors["weight"].view(torch.int32), scheme.bits, shape[1])
    return codes, OffsetGrid(tensors["scales"].float(), tensors["biases"].float(), scheme.bits, scheme.group_size)


def dense(tensors: dict[str, Tensor], scheme: Scheme, shape: tuple[int, int], name: str = "layer") -> Tensor:
    """s q + b, [rows, cols], computed in float32 and rounded once to the scales' dtype, as MLX's Metal kernels do."""
    codes, grid = unpack(tensors, scheme, shape, name)
    return grid.dequantize(codes).to(tensors["scales"].dtype)


def config(scheme: Scheme, layers: list[str], ignore: list[str], dtype: torch.dtype) -> dict[str, Any]:
    """What config.json holds as ``quantization`` and once more as ``quantization_config``; which layers it is about,
    the file says."""
    return {"group_size": scheme.group_size, "bits": scheme.bits, "mode": "affine"}


def mixed_config(schemes: Mapping[str, Scheme]) -> dict[str, Any]:
    """As ``config`` for layers of several schemes: the commonest for all, the others by their layers' names."""
    common = Counter(schemes.values()).most_common(1)[0][0]
    others = {name: config(scheme, [name], [], torch.float32) for name, scheme in schemes.items() if scheme != common}
    return config(common, [], [], torch.float32) | others


def is_config(config: dict[str, Any]) -> bool:
    """Whether a ``quantization_config`` is MLX's: the only one without a method."""
    return "quant_method" not in config and "group_size" in config and "bits" in config


def scheme_of(config: dict[str, Any]) -> Scheme:
    """The scheme of the layers that a ``quantization``, ours or mlx-lm's, does not name."""
    bits, size, mode = config.get("bits"), config.get("group_size"), config.get("mode", "affine")
    if mode != "affine" or bits not in BITS or isinstance(bits, bool):
        what = f"leangrid reads MLX's mode affine at {', '.join(map(str, BITS))} bits, not {mode!r} at {bits!r}"
        raise FormatError(what, _WHERE, "Load it with mlx-lm")
    if size not in GROUPS:
        raise FormatError(
            f"group_size must be 32, 64 or 128, not {size!r}",
            _WHERE,
            "The config is damaged: quantize or copy it again",
        )
    return Scheme(grid="offset", method="leanquant", bits=bits, group_size=size)


def schemes(config: dict[str, Any], names: Iterable[str]) -> dict[str, Scheme]:
    """Layer -> scheme: its own entry, or the one for all."""
    default = scheme_of(config)
    return {name: scheme_of(config[name]) if isinstance(config.get(name), dict) else default for name in names}


def covers(config: dict[str, Any], name: str) -> bool:
    """Whether the config leaves it to the file: ``NAME.scales`` decides, unless the config says false by name."""
    return config.get(name) is not False
