"""Correct the input's own error: a target W~ whose output on the quantized prefix's inputs is the original's output.

min ||W X - W^ X~||^2 over W^ has the same minimiser as the plain problem around W~ = W G H^-1, with H = 2/N X~^T X~ and
G = 2/N X^T X~ (rows of X are tokens). Damped, and taken only a share ``a`` of the way:
    W~ = W + a W (G - H)(H + lambda I)^-1.
a = 1 and lambda = 0 is the least-squares target; it overfits when tokens are few, and a = 0.5 is the measured default.
The inverse is that of the layer's factor, U^T U: nothing is factored twice.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from leangrid.factor import Factor


@dataclass(frozen=True, eq=False)
class Correction:
    """(G - H)(H + lambda I)^-1, to be multiplied from the left by weights: once for the group, or by each layer's few rows.

    Args:
        difference: G - H, float32, columns in elimination order.
        factor: of H.
        product: (G - H) U^T U, columns in original order, where the rows that will come outnumber the columns.
    """

    difference: Float[Tensor, "cols cols"]
    factor: Factor
    product: Float[Tensor, "cols cols"] | None

    @classmethod
    def of(cls, matrix: Float[Tensor, "cols cols"], cross: Float[Tensor, "cols cols"], factor: Factor, rows: int) -> "Correction":
        """From H (``matrix``, undamped) and G (``cross``), both in original order, and the factor of H; for ``rows`` rows in all."""
        difference = torch.sub(cross, matrix).index_select(1, factor.order)
        solved = _solve(difference, factor) if rows >= len(matrix) else None
        return cls(difference, factor, solved)

    def shift(self, weight: Float[Tensor, "rows cols"]) -> Float[Tensor, "rows cols"]:
        """W (G - H)(H + lambda I)^-1, float32."""
        return weight @ self.product if self.product is not None else _solve(weight @ self.difference, self.factor)


def correct(weight: Float[Tensor, "rows cols"], correction: Correction | None, strength: float) -> Float[Tensor, "rows cols"]:
    """W~ = W + a W (G - H)(H + lambda I)^-1, float32, a = ``strength``; 0 or no correction returns the weights unchanged."""
    weight = weight.float()
    return weight if correction is None or strength == 0 else weight.add(correction.shift(weight), alpha=strength)


def _solve(right: Tensor, factor: Factor) -> Tensor:
    """right U^T U: columns of ``right`` in elimination order, of the result in original order."""
    return ((right @ factor.upper.T) @ factor.upper).index_select(1, torch.argsort(factor.order))
