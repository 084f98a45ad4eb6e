"""MLX's affine container: w = s q + b per group of columns, read by mlx-lm.

Source: mlx 0.32, ``mx.quantize`` and ``mx.dequantize`` (ops.cpp, backend/*/quantized*), and mlx-lm 0.32,
``load_model``. mlx-lm takes a layer for quantized where the weights hold ``NAME.scales``; config.json says the bits and
the group size once for all layers, and by name for those that differ. docs/formats.md has the layout and what each of
MLX's kernels rounds."""

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from leangrid.errors import CheckpointError, FormatError
from leangrid.formats.base import DAMAGED_CONFIG, Format, Layout
from leangrid.formats.bit_stream import pack as pack_bits
from leangrid.formats.bit_stream import packed_width
from leangrid.formats.bit_stream import unpack as unpack_bits
from leangrid.formats.checks import (
    DAMAGED,
    affine_only,
    cast_exactly,
    check_layout,
    check_scales,
    no_conv1d,
    scheme_in_groups,
    uneven_groups,
)
from leangrid.grids import AffineGrid, Grid, OffsetGrid
from leangrid.grids.base import group_columns
from leangrid.schemes import Scheme
from leangrid.storage.dtypes import torch_name

GROUPS = (128, 64, 32)  # columns; what MLX's kernels are built for
BITS = (2, 3, 4, 5, 6, 8)
_WHERE = "config.json: quantization"


