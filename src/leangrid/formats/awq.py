"""The AWQ GEMM container: w = S (q - Z), 4 bits, packed along the rows with interleaved nibbles.

Source: GPTQModel 7.6, quantization/awq/utils/packing_utils.py, which transformers calls. docs/formats.md has the layout
and what its readers accept."""

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import UInt8
from torch import Tensor

from leangrid.errors import FormatError
from leangrid.formats.base import CONFIG, Format, Layout
from leangrid.formats.bit_stream import pack as pack_bits
from leangrid.formats.bit_stream import unpack as unpack_bits
from leangrid.formats.checks import (
    affine_grid,
    affine_only,
    cast_exactly_to_half,
    check_layout,
    check_scales,
    half_precision,
    no_conv1d,
    scheme_in_groups,
    uneven_groups,
)
from leangrid.grids import AffineGrid, Grid, Precision
from leangrid.schemes import Scheme

BITS, ROWS_A_WORD = 4, 8
GROUPS = (128, 64, 32)  # columns; what all of its readers accept
ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # nibble i of a word holds row ORDER[i] of its eight
_INVERSE_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)


class Awq(Format):
    """Integer zero points and float16 scales by groups of columns."""

    NAME = "awq"
    QUANT_METHOD = "awq"

    def refuse(self, scheme: Scheme, name: str, rows: int, cols: int, kind: str = "linear") -> str | None:
        """Anything but 4-bit affine grids of nn.Linear; rows that do not fill words; columns that no group of 128, 64
        or 32 divides."""
        bits, size = scheme.bits, scheme.group_size
        if scheme.grid != "affine":
            return affine_only(self.NAME, name, bits, "W4A16_G128")
        if kind == "conv1d":
            return no_conv1d(name, "and readers of awq know nn.Linear only", BITS)
        if bits != BITS:
            others = "gptq or compressed-tensors" if bits in (2, 3, 8) else "compressed-tensors or mlx"
            return f"{name}: awq holds 4 bits, not {bits}. Use format {others} for {bits} bits, or scheme W4A16"
        if rows % ROWS_A_WORD:
            what = f"{name}: its {rows} rows do not fill words of {ROWS_A_WORD}, as awq asks"
            return f"{what}. Use format compressed-tensors"
        if uneven := uneven_groups(name, scheme, cols):
            return uneven
        if (size or cols) % GROUPS[-1]:
            what = f"groups of {size}" if size else f"its {cols} columns"
            return (
                f"{name}: {what} are no multiple of 32, the least group of awq. Use format gptq or compressed-tensors"
            )
        return None

    def stored_scheme(self, scheme: Scheme, columns: set[int]) -> Scheme:
        """In groups of 128, 64 or 32, the largest that divides the scheme's own: longer groups are repeated."""
        return scheme_in_groups(scheme, columns, GROUPS)

    def precision(self, dtype: torch.dtype) -> Precision:
        """Scales exact in float16, as they are stored, and in ``dtype``, to which readers convert them."""
        return half_precision(dtype)

    def layout(self, scheme: Scheme, shape: tuple[int, int], dtype: torch.dtype) -> Layout:
        """qweight int32 [cols, rows / 8], qzeros int32 [groups, rows / 8], scales float16 [groups, rows]."""
        rows, cols = shape
        groups = cols // (scheme.group_size or cols)
        return {
            "qweight": (torch.int32, (cols, rows // ROWS_A_WORD)),
            "qzeros": (torch.int32, (groups, rows // ROWS_A_WORD)),
            "scales": (torch.float16, (groups, rows)),
        }

    def pack(
        self, codes: UInt8[Tensor, "rows cols"], grid: Grid, dtype: torch.dtype, scheme: Scheme
    ) -> dict[str, Tensor]:
        """Of an affine grid, scale and zero_point [rows, groups], in the groups of ``scheme``. FormatError for another
        grid, or where float16 or ``dtype`` rounds a scale."""
        grid = affine_grid(grid, scheme, self.NAME).regrouped(codes.shape[1], scheme.group_size)
        tensors = {
            "qweight": _pack_words(codes.T),
            "qzeros": _pack_words(grid.zero_point.T),
            "scales": cast_exactly_to_half(grid.scale, dtype).T.contiguous(),
        }
        self.check(tensors, scheme, (codes.shape[0], codes.shape[1]), "the packed layer")
        return tensors

    def check(self, tensors: dict[str, Tensor], scheme: Scheme, shape: tuple[int, int], name: str) -> None:
        """Shapes and dtypes; scales finite and not 0."""
        check_layout(tensors, self.layout(scheme, shape, torch.float16), name)
        check_scales(tensors["scales"], f"{name}.scales")

    def unpack(
        self, tensors: dict[str, Tensor], scheme: Scheme, shape: tuple[int, int], name: str = "layer"
    ) -> tuple[Tensor, AffineGrid]:
        """(codes uint8 [rows, cols], grid)."""
        self.check(tensors, scheme, shape, name)
        codes = _unpack_words(tensors["qweight"], shape[0]).T.contiguous()
        zero_point = _unpack_words(tensors["qzeros"], shape[0]).T.contiguous()
        return codes, AffineGrid(tensors["scales"].float().T.contiguous(), zero_point, scheme.bits, scheme.group_size)

    def weight_dtype(self, tensors: dict[str, Tensor]) -> torch.dtype:
        """float16."""
        return torch.float16

    def config(self, schemes: Mapping[str, Scheme], ignore: list[str]) -> dict[str, Any]:
        """Every nn.Linear that is not quantized must be named in ``ignore``."""
        scheme = self.only_scheme(schemes)
        return {
            "quant_method": self.QUANT_METHOD,
            "version": "gemm",
            "bits": scheme.bits,
            "group_size": scheme.group_size or -1,
            "zero_point": True,
            "modules_to_not_convert": list(ignore) or None,
        }

    def scheme_of(self, config: dict[str, Any]) -> Scheme:
        """Of an entry of ours or of another tool. Z is always stored, so no scheme is symmetric."""
        bits, size, version = config.get("bits"), config.get("group_size"), config.get("version", "gemm")
        if (
            bits != BITS
            or not (size == -1 or size in GROUPS)
            or str(version).lower() != "gemm"
            or config.get("zero_point", True) is not True
        ):
            what = f"leangrid does not read awq {version!r} of {bits!r} bits in groups of {size!r}"
            raise FormatError(
                what, CONFIG, "leangrid reads version gemm, 4 bits, groups of 128, 64, 32 or -1, with zero points"
            )
        return Scheme(grid="affine", method="leanquant", bits=BITS, group_size=None if size == -1 else size)

    def covers(self, config: dict[str, Any], name: str) -> bool:
        """Whether ``name`` is neither in ``modules_to_not_convert`` nor the output head; the file decides then."""
        return name not in (config.get("modules_to_not_convert") or ()) and name.rpartition(".")[2] != "lm_head"


def _pack_words(values: UInt8[Tensor, "n rows"]) -> Tensor:
    """int32 [n, rows / 8]: eight neighbours to a word, in nibble i the row ORDER[i] of them."""
    n, rows = values.shape
    return pack_bits(values.reshape(n, -1, ROWS_A_WORD)[..., list(ORDER)].reshape(n, rows).contiguous(), BITS)


def _unpack_words(words: Tensor, rows: int) -> UInt8[Tensor, "n rows"]:
    """The inverse of ``_pack_words``."""
    nibbles = unpack_bits(words, BITS, rows).reshape(len(words), -1, ROWS_A_WORD)
    return nibbles[..., list(_INVERSE_ORDER)].reshape(len(words), rows)
