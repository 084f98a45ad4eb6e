"""The C++ extension, seen from Python: allocates results, passes views (no copies), picks the instruction set once.

The same functions as plain; inputs are already checked (kernels/checks.py), on the CPU and contiguous.
"""

import os
import warnings
from functools import cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from leangrid.errors import RecipeError
from leangrid.kernels.plain.affine import SCALE_LIMITS, shrink_steps

TILE_COLUMNS = 32  # of a square of outer_sums
CHOICES = ("torch", "portable", "avx2", "avx512", "triton")


@cache
def _extension() -> ModuleType | None:
    try:
        from leangrid.kernels import _cpu  # type: ignore[attr-defined]
    except ImportError as error:
        warnings.warn(f"leangrid runs without its C++ kernels (slower, same results): {error}", stacklevel=2)
        return None
    return _cpu


@cache
def _isa(wanted: str) -> int | None:
    """Index into portable, avx2, avx512; None for torch and triton."""
    if wanted in ("torch", "triton") or (module := _extension()) is None:
        return None
    best = module.best_isa()
    isa = CHOICES.index(wanted) - 1 if wanted else best
    if isa > best:
        raise RecipeError(
            f"this processor has no {wanted}", "LEANGRID_KERNELS", f"The best here is {CHOICES[best + 1]}"
        )
    return isa


def wanted() -> str:
    """LEANGRID_KERNELS, or "" where it is not set; RecipeError where it names no path."""
    name = os.environ.get("LEANGRID_KERNELS", "")
    if name and name not in CHOICES:
        raise RecipeError(f"LEANGRID_KERNELS={name}", "environment", f"Choose one of {', '.join(CHOICES)}")
    return name


def _chosen() -> int | None:
    return _isa(wanted())


def available() -> bool:
    """Whether CPU tensors go to C++."""
    return _chosen() is not None


def backend() -> str:
    """Which of the paths here CPU tensors take: cpu-avx512, cpu-avx2, cpu-portable, or torch for none."""
    isa = _chosen()
    return "torch" if isa is None else f"cpu-{CHOICES[isa + 1]}"


def _call(name: str, *args: object) -> None:
    getattr(_extension(), name)(_chosen(), torch.get_num_threads(), *args)


call = _call  # for kernels/decode.py


def isa() -> int | None:
    """The chosen instruction set's index in portable, avx2, avx512."""
    return _chosen()


def module() -> Any:
    """The extension itself; only where ``available()``."""
    return _extension()


def kmeans_dp(weight: Tensor, importance: Tensor, levels: int) -> tuple[Tensor, Tensor]:
    return _kmeans(weight, importance, levels, 0)


def kmeans_lloyd(weight: Tensor, importance: Tensor, levels: int, iterations: int) -> tuple[Tensor, Tensor]:
    return _kmeans(weight, importance, levels, iterations)


def _kmeans(weight: Tensor, importance: Tensor, levels: int, iterations: int) -> tuple[Tensor, Tensor]:
    out, objective = torch.empty(len(weight), levels), torch.empty(len(weight), dtype=torch.float64)
    _call("kmeans", weight, importance.view(-1), importance.ndim == 2, iterations, out, objective)
    return out, objective


def affine_search(weight: Tensor, importance: Tensor, bits: int, steps: int, shrink: float, group_size: int, symmetric: bool,
                  scale_dtype: torch.dtype | None) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    shape = len(weight), weight.shape[1] // group_size
    scale, zero_point, objective = (
        torch.empty(shape),
        torch.empty(shape, dtype=torch.uint8),
        torch.empty(shape, dtype=torch.float64),
    )
    dtype = scale_dtype or torch.float32
    smallest, largest = SCALE_LIMITS[dtype]
    _call(
        "affine_search",
        weight,
        importance.view(-1),
        importance.ndim == 2,
        bits,
        steps,
        shrink_steps(steps, shrink),
        symmetric,
        {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}[dtype],
        smallest,
        largest,
        scale,
        zero_point,
        objective,
    )
    return scale, zero_point, objective


