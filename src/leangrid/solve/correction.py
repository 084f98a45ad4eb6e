"""Correct the error of the inputs: a target W~ whose output on the quantized model's inputs is the original output.

A layer is quantized when its inputs already come from quantized layers. With X the inputs of the original model and X~
those of the quantized one (one row a token), min ||X W^T - X~ W^^T||^2 over W^ has the same minimiser as the plain
problem around W G H^-1, with H = 2/N X~^T X~ and G = 2/N X^T X~. Damped, and taken only a share ``a`` of the way:

    W~ = W + a W (G - H)(H + lambda I)^-1

a = 1 and lambda = 0 is the least-squares target. It overfits where tokens are few, and a = 0.5 is the measured default.
(H + lambda I)^-1 is U^T U of the layer's factor: nothing is factored twice."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from leangrid.solve.factor import Factor


@dataclass(frozen=True, eq=False)
class Correction:
    """(G - H)(H + lambda I)^-1, which weights are multiplied by from the left.

    Attributes:
        matrix: float32. Where ``solved``: the whole product, columns in original order. Else G - H alone, columns in
            elimination order, and the few rows that are multiplied by it are solved for one layer at a time.
        factor: of H.
        solved: whether ``matrix`` is the whole product.
    """

    matrix: Float[Tensor, "cols cols"]
    factor: Factor
    solved: bool

    @classmethod
    def of(
        cls, hessian: Float[Tensor, "cols cols"], cross: Float[Tensor, "cols cols"], factor: Factor, rows: int
    ) -> "Correction":
        """From H undamped and G (``cross``), both in original column order, for layers of ``rows`` rows in all.

        With fewer rows than columns it is cheaper to solve for the rows than for the matrix."""
        difference = torch.sub(cross, hessian).index_select(1, factor.order)
        if rows < len(hessian):
            return cls(difference, factor, False)
        return cls(_multiply_by_inverse(factor, difference), factor, True)

    def correction_of(self, weight: Float[Tensor, "rows cols"]) -> Float[Tensor, "rows cols"]:
        """W (G - H)(H + lambda I)^-1, float32."""
        product = weight @ self.matrix
        return product if self.solved else _multiply_by_inverse(self.factor, product)


def correct(
    weight: Float[Tensor, "rows cols"], correction: Correction | None, strength: float
) -> Float[Tensor, "rows cols"]:
    """W~ = W + a W (G - H)(H + lambda I)^-1, float32, a = ``strength``; W where a is 0 or there is no correction."""
    weight = weight.float()
    if correction is None or strength == 0:
        return weight
    return weight.add(correction.correction_of(weight), alpha=strength)


def multiply_by_inverse(factor: Factor, rows: Float[Tensor, "rows cols"]) -> Float[Tensor, "rows cols"]:
    """rows (H + lambda I)^-1 = rows U^T U, columns in original order."""
    return _multiply_by_inverse(factor, rows.index_select(1, factor.order))


def _multiply_by_inverse(factor: Factor, rows: Tensor) -> Tensor:
    """The same of rows whose columns are in elimination order; the result's columns are in original order."""
    return ((rows @ factor.upper.T) @ factor.upper).index_select(1, torch.argsort(factor.order))
