"""Correct the error of the inputs: a target W~ whose output on the quantized model's inputs is the original output.

A layer is quantized when its inputs already come from quantized layers. With X the inputs of the original model and X~
those of the quantized one (one row a token), min ||X W^T - X~ W^^T||^2 over W^ has the same minimiser as the plain
problem around W G H^-1, with H = 2/N X~^T X~ and G = 2/N X^T X~. Damped, and taken only a share ``a`` of the way:

    W~ = W + a W (G - H)(H + lambda I)^-1

a = 1 and lambda = 0 is the least-squares target. It overfits where tokens are few. a is given, or measured for each
linear: with D1 and D2 the G - H of two halves of the tokens, what both agree on is signal, the rest is noise, and

    a = min(0.5, 1 - ||W (D1 - D2) U^T||^2 / ||W (D1 + D2) U^T||^2), not below 0.

(H + lambda I)^-1 is U^T U of the layer's factor: nothing is factored twice."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from leangrid.solve.factor import Factor

LARGEST = 0.5  # share that is measured at most, and taken where none can be measured


@dataclass(frozen=True, eq=False)
class Correction:
    """(G - H)(H + lambda I)^-1, which weights are multiplied by from the left.

    Attributes:
        matrix: float32. Where not ``solved``: G - H alone, columns in elimination order, and the few rows that are
            multiplied by it are solved for one layer at a time. Where ``solved``: the whole product, columns in
            original order; with ``noise`` (G - H) U^T.
        factor: of H.
        solved: whether ``matrix`` is more than G - H.
        noise: float32, the noise of G - H in the form of ``matrix``; None where it was not measured.
    """

    matrix: Float[Tensor, "cols cols"]
    factor: Factor
    solved: bool
    noise: Float[Tensor, "cols cols"] | None = None

    @classmethod
    def of(
        cls,
        hessian: Float[Tensor, "cols cols"],
        cross: Float[Tensor, "cols cols"],
        factor: Factor,
        rows: int,
        noise: Float[Tensor, "cols cols"] | None = None,
    ) -> "Correction":
        """From H undamped, G (``cross``) and the noise of G - H (``Hessian.noise``), all in original column order, for
        layers of ``rows`` rows in all.

        With fewer rows than columns it is cheaper to solve for the rows than for the matrix."""
        difference = torch.sub(cross, hessian).index_select(1, factor.order)
        if noise is not None:
            noise = noise.index_select(1, factor.order)
        if rows < len(hessian):
            return cls(difference, factor, False, noise)
        if noise is not None:
            return cls(difference @ factor.upper.T, factor, True, noise @ factor.upper.T)
        return cls(_multiply_by_inverse(factor, difference), factor, True)

    def correction_of(self, weight: Float[Tensor, "rows cols"]) -> Float[Tensor, "rows cols"]:
        """W (G - H)(H + lambda I)^-1, float32."""
        if self.noise is not None:
            return multiply_by_upper(self.factor, self._whitened(weight, self.matrix))
        product = weight @ self.matrix
        return product if self.solved else _multiply_by_inverse(self.factor, product)

    def measured(self, weight: Float[Tensor, "rows cols"]) -> tuple[Float[Tensor, "rows cols"], float]:
        """``correction_of`` a weight, and the share a of it that its noise allows."""
        if self.noise is None:
            return self.correction_of(weight), LARGEST
        signal = self._whitened(weight, self.matrix)
        share = bearable_share(squares(signal), squares(self._whitened(weight, self.noise)))
        return multiply_by_upper(self.factor, signal), share

    def _whitened(self, weight: Tensor, matrix: Tensor) -> Tensor:
        """W (G - H) U^T, columns in elimination order, or the same of its noise."""
        product = weight @ matrix
        return product if self.solved else product @ self.factor.upper.T


def correct(
    weight: Float[Tensor, "rows cols"], correction: Correction | None, strength: float | None
) -> tuple[Float[Tensor, "rows cols"], float]:
    """W~ = W + a W (G - H)(H + lambda I)^-1, float32, and a: ``strength``, or measured where that is None.

    W and 0 where a is 0 or there is no correction. Where a is to be measured and cannot be, since all tokens are in one
    half, it is ``LARGEST``."""
    weight = weight.float()
    if correction is None or strength == 0:
        return weight, 0.0
    if strength is None:
        shift, strength = correction.measured(weight)
    else:
        shift = correction.correction_of(weight)
    return weight.add(shift, alpha=strength), strength


def bearable_share(signal: float, noise: float) -> float:
    """min(0.5, 1 - noise / signal), not below 0, of the squares of W (D1 + D2) U^T and W (D1 - D2) U^T; 0 where there
    is no signal."""
    return min(LARGEST, max(0.0, 1.0 - noise / signal)) if signal > 0 else 0.0


def squares(rows: Float[Tensor, "rows cols"]) -> float:
    """The sum of the squares, rows added in float64."""
    return float(torch.linalg.vector_norm(rows, dim=1).double().square().sum())


def multiply_by_inverse(factor: Factor, rows: Float[Tensor, "rows cols"]) -> Float[Tensor, "rows cols"]:
    """rows (H + lambda I)^-1 = rows U^T U, columns in original order."""
    return _multiply_by_inverse(factor, rows.index_select(1, factor.order))


def multiply_by_upper(factor: Factor, rows: Float[Tensor, "rows cols"]) -> Float[Tensor, "rows cols"]:
    """rows U: columns in elimination order before, and in original order after."""
    return (rows @ factor.upper).index_select(1, torch.argsort(factor.order))


def _multiply_by_inverse(factor: Factor, rows: Tensor) -> Tensor:
    """The same of rows whose columns are in elimination order; the result's columns are in original order."""
    return multiply_by_upper(factor, rows @ factor.upper.T)