def sweep_levels(weight: Tensor, upper: Tensor, levels: Tensor) -> tuple[Tensor, Tensor]:
    codes, errors = torch.empty_like(weight, dtype=torch.uint8), torch.empty_like(weight)
    _call("sweep_levels", weight, upper, levels, codes, errors)
    return codes, errors


def sweep_affine(
    weight: Tensor, upper: Tensor, scale: Tensor, zero_point: Tensor, group: Tensor, bits: int
) -> tuple[Tensor, Tensor]:
    codes, errors = torch.empty_like(weight, dtype=torch.uint8), torch.empty_like(weight)
    _call("sweep_affine", weight, upper, scale, zero_point, group, bits, codes, errors)
    return codes, errors


def sweep_offset(
    weight: Tensor, upper: Tensor, scale: Tensor, offset: Tensor, group: Tensor, bits: int
) -> tuple[Tensor, Tensor]:
    codes, errors = torch.empty_like(weight, dtype=torch.uint8), torch.empty_like(weight)
    _call("sweep_offset", weight, upper, scale, offset, group, bits, codes, errors)
    return codes, errors


def descend_levels(gradient: Tensor, hessian: Tensor, codes: Tensor, levels: Tensor) -> tuple[Tensor, Tensor]:
    codes, delta = codes.clone(), torch.empty_like(gradient)
    _call("descend_levels", gradient, hessian, levels, codes, delta)
    return codes, delta


def descend_affine(gradient: Tensor, hessian: Tensor, codes: Tensor, scale: Tensor, zero_point: Tensor, group: Tensor,
                   bits: int) -> tuple[Tensor, Tensor]:  # fmt: skip
    codes, delta = codes.clone(), torch.empty_like(gradient)
    _call("descend_affine", gradient, hessian, scale, zero_point, group, bits, codes, delta)
    return codes, delta


def descend_offset(gradient: Tensor, hessian: Tensor, codes: Tensor, scale: Tensor, offset: Tensor, group: Tensor,
                   bits: int) -> tuple[Tensor, Tensor]:  # fmt: skip
    codes, delta = codes.clone(), torch.empty_like(gradient)
    _call("descend_offset", gradient, hessian, scale, offset, group, bits, codes, delta)
    return codes, delta


def exact_levels(weight: Tensor, inverse: Tensor, levels: Tensor) -> tuple[Tensor, Tensor]:
    codes, loss = torch.empty_like(weight, dtype=torch.uint8), torch.empty(len(weight), dtype=torch.float64)
    _call("exact_levels", weight, inverse, levels, codes, loss)
    return codes, loss


def exact_affine(
    weight: Tensor, inverse: Tensor, scale: Tensor, zero: Tensor, group: Tensor, bits: int
) -> tuple[Tensor, Tensor]:
    codes, loss = torch.empty_like(weight, dtype=torch.uint8), torch.empty(len(weight), dtype=torch.float64)
    _call("exact_affine", weight, inverse, scale, zero, group, bits, codes, loss)
    return codes, loss


def level_gram(hessian: Tensor, codes: Tensor, levels: int) -> Tensor:
    out = torch.empty(len(codes), levels, levels, dtype=torch.float64)
    _call("level_gram", hessian, codes, out)
    return out


def multiplies_bfloat16() -> bool:
    """Whether this processor multiplies bfloat16, in matrix tiles or vectors, with the extension's widest instruction
    set in use."""
    module = _extension()
    return module is not None and _chosen() == module.best_isa() and bool(module.multiplies_bfloat16())


def largest_magnitude(x: Tensor) -> Tensor:
    """max |x| of bfloat16 numbers (NaN counts as larger than infinity), float32: one pass at the memory's speed."""
    bits = _extension().largest_bits(x.contiguous().view(torch.uint16).view(-1))  # pyright: ignore[reportOptionalMemberAccess]
    return torch.tensor(bits, dtype=torch.int32).bitwise_left_shift_(16).view(torch.float32)


def outer_sums(x: Tensor, matrix: Tensor, original: Tensor | None, cross: Tensor | None) -> None:
    def words(t: Tensor | None) -> Tensor | None:
        return None if t is None else t.contiguous().view(torch.uint16)

    _extension().outer_sums(torch.get_num_threads(), words(x), words(original), matrix, cross)  # pyright: ignore[reportOptionalMemberAccess]
