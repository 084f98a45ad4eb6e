"""The inner loops of the grid search and of the solver, on plain tensors.

Every op checks its input (ShapeError), then runs in the C++ extension ``leangrid.kernels._cpu`` (CPU tensors), in
Triton (CUDA tensors), or in plain torch where those are missing (``leangrid.kernels.plain``, which also says what each
op means). Rows do not depend on each other, so threads share out rows, and their number never changes a bit.
``LEANGRID_KERNELS=torch|portable|avx2|avx512|triton`` overrides the choice (kernels/choice.py).

C++ gives the same bits as plain torch, but for ``level_gram``, which sums in another order. Triton does the same
float64 operations and sums in another order: the same (S, Z) except where two objectives agree within 1e-12 of
sum g w^2, levels equal up to float32 rounding, objectives within 1e-10 relative.

Letters: w a weight, g its importance (the loss-error weight U_jj^-p of its column), K = 2^bits the number of levels,
S, Z and B the scale, zero point and offset of a group, q a code, U the upper Cholesky factor of the inverse Hessian."""

import torch
from jaxtyping import Float32, Float64, UInt8
from torch import Tensor

from leangrid.errors import ShapeError
from leangrid.kernels import native
from leangrid.kernels.checks import (
    FLOATS,
    check_block,
    check_codes,
    check_group_grid,
    check_inverse,
    check_rows,
    check_weight,
    normalise_importance,
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


def kmeans_dp(
    weight: Tensor, importance: Tensor, levels: int
) -> tuple[Float32[Tensor, "rows k"], Float64[Tensor, "rows"]]:
    """Find the K levels of each row with the least sum_j g_j (nearest level - w_j)^2: the global optimum, by dynamic
    programming over the sorted row (LeanQuant's non-uniform grid, solved exactly).

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
    """Find a local optimum of the objective of ``kmeans_dp``, several times cheaper: Lloyd's iteration, as LeanQuant's
    authors run it, from a deterministic start.

    Arguments, results and errors are those of ``kmeans_dp``; ``iterations``, at least 1, bounds the number of rounds.
    The start is uniform for K <= 8, else quantiles of the optimal density of levels. A level whose interval has no
    importance moves to the far end of the costliest interval."""
    if iterations < 1:
        raise ShapeError(f"kmeans_lloyd: {iterations} iterations", "iterations", "Ask for at least 1")
    return _kmeans("kmeans_lloyd", weight, importance, levels, iterations)


def _kmeans(name: str, weight: Tensor, importance: Tensor, levels: int, *more: int) -> tuple[Tensor, Tensor]:
    weight = check_weight(name, weight)
    if not 1 <= levels <= 256:
        raise ShapeError(f"{name}: {levels} levels", "levels", "Ask for 1 to 256")
    share, unit, zero = normalise_importance(name, importance, weight)
    out, objective = getattr(_ops(weight), name)(weight, torch.where(zero, 1.0, share), levels, *more)
    return out, torch.where(zero.reshape(-1), 0.0, torch.ldexp(objective, unit.reshape(-1)))


def affine_search(
    weight: Tensor,
    importance: Tensor,
    bits: int,
    steps: int,
    shrink: float,
    group_size: int,
    symmetric: bool = False,
    scale_dtype: torch.dtype | None = None,
) -> tuple[Float32[Tensor, "rows groups"], UInt8[Tensor, "rows groups"], Float64[Tensor, "rows groups"]]:
    """Find the levels S (q - Z), q = 0..K-1, of each row and group with the least sum_j g_j (nearest level - w_j)^2
    among the candidates of LeanQuant's enumerative search (arXiv 2407.10032, section 3), each distinct (S, Z) scored
    once.

    Candidates are the ranges [lo + a R/T, hi - c R/T], a, c = 0..t-1, where [lo, hi] is the range of the group's
    weights and 0, R = hi - lo, t = round(shrink T); S = range/(K-1), Z = clamp(rint(-lo/S), 0, K-1). Symmetric: Z =
    K/2, S = +-2 max|w| (1 - s/T)/(K-1), s = 0..2t-2. The first best candidate wins, in order of s = a + c, then of Z.

    Args:
        weight: f32 [rows, cols], finite.
        importance: g, f64 [cols] or [rows, cols], finite, not negative.
        bits: b, 1..8; K = 2^b.
        steps: T >= 1.
        shrink: t / T, in (0, 0.5).
        group_size: columns of a group; divides cols.
        symmetric: fix Z = K/2; S may then be negative.
        scale_dtype: float32, float16 or bfloat16: S is rounded to it, never to 0 or infinity, before it is scored;
            None is float32.

    Returns:
        scale f32 (1 where all weights are 0), zero_point u8, and the objective f64 in units of g w^2; all
        [rows, groups].

    Raises:
        ShapeError: shapes, dtypes or values that do not fit; a group that does not divide names both numbers.
    """
    weight = check_weight("affine_search", weight)
    cols = weight.shape[1]
    if group_size < 1 or cols % group_size:
        raise ShapeError(
            f"affine_search: groups of {group_size} do not divide {cols} columns", "group_size", "Choose a divisor"
        )
    if not (1 <= bits <= 8 and steps >= 1 and 0 < shrink < 0.5) or scale_dtype not in (None, *FLOATS):
        raise ShapeError(
            f"affine_search: bits {bits}, steps {steps}, shrink {shrink}, scale dtype {scale_dtype}",
            "arguments",
            "bits 1..8, steps >= 1, 0 < shrink < 0.5, scale dtype float32, float16 or bfloat16",
        )
    share, unit, _ = normalise_importance("affine_search", importance, weight)
    out = _ops(weight).affine_search(weight, share, bits, steps, shrink, group_size, symmetric, scale_dtype)
    return out[0], out[1], torch.ldexp(out[2], unit)


def sweep_levels(
    weight: Tensor, upper: Tensor, levels: Tensor
) -> tuple[UInt8[Tensor, "rows b"], Float32[Tensor, "rows b"]]:
    """Quantize one block of columns as LeanQuant's Algorithm 1 (and GPTQ) does, to levels of each row's own.

    For each column j: q = the nearest level (a tie goes to the lower), e = (w_j - q) / U_jj, then w_k -= U_jk e for the
    block's columns k > j.

    Args:
        weight: f32 [rows, b], the block's columns with all earlier blocks' updates, in elimination order; not changed.
        upper: f32 [b, b], the block's diagonal tile of U.
        levels: f32 [rows, K] sorted, K 1..256.

    Returns:
        codes u8 [rows, b] and scaled errors e f32 [rows, b]. The columns after the block are updated by
        weight[:, rest] -= e @ U[block, rest]; the loss of the block is sum(e^2) / 2.

    Raises:
        ShapeError: shapes or dtypes that do not fit.
    """
    weight, upper = check_block("sweep_levels", weight, upper, "upper")
    levels = check_rows("sweep_levels", "levels", levels, weight, torch.float32)
    return _ops(weight).sweep_levels(weight, upper, levels)


def sweep_affine(weight: Tensor, upper: Tensor, scale: Tensor, zero_point: Tensor, group: Tensor, bits: int
                 ) -> tuple[UInt8[Tensor, "rows b"], Float32[Tensor, "rows b"]]:  # fmt: skip
    """``sweep_levels`` for levels S (q - Z): code = rint(clamp(w/S + Z, 0, K-1)), half to even.

    Args:
        weight, upper: as in ``sweep_levels``.
        scale: S, f32 [rows, groups], not 0; may be negative.
        zero_point: Z, u8 [rows, groups].
        group: int [b], the group that each column of the block belongs to.
        bits: 1..8.

    Returns:
        codes and scaled errors, as ``sweep_levels``, with its errors.
    """
    weight, upper = check_block("sweep_affine", weight, upper, "upper")
    scale, zero_point, group = check_group_grid("sweep_affine", weight, scale, zero_point, group, bits, "zero_point")
    return _ops(weight).sweep_affine(weight, upper, scale, zero_point, group, bits)


def sweep_offset(weight: Tensor, upper: Tensor, scale: Tensor, offset: Tensor, group: Tensor, bits: int
                 ) -> tuple[UInt8[Tensor, "rows b"], Float32[Tensor, "rows b"]]:  # fmt: skip
    """``sweep_affine`` for levels S q + B, the product and the sum each rounded:
    code = rint(clamp((w - B)/S, 0, K-1)).

    Args:
        offset: B, f32 [rows, groups]; the other arguments are those of ``sweep_affine``.

    Returns:
        codes and scaled errors, as ``sweep_levels``, with its errors.
    """
    weight, upper = check_block("sweep_offset", weight, upper, "upper")
    scale, offset, group = check_group_grid("sweep_offset", weight, scale, offset, group, bits, "offset")
    return _ops(weight).sweep_offset(weight, upper, scale, offset, group, bits)


def exact_levels(
    weight: Tensor, inverse: Tensor, levels: Tensor
) -> tuple[UInt8[Tensor, "rows n"], Float64[Tensor, "rows"]]:
    """Quantize whole rows as LeanQuant-Exact (Algorithm 2) does, to levels of each row's own: in every row the
    remaining column with the least cost is quantized next, so rows differ in their order of columns.

    C++ and torch sum in different orders: the same codes, except where two costs agree to rounding in float64.

    Args:
        weight: f32 [rows, n], finite; not changed.
        inverse: f64 [n, n], (H + lambda I)^-1, symmetric positive definite.
        levels: f32 [rows, K] sorted, K 1..256.

    Returns:
        codes u8 [rows, n] and the loss of each row, f64 [rows]: the sum over its columns of (w_j - q_j)^2 / (2 A_jj),
        A the inverse for the columns that remain when j is quantized.

    Raises:
        ShapeError: shapes, dtypes or values that do not fit.
    """
    weight, inverse = check_weight("exact_levels", weight), check_inverse("exact_levels", inverse, weight)
    levels = check_rows("exact_levels", "levels", levels, weight, torch.float32)
    return _ops(weight).exact_levels(weight, inverse, levels)


def exact_affine(weight: Tensor, inverse: Tensor, scale: Tensor, zero: Tensor, group: Tensor, bits: int
                 ) -> tuple[UInt8[Tensor, "rows n"], Float64[Tensor, "rows"]]:  # fmt: skip
    """``exact_levels`` for levels S (q - Z), Z any number: code = rint(clamp(w/S + Z, 0, K-1)), half to even.

    Args:
        weight, inverse: as in ``exact_levels``.
        scale: S, f32 [rows, groups], not 0.
        zero: Z, f64 [rows, groups].
        group: int [n], the group that each column belongs to.
        bits: 1..8.

    Returns:
        codes and losses, as ``exact_levels``, with its errors.
    """
    weight, inverse = check_weight("exact_affine", weight), check_inverse("exact_affine", inverse, weight)
    scale, zero, group = check_group_grid("exact_affine", weight, scale, zero, group, bits, "zero")
    return _ops(weight).exact_affine(weight, inverse, scale, zero, group, bits)


def descend_levels(gradient: Tensor, hessian: Tensor, codes: Tensor, levels: Tensor
                   ) -> tuple[UInt8[Tensor, "rows b"], Float32[Tensor, "rows b"]]:  # fmt: skip
    """One round of cyclic coordinate descent on the codes of a block of columns, for the loss
    trace((Q - W) H (Q - W)^T) / 2.

    With the other columns fixed, column j would be best at q_j - gradient_j / h_jj. It moves to the level nearest to
    that if it is nearer than q_j, by at least 1e-6 of the distance; its change then updates the gradients of the
    block's later columns. Columns with h_jj <= 0 do not move.

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
    gradient, hessian = check_block("descend_levels", gradient, hessian, "hessian")
    levels = check_rows("descend_levels", "levels", levels, gradient, torch.float32)
    codes = check_codes("descend_levels", codes, levels.shape[1], gradient.shape)
    return _ops(gradient).descend_levels(gradient, hessian, codes, levels)


def descend_affine(gradient: Tensor, hessian: Tensor, codes: Tensor, scale: Tensor, zero_point: Tensor, group: Tensor,
                   bits: int) -> tuple[UInt8[Tensor, "rows b"], Float32[Tensor, "rows b"]]:  # fmt: skip
    """``descend_levels`` for levels S (q - Z); the arguments of the grid are those of ``sweep_affine``."""
    gradient, hessian = check_block("descend_affine", gradient, hessian, "hessian")
    scale, zero_point, group = check_group_grid(
        "descend_affine", gradient, scale, zero_point, group, bits, "zero_point"
    )
    codes = check_codes("descend_affine", codes, 2**bits, gradient.shape)
    return _ops(gradient).descend_affine(gradient, hessian, codes, scale, zero_point, group, bits)


def descend_offset(gradient: Tensor, hessian: Tensor, codes: Tensor, scale: Tensor, offset: Tensor, group: Tensor,
                   bits: int) -> tuple[UInt8[Tensor, "rows b"], Float32[Tensor, "rows b"]]:  # fmt: skip
    """``descend_levels`` for levels S q + B; the arguments of the grid are those of ``sweep_offset``."""
    gradient, hessian = check_block("descend_offset", gradient, hessian, "hessian")
    scale, offset, group = check_group_grid("descend_offset", gradient, scale, offset, group, bits, "offset")
    codes = check_codes("descend_offset", codes, 2**bits, gradient.shape)
    return _ops(gradient).descend_offset(gradient, hessian, codes, scale, offset, group, bits)


def level_gram(hessian: Tensor, codes: Tensor, levels: int) -> Float64[Tensor, "rows k k"]:
    """P^T H P for every row, P [n, K] the one-hot matrix of the row's codes: the normal equations from which its levels
    are refitted while the codes stay.

    Args:
        hessian: f32 [n, n], symmetric; an implementation may read one triangle alone.
        codes: u8 [rows, n], below K.
        levels: K, 1..256.

    Returns:
        f64 [rows, K, K], symmetric up to rounding; summed in float32 over at most some hundred columns at a time, these
        sums then in float64.

    Raises:
        ShapeError: shapes, dtypes or codes that do not fit.
    """
    if not 1 <= levels <= 256:
        raise ShapeError(f"level_gram: {levels} levels", "levels", "Ask for 1 to 256")
    codes, hessian = check_block("level_gram", codes, hessian, "hessian", torch.uint8)
    return _ops(hessian).level_gram(hessian, check_codes("level_gram", codes, levels, codes.shape), levels)


def squares_are_finite(x: Tensor) -> bool:
    """Whether the sum of the squares of ``x`` (bfloat16 or float32, any shape) is certainly below float32's overflow;
    False where that is not certain, or an entry is NaN or infinite."""
    if x.dtype == torch.bfloat16 and _ops(x) is native and native.multiplies_bfloat16():
        return bool(native.largest_magnitude(x.detach()) * max(x.numel(), 1) ** 0.5 < 1e19)
    return bool(torch.linalg.vector_norm(x.detach(), dtype=torch.float32).square().isfinite())


def outer_block(device: torch.device | str = "cpu") -> int:
    """The number of columns of the square blocks in which ``outer_sums`` computes on ``device``: it fills all of the
    blocks on the diagonal, and those above."""
    return native.TILE_COLUMNS if outer_takes_bfloat16(device) else plain_sums.PANEL


def outer_takes_bfloat16(device: torch.device | str = "cpu") -> bool:
    """Whether ``outer_sums`` on ``device`` multiplies bfloat16 inputs as they are; else it makes a float32 copy of each
    batch."""
    return torch.device(device).type == "cpu" and native.available() and native.multiplies_bfloat16()


def outer_sums(x: Tensor, matrix: Tensor, original: Tensor | None = None, cross: Tensor | None = None) -> None:
    """Add the outer products of tokens in place: matrix += x^T x, and with two streams cross += original^T x.

    The product of two bfloat16 numbers is exact in float32, and sums are float32: the bfloat16 instructions of a
    processor differ from a float32 product of the same inputs only in the order of the sums.

    Args:
        x: inputs of a layer in the quantized model, [tokens, cols], finite; bfloat16 or float32.
        matrix: the Hessian's sum, f32 [cols, cols]. Only its upper triangle is meaningful afterwards.
        original: the inputs of the same tokens in the original model, as x; None with one stream.
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
