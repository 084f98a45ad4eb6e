"""The AWQ GEMM container: w = S (q - Z), 4 bits, packed along the rows with interleaved nibbles.

Source: GPTQModel 7.6, quantization/awq/utils/packing_utils.py, which transformers calls (docs/formats.md has the layout
and the limits)."""

from typing import Any

import torch
from jaxtyping import UInt8
from torch import Tensor

from leangrid.errors import FormatError
from leangrid.formats.bit_stream import pack as pack_bits
from leangrid.formats.bit_stream import unpack as unpack_bits
from leangrid.formats.checks import check_layout, check_scales, exactly_in_half, half_precision, repeated, stored_groups
from leangrid.grids import AffineGrid, Grid, Precision
from leangrid.recipe import Scheme

QUANT_METHOD: str = "awq"
BITS, ROWS_A_WORD = 4, 8
GROUPS = (128, 64, 32)  # what all of its readers take
ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # nibble i of a word holds row ORDER[i] of its eight
_BACK = (0, 4, 1, 5, 2, 6, 3, 7)
_WHERE = "config.json: quantization_config"


def refuse(scheme: Scheme, name: str, rows: int, cols: int, kind: str = "linear") -> str | None:
    """Anything but 4-bit affine grids of nn.Linear, rows that do not fill words, columns that no group of 128, 64 or 32
    divides."""
    bits, size = scheme.bits, scheme.group_size
    if scheme.grid != "affine":
        return f"{name}: awq holds affine grids only. Use format lut for NU{bits}, or scheme W4A16_G128"
    if kind == "conv1d":
        return f"{name} is a Conv1D, and readers of awq know nn.Linear only. Use scheme NU4 (format lut)"
    if bits != BITS:
        others = "gptq or compressed-tensors" if bits in (2, 3, 8) else "compressed-tensors or mlx"
        return f"{name}: awq holds 4 bits, not {bits}. Use format {others} for {bits} bits, or scheme W4A16"
    if rows % ROWS_A_WORD:
        return f"{name}: its {rows} rows do not fill words of {ROWS_A_WORD}, as awq asks. Use format compressed-tensors"
    if cols % (size or cols):
        return (
            f"{name}: groups of {size} do not divide its {cols} columns. Use a group that does, or whole rows (no _G)"
        )
    if (size or cols) % GROUPS[-1]:
        what = f"groups of {size}" if size else f"its {cols} columns"
        return f"{name}: {what} are no multiple of 32, the least group of awq. Use format gptq or compressed-tensors"
    return None


def stored(scheme: Scheme, columns: set[int]) -> Scheme:
    """In groups of 128, 64 or 32, the largest that divides the scheme's own: whole rows and longer groups are
    repeated."""
    return repeated(scheme, columns, GROUPS)


def precision(dtype: torch.dtype) -> Precision:
    """Scales exact in float16, as they are stored, and in ``dtype``, as readers convert them."""
    return half_precision(dtype)


