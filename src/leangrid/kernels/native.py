"""The C++ extension, called from Python: results are allocated here, tensors are passed as views, the instruction set
is chosen once.

The functions are those of ``leangrid.kernels.plain``; their inputs were checked (kernels/checks.py), are on the CPU and
contiguous. Their documentation is in ``leangrid.kernels``."""

import os
import warnings
from functools import cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from leangrid.errors import RecipeError
from leangrid.kernels.checks import FLOATS
from leangrid.kernels.plain.affine import SCALE_LIMITS, shrink_steps

TILE_COLUMNS = 32  # columns of the square tiles in which the extension computes outer_sums
CHOICES = ("torch", "portable", "avx2", "avx512", "triton")


@cache
def _extension() -> ModuleType | None:
    try:
        from leangrid.kernels import _cpu  # type: ignore[attr-defined]
    except ImportError as error:
        warnings.warn(f"leangrid runs without its C++ kernels (slower, the same up to rounding): {error}", stacklevel=2)
        return None
    return _cpu


@cache
def _isa(requested: str) -> int | None:
    """The instruction set as an index into portable, avx2, avx512; None without the extension, or where torch or triton
    is requested."""
    if requested in ("torch", "triton") or (module := _extension()) is None:
        return None
    best = module.best_isa()
    isa = CHOICES.index(requested) - 1 if requested else best
    if isa > best:
        raise RecipeError(
            f"this processor has no {requested}", "LEANGRID_KERNELS", f"The best here is {CHOICES[best + 1]}"
        )
    return isa


def requested() -> str:
    """The value of LEANGRID_KERNELS, "" where it is not set; RecipeError where it is none of CHOICES."""
    name = os.environ.get("LEANGRID_KERNELS", "")
    if name and name not in CHOICES:
        raise RecipeError(f"LEANGRID_KERNELS={name}", "environment", f"Choose one of {', '.join(CHOICES)}")
    return name


def isa() -> int | None:
    """The instruction set in use as an index into portable, avx2, avx512; None where the extension is not used."""
    return _isa(requested())


def available() -> bool:
    """Whether the extension computes on CPU tensors."""
    return isa() is not None


def backend() -> str:
    """What computes on CPU tensors: "cpu-avx512", "cpu-avx2", "cpu-portable", or "torch" without the extension."""
    found = isa()
    return "torch" if found is None else f"cpu-{CHOICES[found + 1]}"


def module() -> Any:
    """The extension; only where ``available()``."""
    return _extension()


def call(name: str, *args: object) -> None:
    """Run a function of the extension with the chosen instruction set on torch's number of threads."""
    getattr(_extension(), name)(isa(), torch.get_num_threads(), *args)


def kmeans_dp(weight: Tensor, importance: Tensor, levels: int) -> tuple[Tensor, Tensor]:
    return _kmeans(weight, importance, levels, 0)


def kmeans_lloyd(weight: Tensor, importance: Tensor, levels: int, iterations: int) -> tuple[Tensor, Tensor]:
    return _kmeans(weight, importance, levels, iterations)


def _kmeans(weight: Tensor, importance: Tensor, levels: int, iterations: int) -> tuple[Tensor, Tensor]:
    out, objective = torch.empty(len(weight), levels), torch.empty(len(weight), dtype=torch.float64)
    call("kmeans", weight, importance.view(-1), importance.ndim == 2, iterations, out, objective)
    return out, objective


def affine_search(weight: Tensor, importance: Tensor, bits: int, steps: int, shrink: float, group_size: int,
                  symmetric: bool, scale_dtype: torch.dtype | None) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    shape = len(weight), weight.shape[1] // group_size
    scale, zero_point, objective = (
        torch.empty(shape),
        torch.empty(shape, dtype=torch.uint8),
        torch.empty(shape, dtype=torch.float64),
    )
    dtype = scale_dtype or torch.float32
    smallest, largest = SCALE_LIMITS[dtype]
    call(
        "affine_search",
        weight,
        importance.view(-1),
        importance.ndim == 2,
        bits,
        steps,
        shrink_steps(steps, shrink),
        symmetric,
        FLOATS[dtype],
        smallest,
        largest,
        scale,
        zero_point,
        objective,
    )
    return scale, zero_point, objective


