"""Kernels: the inner loops of the grid search and of the solver, on plain tensors.

Every op here checks its input (ShapeError), then runs in the C++ extension ``leangrid.kernels._cpu`` (CPU tensors), in
Triton (CUDA tensors) or in its torch twin (where those are missing). Rows never interact, so threads split rows and the
number of threads never changes a bit. ``LEANGRID_KERNELS=torch|portable|avx2|avx512|triton`` overrides the choice of
path (kernels/choice.py).

C++ gives the bits of the twins. Triton does the same float64 operations, but sums in another order: the same (S, Z)
except where two objectives agree within 1e-12 of sum g w^2, levels equal up to float32 rounding, objectives within
1e-10 relative."""

import torch
from jaxtyping import Float32, Float64, UInt8
from torch import Tensor

from leangrid.errors import ShapeError
from leangrid.kernels import native
from leangrid.kernels.checks import (
    block,
    codes_below,
    group_index,
    normalised_importance,
    per_row,
    square_beside,
    weights,
)
from leangrid.kernels.choice import backend
from leangrid.kernels.choice import ops as _ops
from leangrid.kernels.plain import sums as plain_sums

__all__ = [
    "affine_search",
    "backend",
    "descend_affine",
    "descend_levels",
    "descend_offset",
    "exact_affine",
    "exact_levels",
    "kmeans_dp",
    "kmeans_lloyd",
    "level_gram",
    "outer_block",
    "outer_sums",
    "outer_takes_bfloat16",
    "squares_are_finite",
    "sweep_affine",
    "sweep_levels",
    "sweep_offset",
]

SCALE_DTYPES = (None, torch.float32, torch.float16, torch.bfloat16)


def kmeans_dp(
    weight: Tensor, importance: Tensor, levels: int
) -> tuple[Float32[Tensor, "rows k"], Float64[Tensor, "rows"]]:
    """The K levels of each row with the least sum_j g_j (nearest level - w_j)^2: the global optimum, by dynamic
    programming.

    Args:
        weight: f32 [rows, n], finite, n >= 1.
        importance: g, f64 [n] or [rows, n], finite and not negative; a row of zeros counts as a row of ones.
        levels: K, 1..256.

    Returns:
        levels f32 [rows, K], sorted, finite (copies where a row has fewer distinct values than K), and the objective
        f64 [rows] they reach, in units of g w^2.

    Raises:
        ShapeError: shapes, dtypes or values that do not fit.
    """
    return _kmeans("kmeans_dp", weight, importance, levels)


def kmeans_lloyd(weight: Tensor, importance: Tensor, levels: int, iterations: int = 100
                 ) -> tuple[Float32[Tensor, "rows k"], Float64[Tensor, "rows"]]:  # fmt: skip
    """Lloyd's iteration from a deterministic start: a local optimum of the objective of ``kmeans_dp``, several times
    cheaper.

    Arguments, results and errors as ``kmeans_dp``. The start is uniform for K <= 8, else quantiles of the optimal
    density of levels; a level without importance moves to the far end of the costliest interval."""
    if iterations < 1:
        raise ShapeError(f"kmeans_lloyd: {iterations} iterations", "iterations", "Ask for at least 1")
    return _kmeans("kmeans_lloyd", weight, importance, levels, iterations)


def _kmeans(name: str, weight: Tensor, importance: Tensor, levels: int, *more: int) -> tuple[Tensor, Tensor]:
    weight = weights(name, weight)
    if not 1 <= levels <= 256:
        raise ShapeError(f"{name}: {levels} levels", "levels", "Ask for 1 to 256")
    share, unit, zero = normalised_importance(name, importance, weight)
    out, objective = getattr(_ops(weight), name)(weight, torch.where(zero, 1.0, share), levels, *more)
    return out, torch.where(zero.reshape(-1), 0.0, torch.ldexp(objective, unit.reshape(-1)))


