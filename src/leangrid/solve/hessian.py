"""The layer Hessian H = 2/N X~^T X~ from batches of inputs, and G = 2/N X^T X~ for the correction of the inputs' error.

One row of X~ is one token's input in the quantized model, of X in the original one. Sums are float32 and unscaled: the
division by N comes last, so that any split into batches counts every token once. Only the upper triangle of X~^T X~ is
computed. Inputs in bfloat16 are multiplied as they are: their products are exact in float32."""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Shaped
from torch import Tensor

from leangrid import kernels
from leangrid.errors import CalibrationError, NumericalError, ShapeError
from leangrid.solve.rescue import Rescue

MAX_DROPPED = 0.1  # share of tokens with non-finite activations above which a run stops
MIRROR_PANEL = 256  # columns whose two triangles stay in the cache


@dataclass(frozen=True, eq=False)
class Hessian:
    """H and G of one input.

    Attributes:
        matrix: H = 2/N X~^T X~, float32 [cols, cols].
        cross: G = 2/N X^T X~, likewise; None where only one stream was summed.
        tokens: N.
        dropped: tokens that were left out because an activation was not finite.
        blended: rescues of a Hessian that was mixed with another (run/experts.py).
    """

    matrix: Float[Tensor, "cols cols"]
    cross: Float[Tensor, "cols cols"] | None
    tokens: int
    dropped: int
    blended: tuple[Rescue, ...] = ()

    @property
    def rescues(self) -> tuple[Rescue, ...]:
        """The tokens that were dropped, if any, and ``blended``."""
        if not self.dropped:
            return self.blended
        return (
            *self.blended,
            Rescue(
                "nonfinite_tokens",
                f"{self.dropped} of {self.tokens + self.dropped} tokens were not finite",
                self.dropped,
            ),
        )


class HessianSum:
    """Sums of a Hessian over batches of tokens.

    Args:
        cols: columns of the layer.
        device: where the sums are.
        cross: whether G is summed, too, from pairs of original and quantized inputs.

    Example:
        >>> from leangrid.solve.hessian import HessianSum
        >>> total = HessianSum(cols=2)
        >>> total.add(torch.tensor([[1.0, 0.0], [1.0, 2.0]]))  # two tokens
        >>> total.finish().matrix
        tensor([[2., 2.],
                [2., 4.]])
    """

    def __init__(self, cols: int, device: torch.device | str = "cpu", cross: bool = False) -> None:
        self.cols, self.tokens, self.dropped = cols, 0, 0
        self._matrix = torch.zeros(cols, cols, device=device)
        self._cross = torch.zeros(cols, cols, device=device) if cross else None

    def add(self, x: Shaped[Tensor, "... cols"]) -> None:
        """Add the tokens of ``x`` [..., cols]; for G, both streams are ``x``."""
        self._accumulate(self._tokens(x), None)

    def add_pair(self, original: Shaped[Tensor, "... cols"], quantized: Shaped[Tensor, "... cols"]) -> None:
        """Add the same tokens [..., cols] as the original and the quantized model see them; a token that is not finite
        in one of them is dropped from both."""
        if original.shape != quantized.shape:
            raise ShapeError(
                f"streams of shapes {tuple(original.shape)} and {tuple(quantized.shape)} are not the same tokens",
                "hessian",
            )
        self._accumulate(self._tokens(quantized), self._tokens(original) if self._cross is not None else None)

    def parts(self) -> list[Tensor]:
        """The unscaled sums themselves, not copies, float32 [cols, cols]: X~^T X~ and, if summed, X^T X~."""
        return [self._matrix] if self._cross is None else [self._matrix, self._cross]

    def finish(self) -> Hessian:
        """The Hessian of all tokens so far.

        Raises:
            CalibrationError: no token was ever added (the layer did not run).
            NumericalError: more than a tenth of the tokens were not finite, or the sums overflowed.
        """
        seen = self.tokens + self.dropped
        if seen == 0:
            raise CalibrationError(
                "the layer saw no calibration tokens",
                "hessian",
                "Use more or other calibration text (--samples, --calibration)",
            )
        if self.dropped > MAX_DROPPED * seen:
            raise NumericalError(
                f"{self.dropped} of {seen} tokens have NaN or infinite activations",
                "hessian",
                "Run the model in float32 or bfloat16",
            )
        matrix = mirror_(self._matrix * (2.0 / self.tokens))
        cross = None if self._cross is None else self._cross * (2.0 / self.tokens)
        if not bool(matrix.sum().isfinite()) or (cross is not None and not bool(cross.sum().isfinite())):
            raise NumericalError(
                "the sum of squared activations overflows float32",
                "hessian",
                "Check the checkpoint: activations beyond 1e18",
            )
        return Hessian(matrix, cross, self.tokens, self.dropped)

    def _tokens(self, x: Tensor) -> Tensor:
        if x.shape[-1] != self.cols:
            raise ShapeError(f"inputs have {x.shape[-1]} columns, the layer has {self.cols}", "hessian")
        dtype = torch.bfloat16 if x.dtype == torch.bfloat16 else torch.float32
        return x.detach().reshape(-1, self.cols).to(self._matrix.device, dtype).contiguous()

    def _accumulate(self, x: Tensor, original: Tensor | None) -> None:
        streams = [x] if original is None else [x, original]
        # One pass over x; tokens are looked at singly only if something is not finite.
        if not all(kernels.squares_are_finite(s) for s in streams):
            good = torch.stack([_finite_rows(s) for s in streams]).all(0)
            self.dropped += int((~good).sum())
            x, original = x[good], None if original is None else original[good]
        self.tokens += x.shape[0]
        if self._cross is not None and original is None:
            original = x
        kernels.outer_sums(x, self._matrix, original, self._cross)


def _finite_rows(x: Float[Tensor, "tokens cols"]) -> Bool[Tensor, " tokens"]:
    """Rows whose squares sum to a float32: the product would otherwise overflow in every column it touches."""
    return torch.linalg.vector_norm(x, dim=1, dtype=torch.float32).isfinite()


def mirror_(matrix: Float[Tensor, "cols cols"]) -> Float[Tensor, "cols cols"]:
    """The matrix with its upper triangle copied onto the lower, in place, panel by panel."""
    for start in range(0, len(matrix), MIRROR_PANEL):
        stop = start + MIRROR_PANEL
        matrix[stop:, start:stop] = matrix[start:stop, stop:].T
        corner = matrix[start:stop, start:stop]
        corner.copy_(corner.triu() + corner.triu(1).T)
    return matrix
