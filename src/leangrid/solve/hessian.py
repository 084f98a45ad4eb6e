"""The layer Hessian H = 2/N X~^T X~ from batches of inputs, and G = 2/N X^T X~ for the correction of the inputs' error.

One row of X~ is one token's input in the quantized model, of X in the original one. Sums are float32 and unscaled: the
division by N comes last, so that any split into batches counts every token once. Only the upper triangle of X~^T X~ is
computed. Inputs in bfloat16 are multiplied as they are: their products are exact in float32.

How far G - H can be trusted is seen from two halves of the tokens: where D1 and D2 are their sums of X^T X~ - X~^T X~,
the noise of D1 + D2 is D1 - D2. D1 is what X^T X~ - X~^T X~ grew by while tokens of the first half were added: one
matrix more, and no product."""

import math
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
        cross: G = 2/N X^T X~, likewise; None where only one stream was summed, or where the halves are apart and the
            streams were equal in every token: then G - H is nothing but rounding.
        tokens: N.
        dropped: tokens that were left out because an activation was not finite.
        blended: rescues of a Hessian that was mixed with another (run/experts.py).
        noise: as large as the noise of G - H, likewise: 2/N (D1 - D2) where both halves have as many tokens, and
            2 / sqrt(n m) (D1 - n/N (D1 + D2)) where they have n and m. None where the halves are not apart, or one of
            them has no tokens.
    """

    matrix: Float[Tensor, "cols cols"]
    cross: Float[Tensor, "cols cols"] | None
    tokens: int
    dropped: int
    blended: tuple[Rescue, ...] = ()
    noise: Float[Tensor, "cols cols"] | None = None

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
        halves: whether the halves of the tokens are kept apart (with ``cross`` only); ``begin_half`` says which comes.

    Attributes:
        counts: [tokens, dropped tokens, tokens of the first half, batches in which the streams were seen to differ].
            Those of several sums may be added up. The last is 1 as soon as they differ once, and 0 without halves.

    Example:
        >>> from leangrid.solve.hessian import HessianSum
        >>> total = HessianSum(cols=2)
        >>> total.add(torch.tensor([[1.0, 0.0], [1.0, 2.0]]))  # two tokens
        >>> total.finish().matrix
        tensor([[2., 2.],
                [2., 4.]])
    """

    def __init__(
        self, cols: int, device: torch.device | str = "cpu", cross: bool = False, halves: bool = False
    ) -> None:
        self.cols, self.counts = cols, [0, 0, 0, 0]
        self._matrix = torch.zeros(cols, cols, device=device)
        self._cross = torch.zeros(cols, cols, device=device) if cross else None
        self._first = torch.zeros(cols, cols, device=device) if cross and halves else None  # D1
        self._in_first = False

    @property
    def tokens(self) -> int:
        """Tokens so far, without those that were dropped."""
        return self.counts[0]

    @property
    def dropped(self) -> int:
        """Tokens that were left out."""
        return self.counts[1]

    def begin_half(self, first: bool) -> None:
        """Say in which half the next tokens are; before the first call, in the second."""
        if first == self._in_first:
            return
        self._in_first = first
        if self._first is not None and self._cross is not None and self.tokens:
            _add_difference_(self._first, self._cross, self._matrix, -1 if first else 1)

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
        """The unscaled sums themselves, not copies, float32 [cols, cols]: X~^T X~ and, if summed, X^T X~ and D1."""
        self.begin_half(False)
        return [part for part in (self._matrix, self._cross, self._first) if part is not None]

    def finish(self) -> Hessian:
        """The Hessian of all tokens so far.

        Raises:
            CalibrationError: no token was ever added (the layer did not run).
            NumericalError: more than a tenth of the tokens were not finite, or the sums overflowed.
        """
        self._check_tokens()
        self.begin_half(False)
        matrix = mirror_(self._matrix * (2.0 / self.tokens))
        cross = None if self._cross is None else self._cross * (2.0 / self.tokens)
        self._check_sums(matrix, cross)
        noise = self._first.clone() if self._first is not None and self._measures_noise else None
        return self._finished(matrix, cross, noise)

    def _check_tokens(self) -> None:
        """CalibrationError or NumericalError where there are too few tokens."""
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

    def _check_sums(self, matrix: Tensor, cross: Tensor | None) -> None:
        """NumericalError where a sum has overflowed."""
        if not bool(matrix.sum().isfinite()) or (cross is not None and not bool(cross.sum().isfinite())):
            raise NumericalError(
                "the sum of squared activations overflows float32",
                "hessian",
                "Check the checkpoint: activations beyond 1e18",
            )

    @property
    def _measures_noise(self) -> bool:
        """Whether there is a difference between the streams, and tokens in both halves to measure its noise by."""
        tokens, _, first, different = self.counts
        return self._first is not None and different > 0 and 0 < first < tokens

    def _finished(self, matrix: Tensor, cross: Tensor | None, first: Tensor | None) -> Hessian:
        """The Hessian of H, G and, where noise is measured, D1, which becomes the noise in place."""
        tokens, dropped, count, different = self.counts
        if first is not None and cross is not None:
            scale = 2.0 / math.sqrt(count * (tokens - count))
            share = scale * count / 2.0  # G and H are 2/N of the sums
            first.mul_(scale).sub_(cross, alpha=share).add_(matrix, alpha=share)
        if self._first is not None and not different:
            cross = None
        return Hessian(matrix, cross, tokens, dropped, noise=first)

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
            self.counts[1] += int((~good).sum())
            x, original = x[good], None if original is None else original[good]
        self.counts[0] += x.shape[0]
        self.counts[2] += x.shape[0] if self._in_first else 0
        if self._cross is not None and original is None:
            original = x
        if self._first is not None and original is not None and not self.counts[3]:
            self.counts[3] = int(not torch.equal(x, original))
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


def _add_difference_(total: Tensor, cross: Tensor, matrix: Tensor, sign: int) -> None:
    """``total`` += ``sign`` (cross - matrix) in place, panel by panel; of ``matrix`` the upper triangle is read."""
    total.add_(cross, alpha=sign)
    for start in range(0, len(matrix), MIRROR_PANEL):
        stop = start + MIRROR_PANEL
        total[stop:, start:stop].sub_(matrix[start:stop, stop:].T, alpha=sign)
        total[start:stop, stop:].sub_(matrix[start:stop, stop:], alpha=sign)
        corner = matrix[start:stop, start:stop]
        total[start:stop, start:stop].sub_(corner.triu() + corner.triu(1).T, alpha=sign)