def affine_search(weight: Tensor, importance: Tensor, bits: int, steps: int, shrink: float, group_size: int, symmetric: bool = False,
                  scale_dtype: torch.dtype | None = None
                  ) -> tuple[Float32[Tensor, "rows groups"], UInt8[Tensor, "rows groups"], Float64[Tensor, "rows groups"]]:  # fmt: skip
    """The paper's enumerative search for levels S (q - Z), q = 0..K-1, a row and group: same optimum, each distinct (S,
    Z) scored once.

    Candidates are the ranges [lo + a R/T, hi - c R/T], a, c = 0..t-1, of the range [lo, hi] of the group's weights and
    0, R = hi - lo, t = round(shrink T); S = range/(K-1), Z = clamp(rint(-lo/S), 0, K-1). Symmetric: Z = K/2, S = +-2
    max|w| (1 - s/T)/(K-1), s = 0..2t-2. The first best candidate (s = a + c ascending, then Z ascending) wins. Source:
    LeanQuant (arXiv 2407.10032), section 3.

    Args:
        weight: f32 [rows, cols], finite.
        importance: g, f64 [cols] or [rows, cols], finite, not negative.
        bits: b, 1..8; K = 2^b.
        steps: T >= 1.
        shrink: t / T, in (0, 0.5).
        group_size: columns a group; divides cols.
        symmetric: fix Z = K/2; S may then be negative.
        scale_dtype: None or float32, float16, bfloat16: S is rounded to it (never to 0 or infinity) before it is
        scored.

    Returns:
        scale f32 [rows, groups] (1 where all weights are 0), zero_point u8 [rows, groups], objective f64 [rows,
        groups].

    Raises:
        ShapeError: shapes, dtypes or values that do not fit; a group that does not divide names both numbers.
    """
    weight = weights("affine_search", weight)
    cols = weight.shape[1]
    if group_size < 1 or cols % group_size:
        raise ShapeError(
            f"affine_search: groups of {group_size} do not divide {cols} columns", "group_size", "Choose a divisor"
        )
    if not (1 <= bits <= 8 and steps >= 1 and 0 < shrink < 0.5) or scale_dtype not in SCALE_DTYPES:
        raise ShapeError(
            f"affine_search: bits {bits}, steps {steps}, shrink {shrink}, scale dtype {scale_dtype}",
            "arguments",
            "bits 1..8, steps >= 1, 0 < shrink < 0.5, scale dtype float32, float16 or bfloat16",
        )
    share, unit, _ = normalised_importance("affine_search", importance, weight)
    out = _ops(weight).affine_search(weight, share, bits, steps, shrink, group_size, symmetric, scale_dtype)
    return out[0], out[1], torch.ldexp(out[2], unit)


def sweep_levels(
    weight: Tensor, upper: Tensor, levels: Tensor
) -> tuple[UInt8[Tensor, "rows b"], Float32[Tensor, "rows b"]]:
    """The loop of Algorithm 1 inside one block of columns, levels of each row's own.

    For each column j: q = nearest level (ties to the lower), e = (w_j - q) / U_jj, w_k -= U_jk e for the block's k > j.

    Args:
        weight: f32 [rows, b], the block's columns with all earlier blocks' updates, in elimination order; not changed.
        upper: f32 [b, b], the block's diagonal tile of U.
        levels: f32 [rows, K] sorted, K 1..256.

    Returns:
        codes u8 [rows, b] and scaled errors e f32 [rows, b]: the trailing update is weight[:, rest] -= e @ U[block,
        rest], the loss of the block sum(e^2)/2.

    Raises:
        ShapeError: shapes or dtypes that do not fit.
    """
    weight, upper = block("sweep_levels", weight, upper, "upper")
    levels = per_row("sweep_levels", "levels", levels, weight, torch.float32)
    return _ops(weight).sweep_levels(weight, upper, levels)


def sweep_affine(weight: Tensor, upper: Tensor, scale: Tensor, zero_point: Tensor, group: Tensor, bits: int
                 ) -> tuple[UInt8[Tensor, "rows b"], Float32[Tensor, "rows b"]]:  # fmt: skip
    """``sweep_levels`` for levels S (q - Z): code = rint(clamp(w/S + Z, 0, K-1)), half to even; S may be negative.

    Args:
        weight, upper: as in ``sweep_levels``.
        scale: f32 [rows, groups], not 0. zero_point: u8 [rows, groups].
        group: int [b], which group each column of the block belongs to.
        bits: 1..8.
    """
    weight, upper = block("sweep_affine", weight, upper, "upper")
    scale, zero_point, group = _grouped("sweep_affine", weight, scale, zero_point, group, bits, "zero_point")
    return _ops(weight).sweep_affine(weight, upper, scale, zero_point, group, bits)


def sweep_offset(weight: Tensor, upper: Tensor, scale: Tensor, offset: Tensor, group: Tensor, bits: int
                 ) -> tuple[UInt8[Tensor, "rows b"], Float32[Tensor, "rows b"]]:  # fmt: skip
    """``sweep_affine`` for levels S q + B: code = rint(clamp((w - B)/S, 0, K-1)); the product and the sum of a level
    are rounded apart.

    Args:
        offset: B, f32 [rows, groups]; the others as in ``sweep_affine``.
    """
    weight, upper = block("sweep_offset", weight, upper, "upper")
    scale, offset, group = _grouped("sweep_offset", weight, scale, offset, group, bits, "offset")
    return _ops(weight).sweep_offset(weight, upper, scale, offset, group, bits)


