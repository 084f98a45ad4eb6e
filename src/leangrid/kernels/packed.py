"""Products with packed weights: y = x W^T + bias, where W is never in memory as a whole.

Codes come in one of two layouts. Packed: i32 [rows, words], the bit stream that checkpoints store
(formats/bit_stream.py). Tiled: u8 [ceil(rows / 4), bytes], the same codes in the order in which the C++ products load
them (cpu/codes.h); only a CPU with the extension uses it. Up to ``MAX_TOKENS`` tokens a tiled weight is multiplied
straight from its codes, summing in float32. More tokens, or packed codes on a CPU, go through dense rows of W,
``DENSE_CHUNK`` weights at a time; packed codes on a GPU through Triton. W is exactly what ``kernels.plain.packed``
says, whichever way is taken.

``leangrid::lut_linear`` and ``leangrid::affine_linear`` are custom ops, so torch.compile keeps a layer in one graph."""

from collections.abc import Callable
from functools import cache
from importlib import import_module
from typing import Any

import torch
from jaxtyping import Float, Float32, Int32, Shaped, UInt8
from torch import Tensor
from torch.nn import functional

from leangrid.errors import ShapeError
from leangrid.kernels import native
from leangrid.kernels.checks import FLOATS, check_packed, check_product, check_tiles
from leangrid.kernels.choice import backend
from leangrid.kernels.plain import packed

MAX_TOKENS = 32  # multiplied from tiled codes; at 64 tokens dense rows are as fast
# Weights dequantized at once: 2^20 (4 MB in float32) stay in a processor's cache; 2^24 took twice the time at 4096 x
# 4096. A smaller layer is dequantized as a whole, and its product is then the dense layer's, bit for bit.
DENSE_CHUNK = 1 << 20

Rows = Callable[[int, int], Tensor]  # rows(start, stop) -> W[start:stop], dense


def can_tile(codes: Tensor) -> bool:
    """Whether these are packed codes on a CPU with the extension, whose products are faster from tiles."""
    return codes.dtype == torch.int32 and _is_native(codes)


def _is_native(tensor: Tensor) -> bool:
    # torch.compile traces the plain torch code instead.
    return not torch.compiler.is_compiling() and tensor.device.type == "cpu" and native.available()


