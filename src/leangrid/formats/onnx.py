"""ONNX Runtime's operator ``com.microsoft.MatMulNBits``: w = S (q - Z) by blocks of columns, 2, 4 or 8 bits.

Source: ONNX Runtime's operator reference (docs/ContribOperators.md). docs/formats.md has the layout;
tests/interop/test_onnx.py compares it with the CPU kernel."""

import torch
from jaxtyping import Float32, UInt8
from torch import Tensor

from leangrid.errors import FormatError
from leangrid.grids import AffineGrid, Grid
from leangrid.schemes import Scheme

BITS = (2, 4, 8)
BLOCKS = (256, 128, 64, 32, 16)  # columns: powers of two, as the kernels take them


def block_size(scheme: Scheme, cols: int) -> int | None:
    """Columns of a block: the scheme's group, or for whole rows the largest block that divides a row; None where the
    operator has no such block."""
    if scheme.group_size:
        return scheme.group_size if scheme.group_size in BLOCKS and cols % scheme.group_size == 0 else None
    return next((block for block in BLOCKS if cols % block == 0), None)


def refuse(scheme: Scheme, name: str, rows: int, cols: int, kind: str = "linear") -> str | None:
    """Non-uniform grids, 3 bits, GPT-2's Conv1D, and groups that are no power of two from 16 to 256."""
    if scheme.grid != "affine":
        instead = f"Use scheme W{scheme.bits}A16, or serve NU{scheme.bits} with transformers"
        return f"{name}: MatMulNBits holds affine grids only. {instead}"
    if scheme.bits not in BITS:
        return (
            f"{name}: ONNX Runtime computes 2, 4 or 8 bits, not {scheme.bits}. Use W4A16, or format compressed-tensors"
        )
    if kind == "conv1d":
        return f"{name} is a Conv1D, which the graph builder does not know. Serve the model with transformers"
    if block_size(scheme, cols) is None:
        group = f"groups of {scheme.group_size}" if scheme.group_size else "whole rows"
        what = f"{name}: {group} of {cols} columns are no blocks of {', '.join(map(str, BLOCKS))}"
        return f"{what}. Use _G64 or _G32 if it divides {cols}"
    return None


def layout(scheme: Scheme, shape: tuple[int, int]) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """The operator's inputs for a layer that ``refuse`` does not refuse, in their order: ``B`` uint8 [rows, blocks,
    block bits / 8], ``scales`` float32 [rows, blocks] and, unless the scheme is symmetric, ``zero_points`` uint8 [rows,
    ceil(blocks bits / 8)]."""
    rows, cols = shape
    block = block_size(scheme, cols) or cols
    blocks = cols // block
    inputs: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {
        "B": (torch.uint8, (rows, blocks, block * scheme.bits // 8)),
        "scales": (torch.float32, (rows, blocks)),
    }
    return (
        inputs if scheme.symmetric else inputs | {"zero_points": (torch.uint8, (rows, -(-blocks * scheme.bits // 8)))}
    )


def pack(codes: UInt8[Tensor, "rows cols"], grid: Grid, scheme: Scheme) -> dict[str, Tensor]:
    """The inputs of ``layout``, by name, lowest bits first. A symmetric layer has no zero points: the operator's
    default is 2^(bits-1).

    Raises:
        FormatError: the grid is not affine, or the operator has no such bits or blocks.
    """
    rows, cols = codes.shape
    block = block_size(scheme, cols)
    if not isinstance(grid, AffineGrid) or grid.bits != scheme.bits or block is None or scheme.bits not in BITS:
        raise FormatError(
            f"MatMulNBits does not hold {type(grid).__name__} of {scheme.bits} bits here",
            None,
            "Use format compressed-tensors",
        )
    grid = grid.regrouped(cols, block)  # of whole rows: every block has the row's scale and zero point
    tensors = {
        "B": _pack_bytes(codes.reshape(rows * (cols // block), block), scheme.bits).reshape(rows, cols // block, -1),
        "scales": grid.scale.contiguous(),
    }
    if not scheme.symmetric:
        tensors["zero_points"] = _pack_bytes(grid.zero_point, scheme.bits)
    return tensors


def dense(tensors: dict[str, Tensor], scheme: Scheme, cols: int) -> Float32[Tensor, "rows cols"]:
    """The weight S (q - Z) in float32, as the operator computes it: not rounded to the model's dtype."""
    rows, blocks, _ = tensors["B"].shape
    codes = (
        _unpack_bytes(tensors["B"].reshape(rows * blocks, -1), scheme.bits, cols // blocks)
        .reshape(rows, blocks, -1)
        .float()
    )
    middle = torch.full((rows, blocks), scheme.levels // 2, dtype=torch.uint8)
    zero = _unpack_bytes(tensors["zero_points"], scheme.bits, blocks) if "zero_points" in tensors else middle
    return ((codes - zero[..., None].float()) * tensors["scales"][..., None]).reshape(rows, cols)


def _pack_bytes(codes: UInt8[Tensor, "lines n"], bits: int) -> UInt8[Tensor, "lines bytes"]:
    """Codes of each line side by side in bytes, the first in the lowest bits; the last byte is filled with 0."""
    each = 8 // bits
    padded = torch.nn.functional.pad(codes, (0, -codes.shape[1] % each)).reshape(len(codes), -1, each)
    out = torch.zeros(padded.shape[:2], dtype=torch.uint8)
    for place in range(each):
        out |= padded[..., place] << (place * bits)
    return out


def _unpack_bytes(packed: UInt8[Tensor, "lines bytes"], bits: int, count: int) -> UInt8[Tensor, "lines n"]:
    """The ``count`` codes of each line."""
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8)
    return (packed[..., None] >> shifts & (2**bits - 1)).reshape(len(packed), -1)[:, :count]