def exact_levels(
    weight: Tensor, inverse: Tensor, levels: Tensor
) -> tuple[UInt8[Tensor, "rows n"], Float64[Tensor, "rows"]]:
    """LeanQuant-Exact (Algorithm 2) on levels of each row's own: the cheapest remaining column is quantized next, in
    every row another.

    C++ and torch sum in another order: the same codes, except where two costs agree to rounding in float64.

    Args:
        weight: f32 [rows, n], finite; not changed.
        inverse: f64 [n, n], (H + lambda I)^-1, symmetric positive definite.
        levels: f32 [rows, K] sorted, K 1..256.

    Returns:
        codes u8 [rows, n] and the loss of each row, f64: sum over its columns of (w_j - q_j)^2 / (2 A_jj) as they are
        removed.

    Raises:
        ShapeError: shapes, dtypes or values that do not fit.
    """
    weight, inverse = weights("exact_levels", weight), square_beside("exact_levels", inverse, weight)
    levels = per_row("exact_levels", "levels", levels, weight, torch.float32)
    return _ops(weight).exact_levels(weight, inverse, levels)


def exact_affine(weight: Tensor, inverse: Tensor, scale: Tensor, zero: Tensor, group: Tensor, bits: int
                 ) -> tuple[UInt8[Tensor, "rows n"], Float64[Tensor, "rows"]]:  # fmt: skip
    """``exact_levels`` for levels S (q - Z), Z any number: code = rint(clamp(w/S + Z, 0, K-1)), half to even.

    Args:
        scale: f32 [rows, groups], not 0. zero: Z, f64 [rows, groups].
        group: int [n], which group each column belongs to. bits: 1..8.
    """
    weight, inverse = weights("exact_affine", weight), square_beside("exact_affine", inverse, weight)
    scale, zero, group = _grouped("exact_affine", weight, scale, zero, group, bits, "zero")
    return _ops(weight).exact_affine(weight, inverse, scale, zero, group, bits)


def descend_levels(gradient: Tensor, hessian: Tensor, codes: Tensor, levels: Tensor
                   ) -> tuple[UInt8[Tensor, "rows b"], Float32[Tensor, "rows b"]]:  # fmt: skip
    """One round of cyclic coordinate descent on the codes inside a block of columns.

    Column j moves to the level nearest to q_j - gradient_j / h_jj if that is strictly nearer (by 1e-6 of the distance)
    than q_j; its change then updates the gradients of the block's later columns. Columns with h_jj <= 0 stay.

    Args:
        gradient: f32 [rows, b], the block's columns of (Q - W) H; not changed.
        hessian: f32 [b, b], the block's diagonal tile of H.
        codes: u8 [rows, b], the current codes, below K.
        levels: f32 [rows, K] sorted.

    Returns:
        codes u8 [rows, b] and the change of Q, f32 [rows, b].

    Raises:
        ShapeError: shapes, dtypes or codes that do not fit.
    """
    gradient, hessian = block("descend_levels", gradient, hessian, "hessian")
    levels = per_row("descend_levels", "levels", levels, gradient, torch.float32)
    codes = codes_below("descend_levels", codes, levels.shape[1], gradient.shape)
    return _ops(gradient).descend_levels(gradient, hessian, codes, levels)


def descend_affine(gradient: Tensor, hessian: Tensor, codes: Tensor, scale: Tensor, zero_point: Tensor, group: Tensor, bits: int
                   ) -> tuple[UInt8[Tensor, "rows b"], Float32[Tensor, "rows b"]]:  # fmt: skip
    """``descend_levels`` for levels S (q - Z); the grid's arguments as in ``sweep_affine``."""
    gradient, hessian = block("descend_affine", gradient, hessian, "hessian")
    scale, zero_point, group = _grouped("descend_affine", gradient, scale, zero_point, group, bits, "zero_point")
    codes = codes_below("descend_affine", codes, 2**bits, gradient.shape)
    return _ops(gradient).descend_affine(gradient, hessian, codes, scale, zero_point, group, bits)


def descend_offset(gradient: Tensor, hessian: Tensor, codes: Tensor, scale: Tensor, offset: Tensor, group: Tensor, bits: int
                   ) -> tuple[UInt8[Tensor, "rows b"], Float32[Tensor, "rows b"]]:  # fmt: skip
    """``descend_levels`` for levels S q + B; the grid's arguments as in ``sweep_offset``."""
    gradient, hessian = block("descend_offset", gradient, hessian, "hessian")
    scale, offset, group = _grouped("descend_offset", gradient, scale, offset, group, bits, "offset")
    codes = codes_below("descend_offset", codes, 2**bits, gradient.shape)
    return _ops(gradient).descend_offset(gradient, hessian, codes, scale, offset, group, bits)