def tile(words: Int32[Tensor, "rows words"], bits: int, cols: int) -> UInt8[Tensor, "tiles bytes"]:
    """Lay packed codes out in tiles, u8 [ceil(rows / 4), bytes]. ShapeError where ``words`` does not have ``cols``
    codes of ``bits`` bits a row."""
    check_packed(words, bits, cols)
    if not can_tile(words):
        return packed.tile(packed.unpack(words, bits, cols), bits)
    rows = len(words)
    tiles = torch.empty(-(-rows // packed.TILE_ROWS), packed.tile_bytes(cols, bits), dtype=torch.uint8)
    native.call("tile", words.contiguous(), tiles, rows, cols, bits)
    return tiles


def untile(tiles: UInt8[Tensor, "tiles bytes"], bits: int, rows: int, cols: int) -> Int32[Tensor, "rows words"]:
    """Lay tiled codes out as they are stored, i32 [rows, ceil(cols * bits / 32)]. ShapeError where they do not have
    this shape."""
    check_tiles(tiles, bits, rows, cols)
    if not _is_native(tiles):
        return packed.pack(packed.untile(tiles, bits, rows, cols), bits)
    words = torch.empty(rows, -(-cols * bits // 32), dtype=torch.int32)
    native.call("untile", words, tiles, rows, cols, bits)
    return words


def unpack(words: Int32[Tensor, "rows words"], bits: int, cols: int) -> UInt8[Tensor, "rows cols"]:
    """Packed codes as one byte each, u8 [rows, cols]."""
    if not can_tile(words):
        return packed.unpack(words, bits, cols)
    codes = torch.empty(len(words), cols, dtype=torch.uint8)
    if codes.numel():
        native.call("unpack", words.contiguous(), codes, len(words), cols, bits)
    return codes


def pack(codes: UInt8[Tensor, "rows cols"], bits: int) -> Int32[Tensor, "rows words"]:
    """Pack codes u8 [rows, cols], below 2^bits, into i32 [rows, ceil(cols * bits / 32)], the layout of
    formats/bit_stream.py."""
    if not codes.numel() or not _is_native(codes):
        return packed.pack(codes, bits)
    rows, cols = codes.shape
    words = torch.empty(rows, -(-cols * bits // 32), dtype=torch.int32)
    native.call("pack", words, codes.contiguous(), rows, cols, bits)
    return words


def lut_linear(x: Float[Tensor, "*batch cols"], codes: Shaped[Tensor, "lines width"], lut: Float[Tensor, "rows levels"],
               bias: Float[Tensor, "rows"] | None, bits: int) -> Float[Tensor, "*batch rows"]:  # fmt: skip
    """x W^T + bias for W[i, j] = lut[i, code[i, j]].

    Args:
        x: the input, float32, float16 or bfloat16.
        codes: packed i32 [rows, words], or tiled u8 [ceil(rows / 4), bytes].
        lut: the levels of each row, [rows, 2^bits], of x's dtype.
        bias: [rows], of x's dtype; or None.
        bits: 1..8.

    Returns:
        [..., rows] of x's dtype.

    Raises:
        ShapeError: shapes, dtypes or devices that do not fit.
    """
    check_product("lut_linear", x, codes, lut, bias, bits)
    if lut.shape[1] != 2**bits:
        raise ShapeError(f"lut_linear: {lut.shape[1]} levels at {bits} bits", "lut", f"Give {2**bits} levels a row")
    op = _lut_linear if _skips_dispatcher(x) else torch.ops.leangrid.lut_linear
    return op(x, codes, lut, bias, bits)


def affine_linear(
    x: Float[Tensor, "*batch cols"],
    codes: Shaped[Tensor, "lines width"],
    scale: Float[Tensor, "rows groups"],
    zero_point: UInt8[Tensor, "rows groups"],
    bias: Float[Tensor, "rows"] | None,
    bits: int,
    group_size: int,
    stored_dtype: torch.dtype,
) -> Float[Tensor, "*batch rows"]:
    """x W^T + bias for W[i, j] = S[i, g] (code[i, j] - Z[i, g]), g = j // group_size, rounded to ``stored_dtype``.

    Args:
        x, codes, bias, bits: as in ``lut_linear``.
        scale: S [rows, groups], of x's dtype.
        zero_point: Z, u8 [rows, groups].
        group_size: columns of a group; groups * group_size = cols.
        stored_dtype: the dtype in which other readers of the checkpoint hold W.

    Returns:
        [..., rows] of x's dtype. Raises as ``lut_linear`` does.
    """
    check_product("affine_linear", x, codes, scale, bias, bits)
    if (
        x.shape[-1] != scale.shape[1] * group_size
        or zero_point.shape != scale.shape
        or zero_point.device != scale.device
    ):
        grid = f"scale {tuple(scale.shape)}, zero_point {tuple(zero_point.shape)}"
        what = f"affine_linear: {x.shape[-1]} columns in groups of {group_size}, {grid}"
        raise ShapeError(what, "scale", "One scale and zero point for every group of columns, on one device")
    op = _affine_linear if _skips_dispatcher(x) else torch.ops.leangrid.affine_linear
    return op(x, codes, scale, zero_point, bias, bits, group_size, stored_dtype)


def lut_rows(codes: Tensor, lut: Tensor, bits: int, cols: int) -> Rows:
    """The weight of ``lut_linear`` as a function of a range of rows, which returns them dense in the LUT's dtype."""

    def in_torch(start: int, stop: int) -> Tensor:
        return packed.lut_weight(_codes(codes, bits, len(lut), cols, start, stop), lut[start:stop])

    return _rows(codes, in_torch, lambda: lut_matrix(codes, lut, None, bits, cols), (len(lut), cols), lut.dtype)


def affine_rows(
    codes: Tensor, scale: Tensor, zero_point: Tensor, bits: int, group_size: int, stored_dtype: torch.dtype
) -> Rows:
    """The weight of ``affine_linear`` as a function of a range of rows, which returns them dense in the scale's
    dtype."""
    rows, cols = len(scale), scale.shape[1] * group_size

    def in_torch(start: int, stop: int) -> Tensor:
        found = _codes(codes, bits, rows, cols, start, stop)
        return packed.affine_weight(found, scale[start:stop], zero_point[start:stop], group_size, stored_dtype)

    def in_cpp() -> Any:
        return affine_matrix(codes, scale, zero_point, None, bits, group_size, stored_dtype)

    once = scale.dtype in (torch.float32, stored_dtype)  # else W is rounded twice, which only plain torch does
    return _rows(codes, in_torch, in_cpp if once else None, (rows, cols), scale.dtype)


def offset_linear(
    x: Float[Tensor, "*batch cols"],
    words: Int32[Tensor, "rows words"],
    scale: Float[Tensor, "rows groups"],
    offset: Float[Tensor, "rows groups"],
    bias: Float[Tensor, "rows"] | None,
    bits: int,
    group_size: int,
) -> Float[Tensor, "*batch rows"]:
    """x W^T + bias for W[i, j] = S[i, g] code[i, j] + B[i, g], g = j // group_size; always through dense rows.

    Arguments, result and errors are those of ``affine_linear``; ``words`` are packed codes, ``offset`` is B [rows,
    groups] of x's dtype.
    """
    check_product("offset_linear", x, words, scale, bias, bits)
    if x.shape[-1] != scale.shape[1] * group_size or offset.shape != scale.shape or offset.device != scale.device:
        grid = f"scale {tuple(scale.shape)}, offset {tuple(offset.shape)}"
        what = f"offset_linear: {x.shape[-1]} columns in groups of {group_size}, {grid}"
        raise ShapeError(what, "scale", "One scale and offset for every group of columns, on one device")
    return _through_rows(x, offset_rows(words, scale, offset, bits, group_size), len(scale), bias)


def offset_rows(words: Tensor, scale: Tensor, offset: Tensor, bits: int, group_size: int) -> Rows:
    """The weight of ``offset_linear`` as a function of a range of rows, which returns them dense in the scale's
    dtype."""

    def rows(start: int, stop: int) -> Tensor:
        codes = unpack(words[start:stop], bits, scale.shape[1] * group_size)
        return packed.offset_weight(codes, scale[start:stop], offset[start:stop], group_size)

    return rows


def lut_matrix(codes: Tensor, lut: Tensor, bias: Tensor | None, bits: int, cols: int) -> Any:
    """The extension's object for a tiled weight W[i, j] = lut[i, code[i, j]]; it holds references to the tensors."""
    return native.module().Matrix(len(lut), cols, codes, _exact(lut), None, bits, cols, 0, _float(bias))


def affine_matrix(codes: Tensor, scale: Tensor, zero_point: Tensor, bias: Tensor | None, bits: int, group_size: int,
                  stored_dtype: torch.dtype) -> Any:  # fmt: skip
    """As ``lut_matrix``, for a tiled weight of ``affine_linear``."""
    cols = scale.shape[1] * group_size
    values, zeros, rounding = _exact(scale), zero_point.contiguous(), FLOATS[stored_dtype]
    return native.module().Matrix(len(scale), cols, codes, values, zeros, bits, group_size, rounding, _float(bias))


def dense_matrix(weight: Float[Tensor, "rows cols"], bias: Tensor | None) -> Any:
    """As ``lut_matrix``, for a plain weight in float32 or bfloat16."""
    return native.module().Matrix(*weight.shape, None, weight.contiguous(), None, 0, 1, 0, _float(bias))


def can_step() -> bool:
    """Whether ``new_step`` works here: it needs the extension."""
    return native.available()


def new_step(
    hidden: int,
    intermediate: int,
    heads: int,
    kv_heads: int,
    head_dim: int,
    capacity: int,
    epsilon: float,
    scaling: float,
) -> Any:
    """Make the extension's forward pass of one token through a Llama-like decoder (cpu/step.h), still without blocks.

    Args:
        hidden, intermediate, heads, kv_heads, head_dim: sizes from the model's config.
        capacity: positions that the key-value cache holds.
        epsilon: of RMSNorm.
        scaling: of the attention scores.
    """
    return native.module().Step(hidden, intermediate, heads, kv_heads, head_dim, capacity, epsilon, scaling)


def run_step(
    step: Any,
    x: Float32[Tensor, "hidden"],
    cos: Float32[Tensor, "head_dim"],
    sin: Float32[Tensor, "head_dim"],
    position: int,
    logits: Float32[Tensor, "vocab"],
) -> None:
    """Run one token, whose embedding is x, through the decoder ``step``: its ``logits`` are written in place, its keys
    and values into the cache at ``position``."""
    step.run(native.isa(), torch.get_num_threads(), x, cos, sin, position, logits)


def _exact(values: Tensor) -> Tensor:
    return (values.float() if values.dtype == torch.float16 else values).contiguous()


def _float(bias: Tensor | None) -> Tensor | None:
    return None if bias is None else bias.detach().float().contiguous()


def _rows(
    codes: Tensor, in_torch: Rows, in_cpp: Callable[[], Any] | None, shape: tuple[int, int], dtype: torch.dtype
) -> Rows:
    """Dense rows by the extension, from the matrix that ``in_cpp`` makes, where codes are tiled; else by torch."""
    if in_cpp is None or codes.dtype != torch.uint8 or not _is_native(codes):
        return in_torch
    matrix, (rows, cols) = in_cpp(), shape

    def dense(start: int, stop: int) -> Tensor:
        first, last = start // 4 * 4, min(-(-stop // 4) * 4, rows)  # whole tiles
        out = torch.empty(last - first, cols, dtype=torch.float32 if dtype == torch.float16 else dtype)
        native.call("dense", matrix, out, first)
        return out[start - first : stop - first].to(dtype)

    return dense


def _codes(codes: Tensor, bits: int, rows: int, cols: int, start: int, stop: int) -> Tensor:
    """Rows start..stop of packed or tiled codes, u8 [stop - start, cols]."""
    if codes.dtype == torch.int32:
        return unpack(codes[start:stop], bits, cols)
    first, last = start // 4, -(-stop // 4)  # whole tiles of four rows
    found = packed.untile(codes[first:last], bits, min(4 * last, rows) - 4 * first, cols)
    return found[start - 4 * first : stop - 4 * first]


def _skips_dispatcher(x: Tensor) -> bool:
    """Whether x is a plain tensor outside of torch.compile, for which the op's body is called without torch's
    dispatcher and its overhead."""
    return type(x) is Tensor and x.device.type in ("cpu", "cuda") and not torch.compiler.is_compiling()


def _lut_linear(x: Tensor, codes: Tensor, lut: Tensor, bias: Tensor | None, bits: int) -> Tensor:
    if triton := _triton("lut_linear", x, codes, bits):
        return _with_bias(triton(_flat(x), codes, lut, bits), x, bias)
    cols = x.shape[-1]
    if _tiled_product_applies(x, codes):
        return _product(lut_matrix(codes, lut, bias, bits, cols), x, len(lut))
    return _through_rows(x, lut_rows(codes, lut, bits, cols), len(lut), bias)


def _affine_linear(x: Tensor, codes: Tensor, scale: Tensor, zero_point: Tensor, bias: Tensor | None, bits: int,
                   group_size: int, stored_dtype: torch.dtype) -> Tensor:  # fmt: skip
    once = scale.dtype in (torch.float32, stored_dtype)  # else W is rounded twice
    if once and (triton := _triton("affine_linear", x, codes, bits)):
        return _with_bias(triton(_flat(x), codes, scale, zero_point, bits, group_size, stored_dtype), x, bias)
    if _tiled_product_applies(x, codes) and once:
        return _product(affine_matrix(codes, scale, zero_point, bias, bits, group_size, stored_dtype), x, len(scale))
    return _through_rows(x, affine_rows(codes, scale, zero_point, bits, group_size, stored_dtype), len(scale), bias)


def _triton(name: str, x: Tensor, codes: Tensor, bits: int) -> Callable[..., Tensor] | None:
    """The Triton kernel of this op where it runs here for such codes, else None."""
    return _kernel(name, bits) if codes.dtype == torch.int32 and backend(x.device) == "triton" else None


@cache
def _kernel(name: str, bits: int) -> Callable[..., Tensor] | None:
    found = bits in import_module("leangrid.kernels.triton.packed").PACKET
    return getattr(import_module(f"leangrid.kernels.triton.{name}"), name) if found else None


def _flat(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])


def _with_bias(out: Tensor, x: Tensor, bias: Tensor | None) -> Tensor:
    return (out if bias is None else out + bias).view(*x.shape[:-1], out.shape[1])


def _tiled_product_applies(x: Tensor, codes: Tensor) -> bool:
    return codes.dtype == torch.uint8 and 1 <= x.numel() // x.shape[-1] <= MAX_TOKENS and _is_native(x)


def _product(matrix: Any, x: Tensor, rows: int) -> Tensor:
    """x W^T + bias from a tiled weight: float16 inputs are multiplied in float32."""
    flat = _flat(x.float() if x.dtype == torch.float16 else x).detach().contiguous()
    out = torch.empty(len(flat), rows)
    native.call("product", matrix, flat, out)
    return out.to(x.dtype).view(*x.shape[:-1], rows)


def _through_rows(x: Tensor, weight: Rows, rows: int, bias: Tensor | None) -> Tensor:
    """x W^T + bias with some rows of W dequantized at a time, whole tiles of four."""
    step = max(4, DENSE_CHUNK // x.shape[-1] // 4 * 4)
    if step >= rows:
        return functional.linear(x, weight(0, rows), bias)
    out = x.new_empty(*x.shape[:-1], rows)
    for start in range(0, rows, step):
        stop = min(start + step, rows)
        out[..., start:stop] = functional.linear(x, weight(start, stop), None if bias is None else bias[start:stop])
    return out


def _fake(x: Tensor, codes: Tensor, values: Tensor, *rest: Any) -> Tensor:
    return x.new_empty(*x.shape[:-1], values.shape[0])


_LIBRARY = torch.library.Library("leangrid", "DEF")
_LIBRARY.define("lut_linear(Tensor x, Tensor codes, Tensor lut, Tensor? bias, int bits) -> Tensor")
_LIBRARY.define(
    "affine_linear(Tensor x, Tensor codes, Tensor scale, Tensor zero_point, Tensor? bias, int bits, int group_size, "
    "ScalarType stored_dtype) -> Tensor"
)
for _name, _body in (("lut_linear", _lut_linear), ("affine_linear", _affine_linear)):
    _LIBRARY.impl(_name, _body, "CompositeExplicitAutograd")
    torch.library.register_fake(f"leangrid::{_name}", _fake, lib=_LIBRARY)
