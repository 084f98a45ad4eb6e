"""What a kind of grid offers: it is fitted to weights, codes are chosen on it, it is refitted to codes.

Each kind is one class with one row in ``leangrid.grids.KINDS``. To fit, sweep, refine or plan, the rest of the package
calls these methods and never asks which kind a grid is."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar, cast

import torch
from jaxtyping import Float, Float32, Float64, Int, UInt8
from torch import Tensor

from leangrid.errors import ShapeError
from leangrid.grids.least_squares import CHUNK_BYTES, COPIES, normal_equations, objective_change, solve_ridged
from leangrid.recipe import Recipe
from leangrid.schemes import Scheme

_RIDGE = 1e-6  # of the refit of scales and offsets, in units of the mean diagonal of the normal equations


@dataclass(frozen=True)
class Precision:
    """How a container stores the parameters of a grid: ``dtype`` is what scales, offsets and levels are rounded to.

    The magnitudes of scales also stay within ``smallest`` and ``largest``.
    """

    dtype: torch.dtype
    smallest: float = 0.0
    largest: float = math.inf

    def for_scheme(self, scheme: Scheme) -> "Precision":
        """This precision, or float16 for llama.cpp's block types, which store float16 in every container."""
        return Precision(torch.float16) if scheme.block else self

    def clamped(self, scale: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """``scale`` with magnitudes inside the limits, signs kept."""
        return torch.copysign(scale.abs().clamp(self.smallest, self.largest), scale)


FLOAT32 = Precision(torch.float32)


class Grid(ABC):
    """The values that the weights of each row may take. A code is an index into them.

    A grid is a frozen dataclass whose tensors all have one row for every row of the weight. Codes are uint8
    [rows, cols], with columns in their original order.
    """

    bits: int  # a code is below 2^bits
    levels: Float[Tensor, "rows ..."]  # float32: [rows, 2^bits], or [rows, groups, 2^bits] for grids with groups
    # Seconds that fitting takes for one weight on one CPU thread with the native kernels and AVX-512; AVX2 takes about
    # twice as long (benchmarks/cost_model.py). ``leangrid plan`` multiplies it.
    FIT_SECONDS_PER_WEIGHT: ClassVar[float]
    # Steps of block tuning: of the parameters, in units of their root mean square, and of codes, in codes.
    TUNING_STEPS: ClassVar[tuple[float, float]] = (0.002, 0.005)

    @classmethod
    @abstractmethod
    def fit(
        cls,
        weight: Float[Tensor, "rows cols"],
        loss_error_weights: Float[Tensor, " cols"],
        scheme: Scheme,
        recipe: Recipe,
        precision: Precision,
    ) -> Any:
        """The grid of this kind that lowers sum_j g_j (nearest(w_j) - w_j)^2 for each row, rounded to ``precision``.

        ``loss_error_weights`` are g, float64. ``scheme`` says how many bits and columns a group has, ``recipe`` how the
        search is done (``steps``, ``search``).
        """

    @classmethod
    @abstractmethod
    def fit_minmax(cls, weight: Float[Tensor, "rows cols"], scheme: Scheme, precision: Precision) -> Any:
        """The grid of the baselines GPTQ and rounding: equal steps over the range of each row or group.

        It is a grid of this kind, or one that ``from_minmax`` turns into this kind.
        """

    @classmethod
    def from_minmax(cls, minmax: Any, precision: Precision) -> Any:
        """A grid of ``fit_minmax`` as a grid of this kind; the same object where it is one already."""
        return minmax

    @classmethod
    @abstractmethod
    def describe(cls, scheme: Scheme) -> str:
        """What is stored, in words for the model card, such as "affine grid (scale and zero point)"."""

    @classmethod
    @abstractmethod
    def refit_bytes(cls, scheme: Scheme, rows: int, cols: int, accelerated: bool) -> int:
        """Bytes that ``refit`` needs at most for a layer of this shape; ``accelerated``: on a GPU."""

    @abstractmethod
    def dequantize(self, codes: Int[Tensor, "rows cols"] | UInt8[Tensor, "rows cols"]) -> Float[Tensor, "rows cols"]:
        """The weights, float32, that the codes stand for."""

    @abstractmethod
    def nearest(self, weight: Float[Tensor, "rows cols"]) -> UInt8[Tensor, "rows cols"]:
        """The code of the nearest level of each weight."""

    @abstractmethod
    def rounded(self, dtype: torch.dtype) -> Any:
        """This grid with its parameters rounded to ``dtype``; they stay finite, and scales stay away from zero."""

    @abstractmethod
    def group_of(self, cols: int) -> Int[Tensor, " cols"]:
        """int32: the group of each of ``cols`` columns, original order. ShapeError where the grid has others."""

    @abstractmethod
    def sweep_block(
        self, weight: Float32[Tensor, "rows b"], upper: Float32[Tensor, "b b"], group: Int[Tensor, " b"]
    ) -> tuple[UInt8[Tensor, "rows b"], Float32[Tensor, "rows b"]]:
        """Quantize a block of columns one after the other, each error moved to the columns on its right (Algorithm 1).

        ``upper`` is the block's corner of U, ``group`` the group of each column. Returns the codes, and the errors
        e_j = (w_j - q_j) / U_jj that the columns after the block still have to take. See ``solve.sweep``.
        """

    @abstractmethod
    def sweep_exact(
        self, weight: Float32[Tensor, "rows cols"], inverse: Float64[Tensor, "cols cols"]
    ) -> tuple[UInt8[Tensor, "rows cols"], Float64[Tensor, " rows"]]:
        """Codes and row losses of LeanQuant-Exact (Algorithm 2); ``inverse`` is (H + lambda I)^-1, original order."""

    @abstractmethod
    def descend_block(
        self,
        gradient: Float32[Tensor, "rows b"],
        hessian: Float32[Tensor, "b b"],
        codes: UInt8[Tensor, "rows b"],
        group: Int[Tensor, " b"],
    ) -> tuple[UInt8[Tensor, "rows b"], Float32[Tensor, "rows b"]]:
        """Move each code of a block to the level that lowers the loss most. Returns new codes and the change of W^.

        ``gradient`` is E H of the block's columns, ``hessian`` its corner of H. See ``solve.refine``.
        """

    @abstractmethod
    def refit(
        self,
        codes: UInt8[Tensor, "rows cols"],
        gradient: Float[Tensor, "rows cols"],
        hessian: Float[Tensor, "cols cols"],
        precision: Precision,
    ) -> tuple[UInt8[Tensor, "rows cols"], Any, Float64[Tensor, " rows"]]:
        """The least-squares parameters of this grid given the codes, rounded to ``precision``.

        Args:
            gradient: E H, E = W^ - W.
            hessian: H + lambda I, original column order.

        Returns:
            Codes (changed only where levels changed places), the new grid, and by how much twice the loss of each row
            changes: below zero where the new grid is better.
        """

    @property
    @abstractmethod
    def parameters(self) -> Float[Tensor, "rows ..."]:
        """float32: the numbers that a refit, or tuning by gradient (solve/tuning.py), may change."""

    @abstractmethod
    def dequantize_at(
        self, parameters: Float[Tensor, "rows ..."], codes: UInt8[Tensor, "rows cols"], precision: Precision
    ) -> Float[Tensor, "rows cols"]:
        """The weights, float32, that the codes stand for with other ``parameters``, which are rounded to
        ``precision``."""

    @abstractmethod
    def parameter_gradient(
        self, codes: UInt8[Tensor, "rows cols"], gradient: Float[Tensor, "rows cols"]
    ) -> Float[Tensor, "rows ..."]:
        """The gradient by ``parameters``, where ``gradient`` is that by the weights."""

    @abstractmethod
    def spacing(self, codes: UInt8[Tensor, "rows cols"]) -> Float[Tensor, "rows cols"]:
        """By how much a weight grows when its code grows by one, float32; of the two steps beside a code the mean."""

    @abstractmethod
    def with_tuned(
        self, parameters: Float[Tensor, "rows ..."], codes: UInt8[Tensor, "rows cols"], precision: Precision
    ) -> tuple[UInt8[Tensor, "rows cols"], Any]:
        """Codes and a grid that stand for ``dequantize_at`` of the same. Codes change only where levels have changed
        places."""

    def select_rows(self, rows: Tensor) -> Any:
        """The grid of some rows (indices or mask)."""
        return self._mapped(lambda mine: mine[rows])

    def replace_rows(self, rows: Tensor, other: Any) -> Any:
        """This grid with ``rows`` (indices or mask) replaced by the rows of ``other``, in order."""
        return self._mapped(lambda mine, theirs: mine.index_put((rows,), theirs), other)

    def append_rows(self, others: Sequence[Any]) -> Any:
        """The rows of this grid, then those of ``others``."""
        return self._mapped(lambda *all_rows: torch.cat(all_rows), *others)

    def to(self, device: torch.device | str) -> Any:
        """This grid on ``device``."""
        return self._mapped(lambda mine: mine.to(device))

    def _mapped(self, change: Callable[..., Tensor], *others: "Grid") -> Any:
        """This grid with ``change`` applied to each of its tensors, and to those of ``others`` of the same name."""
        values = {f.name: getattr(self, f.name) for f in fields(cast(Any, self)) if f.init}
        names = [name for name, value in values.items() if isinstance(value, Tensor)]
        return replace(
            cast(Any, self),
            **{name: change(values[name], *(getattr(other, name) for other in others)) for name in names},
        )


class GroupedGrid(Grid):
    """A grid with one scale for each row and group of ``group_size`` columns (None: one group, the whole row).

    Each row has ``spans`` spans of columns, and each span has ``kinds`` parameters: S, or S and B. The weights are
    linear in them: w_j = sum over the parameters of j's span of parameter * design_j. A refit needs no more than this.
    """

    scale: Float[Tensor, "rows groups"]
    group_size: int | None

    @classmethod
    def spans_and_kinds(cls, scheme: Scheme, cols: int) -> tuple[int, int]:
        """The last two sizes of ``parameters`` for a layer of ``cols`` columns; here one scale for each group."""
        return cols // group_columns(cols, scheme.group_size), 1

    @property
    @abstractmethod
    def parameters(self) -> Float[Tensor, "rows spans kinds"]:
        """float32: the parameters that a refit may change."""

    @abstractmethod
    def design(self, codes: UInt8[Tensor, "rows cols"]) -> Float[Tensor, "rows kinds cols"]:
        """float32: the derivative of each weight by each kind of parameter, given the codes."""

    @abstractmethod
    def with_parameters(self, parameters: Float[Tensor, "rows spans kinds"], dtype: torch.dtype) -> Any:
        """This grid with other parameters, rounded to ``dtype``. One that no file should hold stays as it is."""

    def dequantize_at(self, parameters: Tensor, codes: Tensor, precision: Precision) -> Tensor:
        return self.with_parameters(parameters, precision.dtype).clamped(precision).dequantize(codes)

    def parameter_gradient(self, codes: Tensor, gradient: Tensor) -> Tensor:
        rows, spans, kinds = self.parameters.shape
        by_column = self.design(codes).mul_(gradient[:, None])
        return by_column.reshape(rows, kinds, spans, -1).sum(3).transpose(1, 2)

    def spacing(self, codes: Tensor) -> Tensor:
        return self.scale[..., None].expand(self._grouped(codes).shape).reshape(codes.shape)

    def with_tuned(self, parameters: Tensor, codes: Tensor, precision: Precision) -> tuple[Tensor, Any]:
        return codes, self.with_parameters(parameters, precision.dtype).clamped(precision)

    def clamped(self, precision: Precision) -> Any:
        """This grid with scales inside the limits of ``precision``: weights near zero get a wider grid."""
        return replace(cast(Any, self), scale=precision.clamped(self.scale))

    def group_of(self, cols: int) -> Int[Tensor, " cols"]:
        size = group_columns(cols, self.group_size)
        if cols // size != self.scale.shape[1]:
            raise ShapeError(
                f"{cols} columns hold {cols // size} groups of {size}, the grid has {self.scale.shape[1]}", "grid"
            )
        return torch.arange(cols, dtype=torch.int32, device=self.scale.device) // size

    def refit(
        self, codes: Tensor, gradient: Tensor, hessian: Tensor, precision: Precision
    ) -> tuple[Tensor, Any, Tensor]:
        """As ``Grid.refit``: all parameters of a row together, in chunks of rows. The codes stay."""
        (rows, spans, kinds), cols = self.parameters.shape, codes.shape[1]
        chunk = _rows_at_once(spans, kinds, cols)
        parts, change = [], torch.zeros(rows, dtype=torch.float64, device=hessian.device)
        for index in torch.arange(rows, device=hessian.device).split(chunk):
            here = self.select_rows(index)
            normal, slope = normal_equations(here.design(codes[index]), gradient[index], hessian, spans)
            old = here.parameters.flatten(1).double()
            best = (old - solve_ridged(normal, slope, _RIDGE)).float().reshape(here.parameters.shape)
            new = here.with_parameters(best, precision.dtype).clamped(precision)
            change[index] = objective_change(new.parameters.flatten(1).double() - old, normal, slope)
            parts.append(new)
        return codes, parts[0].append_rows(parts[1:]), change

    @classmethod
    def refit_bytes(cls, scheme: Scheme, rows: int, cols: int, accelerated: bool) -> int:
        spans, kinds = cls.spans_and_kinds(scheme, cols)
        return COPIES * 8 * min(rows, _rows_at_once(spans, kinds, cols)) * (spans * kinds) ** 2

    def _grouped(self, matrix: Tensor) -> Tensor:
        """[rows, cols] -> [rows, groups, columns a group]."""
        self.group_of(matrix.shape[1])
        return matrix.reshape(matrix.shape[0], self.scale.shape[1], -1)


def _rows_at_once(spans: int, kinds: int, cols: int) -> int:
    """Rows whose normal equations, and the products they are summed from, fit in CHUNK_BYTES."""
    return max(1, CHUNK_BYTES // max(8 * (spans * kinds) ** 2, 4 * cols * kinds * kinds))


def check_weight(weight: Tensor) -> Float[Tensor, "rows cols"]:
    """``weight`` as contiguous float32 [rows, cols]; ShapeError for anything that no grid can hold."""
    if weight.ndim != 2 or 0 in weight.shape or not weight.is_floating_point():
        raise ShapeError(f"a weight is a floating-point matrix, not {tuple(weight.shape)} of {weight.dtype}", "grid")
    weight = weight.detach().float().contiguous()
    finite = weight.sum().isfinite()  # one cheap pass; the weights are looked at singly only if something is wrong
    if not bool(finite) and not bool((finite := weight.isfinite()).all()):
        raise ShapeError(
            f"{int((~finite).sum())} of {weight.numel()} weights are NaN or infinite",
            "grid",
            "The checkpoint is damaged: download it again",
        )
    return weight


def group_columns(cols: int, group_size: int | None) -> int:
    """Columns in a group; None means the whole row. ShapeError naming both numbers where it does not divide."""
    size = cols if group_size is None else group_size
    if size < 1 or cols % size:
        raise ShapeError(
            f"groups of {size} columns do not divide {cols} columns",
            "grid",
            "Use a group size that divides, or whole rows (no _G)",
        )
    return size