def layout(
    scheme: Scheme, shape: tuple[int, int], dtype: torch.dtype
) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """qweight int32 [cols, rows / 8], qzeros int32 [groups, rows / 8], scales float16 [groups, rows]."""
    rows, cols = shape
    groups = cols // scheme.group_size if scheme.group_size else 1
    return {
        "qweight": (torch.int32, (cols, rows // ROWS_A_WORD)),
        "qzeros": (torch.int32, (groups, rows // ROWS_A_WORD)),
        "scales": (torch.float16, (groups, rows)),
    }


def pack(codes: UInt8[Tensor, "rows cols"], grid: Grid, dtype: torch.dtype, scheme: Scheme) -> dict[str, Tensor]:
    """codes and a grid with scale, zero_point [rows, groups] -> the layer's tensors, in the groups of ``scheme``.

    Raises:
        FormatError: a grid of another kind, or a scale that float16 or ``dtype`` would round.
    """
    grid = stored_groups(grid, scheme, codes.shape[1], "awq")
    if scheme.symmetric and not bool((grid.zero_point == scheme.levels // 2).all()):
        raise FormatError(
            "a symmetric scheme needs every zero point in the middle", None, "Use the scheme without _SYM"
        )
    tensors = {
        "qweight": _words(codes.T),
        "qzeros": _words(grid.zero_point.T),
        "scales": exactly_in_half(grid.scale, dtype).T.contiguous(),
    }
    check(tensors, scheme, (codes.shape[0], codes.shape[1]), "the packed layer")
    return tensors


def check(tensors: dict[str, Tensor], scheme: Scheme, shape: tuple[int, int], name: str) -> None:
    """CheckpointError unless shapes and dtypes are right, and scales finite and not 0."""
    check_layout(tensors, layout(scheme, shape, torch.float16), name)
    check_scales(tensors["scales"], f"{name}.scales")


def unpack(
    tensors: dict[str, Tensor], scheme: Scheme, shape: tuple[int, int], name: str = "layer"
) -> tuple[Tensor, AffineGrid]:
    """The layer's tensors -> (codes uint8 [rows, cols], grid); checked first."""
    check(tensors, scheme, shape, name)
    rows = shape[0]
    scale, zero_point = tensors["scales"].float().T.contiguous(), _nibbles(tensors["qzeros"], rows).T.contiguous()
    return _nibbles(tensors["qweight"], rows).T.contiguous(), AffineGrid(
        scale, zero_point, scheme.bits, scheme.group_size
    )


def dense(tensors: dict[str, Tensor], scheme: Scheme, shape: tuple[int, int], name: str = "layer") -> Tensor:
    """S (q - Z), [rows, cols], rounded once to float16."""
    codes, grid = unpack(tensors, scheme, shape, name)
    return grid.dequantize(codes).half()


def config(scheme: Scheme, layers: list[str], ignore: list[str], dtype: torch.dtype) -> dict[str, Any]:
    """``quantization_config``; every nn.Linear that is not quantized must be named in ``ignore``."""
    return {
        "quant_method": QUANT_METHOD,
        "version": "gemm",
        "bits": scheme.bits,
        "group_size": scheme.group_size or -1,
        "zero_point": True,
        "modules_to_not_convert": list(ignore) or None,
    }


def scheme_of(config: dict[str, Any]) -> Scheme:
    """The scheme of a ``quantization_config``, ours or another tool's. Z is always stored, so none is symmetric."""
    bits, size, version = config.get("bits"), config.get("group_size"), config.get("version", "gemm")
    if (
        bits != BITS
        or not (size == -1 or size in GROUPS)
        or str(version).lower() != "gemm"
        or config.get("zero_point", True) is not True
    ):
        what = f"leangrid does not read awq {version!r} of {bits!r} bits in groups of {size!r}"
        raise FormatError(
            what, _WHERE, "leangrid reads version gemm, 4 bits, groups of 128, 64, 32 or -1, with zero points"
        )
    return Scheme(grid="affine", method="leanquant", bits=BITS, group_size=None if size == -1 else size)


def covers(config: dict[str, Any], name: str) -> bool:
    """Whether no entry of ``modules_to_not_convert`` is ``name``; which linears are stored quantized, the file itself
    says."""
    return name not in (config.get("modules_to_not_convert") or ()) and name.rpartition(".")[2] != "lm_head"


def _words(values: UInt8[Tensor, "n rows"]) -> Tensor:
    """int32 [n, rows / 8]: eight neighbours to a word, nibble i from place ORDER[i]."""
    n, rows = values.shape
    return pack_bits(values.reshape(n, -1, ROWS_A_WORD)[..., list(ORDER)].reshape(n, rows).contiguous(), BITS)


def _nibbles(words: Tensor, rows: int) -> Tensor:
    """The inverse of ``_words``."""
    return (
        unpack_bits(words, BITS, rows).reshape(len(words), -1, ROWS_A_WORD)[..., list(_BACK)].reshape(len(words), rows)
    )