def sweep_levels(weight: Tensor, upper: Tensor, levels: Tensor) -> tuple[Tensor, Tensor]:
    codes, errors = torch.empty_like(weight, dtype=torch.uint8), torch.empty_like(weight)
    call("sweep_levels", weight, upper, levels, codes, errors)
    return codes, errors


def sweep_affine(
    weight: Tensor, upper: Tensor, scale: Tensor, zero_point: Tensor, group: Tensor, bits: int
) -> tuple[Tensor, Tensor]:
    codes, errors = torch.empty_like(weight, dtype=torch.uint8), torch.empty_like(weight)
    call("sweep_affine", weight, upper, scale, zero_point, group, bits, codes, errors)
    return codes, errors


def sweep_offset(
    weight: Tensor, upper: Tensor, scale: Tensor, offset: Tensor, group: Tensor, bits: int
) -> tuple[Tensor, Tensor]:
    codes, errors = torch.empty_like(weight, dtype=torch.uint8), torch.empty_like(weight)
    call("sweep_offset", weight, upper, scale, offset, group, bits, codes, errors)
    return codes, errors


def descend_levels(gradient: Tensor, hessian: Tensor, codes: Tensor, levels: Tensor) -> tuple[Tensor, Tensor]:
    codes, delta = codes.clone(), torch.empty_like(gradient)
    call("descend_levels", gradient, hessian, levels, codes, delta)
    return codes, delta


def descend_affine(gradient: Tensor, hessian: Tensor, codes: Tensor, scale: Tensor, zero_point: Tensor, group: Tensor,
                   bits: int) -> tuple[Tensor, Tensor]:  # fmt: skip
    codes, delta = codes.clone(), torch.empty_like(gradient)
    call("descend_affine", gradient, hessian, scale, zero_point, group, bits, codes, delta)
    return codes, delta


def descend_offset(gradient: Tensor, hessian: Tensor, codes: Tensor, scale: Tensor, offset: Tensor, group: Tensor,
                   bits: int) -> tuple[Tensor, Tensor]:  # fmt: skip
    codes, delta = codes.clone(), torch.empty_like(gradient)
    call("descend_offset", gradient, hessian, scale, offset, group, bits, codes, delta)
    return codes, delta


def exact_levels(weight: Tensor, inverse: Tensor, levels: Tensor) -> tuple[Tensor, Tensor]:
    codes, loss = torch.empty_like(weight, dtype=torch.uint8), torch.empty(len(weight), dtype=torch.float64)
    call("exact_levels", weight, inverse, levels, codes, loss)
    return codes, loss


def exact_affine(
    weight: Tensor, inverse: Tensor, scale: Tensor, zero: Tensor, group: Tensor, bits: int
) -> tuple[Tensor, Tensor]:
    codes, loss = torch.empty_like(weight, dtype=torch.uint8), torch.empty(len(weight), dtype=torch.float64)
    call("exact_affine", weight, inverse, scale, zero, group, bits, codes, loss)
    return codes, loss


def level_gram(hessian: Tensor, codes: Tensor, levels: int) -> Tensor:
    out = torch.empty(len(codes), levels, levels, dtype=torch.float64)
    call("level_gram", hessian, codes, out)
    return out


def multiplies_bfloat16() -> bool:
    """Whether this processor has instructions that multiply bfloat16, and the extension's widest instruction set is in
    use."""
    module = _extension()
    return module is not None and isa() == module.best_isa() and bool(module.multiplies_bfloat16())


def largest_magnitude(x: Tensor) -> Tensor:
    """The largest |x| of a bfloat16 tensor of any shape, float32 []; NaN counts as larger than infinity."""
    bits = _extension().largest_bits(x.contiguous().view(torch.uint16).view(-1))  # pyright: ignore[reportOptionalMemberAccess]
    return torch.tensor(bits, dtype=torch.int32).bitwise_left_shift_(16).view(torch.float32)


def outer_sums(x: Tensor, matrix: Tensor, original: Tensor | None, cross: Tensor | None) -> None:
    def words(t: Tensor | None) -> Tensor | None:
        return None if t is None else t.contiguous().view(torch.uint16)

    _extension().outer_sums(torch.get_num_threads(), words(x), words(original), matrix, cross)  # pyright: ignore[reportOptionalMemberAccess]