def _grouped(name: str, weight: Tensor, scale: Tensor, zero: Tensor, group: Tensor, bits: int,
             kind: str) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    if not 1 <= bits <= 8:
        raise ShapeError(f"{name}: {bits} bits", "bits", "Ask for 1 to 8")
    scale = per_row(name, "scale", scale, weight, torch.float32)
    zero = per_row(name, kind, zero, weight, {"offset": torch.float32, "zero": torch.float64}.get(kind, torch.uint8))
    if zero.shape != scale.shape:
        raise ShapeError(f"{name}: scale {tuple(scale.shape)} and {kind} {tuple(zero.shape)} differ", name)
    return scale, zero, group_index(name, group, weight.shape[1], scale.shape[1])


def level_gram(hessian: Tensor, codes: Tensor, levels: int) -> Float64[Tensor, "rows k k"]:
    """P^T H P for every row, P [n, K] the one-hot matrix of the row's codes: the normal equations of its levels.

    Args:
        hessian: f32 [n, n], symmetric (one triangle may be read twice instead of the other).
        codes: u8 [rows, n], below K.
        levels: K, 1..256.

    Returns:
        f64 [rows, K, K], symmetric up to rounding; summed in float32 over at most some hundred columns at a time,
        float64 beyond.

    Raises:
        ShapeError: shapes, dtypes or codes that do not fit.
    """
    if not 1 <= levels <= 256:
        raise ShapeError(f"level_gram: {levels} levels", "levels", "Ask for 1 to 256")
    codes, hessian = block("level_gram", codes, hessian, "hessian", torch.uint8)
    return _ops(hessian).level_gram(hessian, codes_below("level_gram", codes, levels, codes.shape), levels)


def squares_are_finite(x: Tensor) -> bool:
    """Whether the squares of all entries of ``x`` (bfloat16 or float32, any shape) surely sum to a float32; False: look
    closer."""
    if x.dtype == torch.bfloat16 and _ops(x) is native and native.multiplies_bfloat16():
        return bool(native.largest_magnitude(x.detach()) * max(x.numel(), 1) ** 0.5 < 1e19)
    return bool(torch.linalg.vector_norm(x.detach(), dtype=torch.float32).square().isfinite())


def outer_block(device: torch.device | str = "cpu") -> int:
    """Columns of the squares in which ``outer_sums`` goes through bfloat16 inputs there: it also fills those on the
    diagonal."""
    return native.TILE_COLUMNS if outer_takes_bfloat16(device) else plain_sums.PANEL


def outer_takes_bfloat16(device: torch.device | str = "cpu") -> bool:
    """Whether ``outer_sums`` reads bfloat16 inputs there as they are; elsewhere it makes a float32 copy of each
    batch."""
    return torch.device(device).type == "cpu" and native.available() and native.multiplies_bfloat16()


def outer_sums(x: Tensor, matrix: Tensor, original: Tensor | None = None, cross: Tensor | None = None) -> None:
    """matrix += x^T x and, with two streams, cross += original^T x, in place; of ``matrix`` only the upper triangle
    counts.

    Products of two bfloat16 numbers are exact in float32, and sums are float32: what the bfloat16 units of a processor
    do in one pass is what a float32 product does slowly.

    Args:
        x: [tokens, cols], finite; bfloat16 or float32.
        matrix: f32 [cols, cols]. What it holds below the diagonal afterwards means nothing.
        original: as x, the same tokens as the original model sees them.
        cross: f32 [cols, cols], given with ``original``.

    Raises:
        ShapeError: shapes or dtypes that do not fit.
    """
    streams, sums = [x, *([] if original is None else [original])], [matrix, *([] if cross is None else [cross])]
    if (
        len(streams) != len(sums)
        or x.ndim != 2
        or any(s.shape != x.shape or s.dtype != x.dtype or s.device != x.device for s in streams)
    ):
        raise ShapeError(
            f"outer_sums: streams {[(tuple(s.shape), s.dtype) for s in streams]} for {len(sums)} sums",
            "outer_sums",
            "Give both streams of the same tokens, and a sum for each",
        )
    if any(
        s.shape != (x.shape[1],) * 2 or s.dtype != torch.float32 or s.device != x.device or not s.is_contiguous()
        for s in sums
    ):
        raise ShapeError(
            f"outer_sums: sums {[(tuple(s.shape), s.dtype) for s in sums]} for {x.shape[1]} columns", "outer_sums"
        )
    direct = x.dtype == torch.bfloat16 and _ops(x) is native and outer_takes_bfloat16(x.device)
    (native if direct else plain_sums).outer_sums(
        x.detach(), matrix, None if original is None else original.detach(), cross
    )
