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

from leangrid.solve.factor import Factor


@dataclass(frozen=True, eq=False)
class Correction:
    """(G - H)(H + lambda I)^-1, to be multiplied from the left by weights.

    Args:
        matrix: float32; the whole product, columns in original order, where ``solved``; else G - H alone, columns in
            elimination order, and the few rows that are multiplied by it are solved one layer at a time.
        factor: of H.
        solved: which of the two.
    """

    matrix: Float[Tensor, "cols cols"]
    factor: Factor
    solved: bool

    @classmethod
    def of(
        cls, matrix: Float[Tensor, "cols cols"], cross: Float[Tensor, "cols cols"], factor: Factor, rows: int
    ) -> "Correction":
        """From H (``matrix``, undamped) and G (``cross``), both in original order, and the factor of H; for ``rows``
        rows in all."""
        difference = torch.sub(cross, matrix).index_select(1, factor.order)
        return (
            cls(_in_order(factor, difference), factor, True) if rows >= len(matrix) else cls(difference, factor, False)
        )

    def shift(self, weight: Float[Tensor, "rows cols"]) -> Float[Tensor, "rows cols"]:
        """W (G - H)(H + lambda I)^-1, float32."""
        product = weight @ self.matrix
        return product if self.solved else _in_order(self.factor, product)


def correct(
    weight: Float[Tensor, "rows cols"], correction: Correction | None, strength: float
) -> Float[Tensor, "rows cols"]:
    """W~ = W + a W (G - H)(H + lambda I)^-1, float32, a = ``strength``; 0 or no correction returns the weights
    unchanged."""
    weight = weight.float()
    return weight if correction is None or strength == 0 else weight.add(correction.shift(weight), alpha=strength)


def solved(factor: Factor, rows: Float[Tensor, "rows cols"]) -> Float[Tensor, "rows cols"]:
    """rows (H + lambda I)^-1 = rows U^T U, columns in original order."""
    return _in_order(factor, rows.index_select(1, factor.order))


def _in_order(factor: Factor, rows: Tensor) -> Tensor:
    """``solved`` of rows whose columns stand in elimination order."""
    return ((rows @ factor.upper.T) @ factor.upper).index_select(1, torch.argsort(factor.order))