class Mlx(Format):
    """A scale and an offset, both in the model's dtype, for each group of columns."""

    NAME = "mlx"
    QUANT_METHOD = "mlx"  # not written: MLX's entry has no quant_method, and transformers refuses it for that
    CONFIG_KEYS = ("quantization", "quantization_config")  # mlx-lm looks under the first
    MARK = "scales"
    AUTO_GROUPS = GROUPS  # whole rows are stored in groups too, so that narrower ones cost nothing

    def refuse(self, scheme: Scheme, name: str, rows: int, cols: int, kind: str = "linear") -> str | None:
        """Non-uniform grids, GPT-2's Conv1D (mlx-lm transposes it after reading) and groups that no group of 128, 64 or
        32 divides."""
        bits, size = scheme.bits, scheme.group_size
        if scheme.grid == "nonuniform":
            return affine_only("MLX", name, bits, f"W{bits}A16_G64")
        if kind == "conv1d":
            return no_conv1d(name, "which mlx-lm transposes after reading", bits)
        if uneven := uneven_groups(name, scheme, cols):
            return uneven
        if (size or cols) % GROUPS[-1]:
            fits = next(
                (f"scheme W{bits}A16_G{group}" for group in GROUPS if cols % group == 0), "format compressed-tensors"
            )
            what = f"groups of {size}" if size else f"its {cols} columns"
            return f"{name}: {what} are no multiple of 32, the least group of MLX. Use {fits}"
        return None

    def stored_scheme(self, scheme: Scheme, columns: set[int]) -> Scheme:
        """In groups of 128, 64 or 32, the largest that divides the scheme's own: longer groups are repeated."""
        return scheme_in_groups(scheme, columns, GROUPS)

    def layout(self, scheme: Scheme, shape: tuple[int, int], dtype: torch.dtype) -> Layout:
        """weight uint32 [rows, cols b / 32]; scales and biases ``dtype`` [rows, groups]."""
        rows, cols = shape
        groups = cols // (scheme.group_size or cols)
        return {
            "weight": (torch.uint32, (rows, packed_width(cols, scheme.bits))),
            "scales": (dtype, (rows, groups)),
            "biases": (dtype, (rows, groups)),
        }

    def pack(
        self, codes: UInt8[Tensor, "rows cols"], grid: Grid, dtype: torch.dtype, scheme: Scheme
    ) -> dict[str, Tensor]:
        """Of an offset grid, or an affine one whose -S Z ``dtype`` holds, in the groups of ``scheme``. FormatError for
        another grid, or where ``dtype`` rounds a scale or an offset."""
        if not isinstance(grid, AffineGrid | OffsetGrid) or grid.bits != scheme.bits:
            what = f"MLX holds affine grids of {scheme.bits} bits here, not {type(grid).__name__} of {grid.bits} bits"
            raise FormatError(what, None, "Use format lut for non-uniform grids")
        scale = cast_exactly(grid.scale, dtype, "scales")
        offset = (
            cast_exactly(grid.offset, dtype, "offsets") if isinstance(grid, OffsetGrid) else _exact_offset(grid, dtype)
        )
        own, size = group_columns(codes.shape[1], grid.group_size), scheme.group_size or codes.shape[1]
        if own % size:
            what = f"groups of {size} do not divide groups of {own} columns"
            raise FormatError(what, None, "Use a group size that does")
        tensors = {
            "weight": pack_bits(codes, scheme.bits).view(torch.uint32),
            "scales": scale.repeat_interleave(own // size, dim=1),
            "biases": offset.repeat_interleave(own // size, dim=1),
        }
        self.check(tensors, scheme, (codes.shape[0], codes.shape[1]), "the packed layer")
        return tensors

    def check(self, tensors: dict[str, Tensor], scheme: Scheme, shape: tuple[int, int], name: str) -> None:
        """Shapes and dtypes, scales finite and not 0, biases finite."""
        dtype = tensors["scales"].dtype if "scales" in tensors else torch.float32
        check_layout(tensors, self.layout(scheme, shape, dtype), name)
        check_scales(tensors["scales"], f"{name}.scales")
        if not bool(torch.isfinite(tensors["biases"]).all()):
            raise CheckpointError("a bias is NaN or infinite", f"{name}.biases", DAMAGED)

    def unpack(
        self, tensors: dict[str, Tensor], scheme: Scheme, shape: tuple[int, int], name: str = "layer"
    ) -> tuple[Tensor, OffsetGrid]:
        """(codes uint8 [rows, cols], grid in the stored groups)."""
        self.check(tensors, scheme, shape, name)
        codes = unpack_bits(tensors["weight"].view(torch.int32), scheme.bits, shape[1])
        return codes, OffsetGrid(tensors["scales"].float(), tensors["biases"].float(), scheme.bits, scheme.group_size)

    def weight_dtype(self, tensors: dict[str, Tensor]) -> torch.dtype:
        """The scales': MLX's Metal kernels compute s q + b in float32 and round once to it."""
        return tensors["scales"].dtype

    def config(self, schemes: Mapping[str, Scheme], ignore: list[str]) -> dict[str, Any]:
        """The commonest scheme for all layers, and the others by their layers' names. Which linears are quantized, the
        file says."""
        common = Counter(schemes.values()).most_common(1)[0][0]
        others = {name: _entry(scheme) for name, scheme in schemes.items() if scheme != common}
        return _entry(common) | others

    def is_config(self, config: dict[str, Any]) -> bool:
        """The only entry without a method."""
        return "quant_method" not in config and "group_size" in config and "bits" in config

    def scheme_of(self, config: dict[str, Any]) -> Scheme:
        """Of the layers that an entry, ours or mlx-lm's, does not name."""
        bits, size, mode = config.get("bits"), config.get("group_size"), config.get("mode", "affine")
        if mode != "affine" or bits not in BITS or isinstance(bits, bool):
            what = f"leangrid reads MLX's mode affine at {', '.join(map(str, BITS))} bits, not {mode!r} at {bits!r}"
            raise FormatError(what, _WHERE, "Load it with mlx-lm")
        if size not in GROUPS:
            raise FormatError(f"group_size must be 32, 64 or 128, not {size!r}", _WHERE, DAMAGED_CONFIG)
        return Scheme(grid="offset", method="leanquant", bits=bits, group_size=size)

    def schemes(self, config: dict[str, Any], names: Iterable[str]) -> dict[str, Scheme]:
        """Each layer's own entry, or the one for all."""
        default = self.scheme_of(config)
        return {name: self.scheme_of(config[name]) if isinstance(config.get(name), dict) else default for name in names}

    def covers(self, config: dict[str, Any], name: str) -> bool:
        """Every linear, unless the entry says false by its name; the file decides then."""
        return config.get(name) is not False


def _exact_offset(grid: AffineGrid, dtype: torch.dtype) -> Float[Tensor, "rows groups"]:
    """-S Z in ``dtype``; FormatError where that rounds it. The product of two short numbers is exact in float64."""
    exact = -grid.scale.double() * grid.zero_point.double()
    offset = exact.to(dtype)
    rounded = int((offset.double() != exact).sum())
    if rounded:
        what = f"MLX stores the offset -S Z in {torch_name(dtype)}, which rounds {rounded} of {exact.numel()} of them"
        raise FormatError(
            what, None, "Quantize with --format mlx, which learns offsets that fit, or with a _SYM scheme"
        )
    return offset


def _entry(scheme: Scheme) -> dict[str, Any]:
    return {"group_size": scheme.group_size, "bits": scheme.bits, "mode": "affine"}
