"""How much the predictions of a model feel a change of its hidden states: the Fisher information, by drawn gradients.

Of a small change d of the state at one token, KL(before || after) of the predictions is d' F d / 2. F is the mean of
g g' over labels y that are drawn from the model's own predictions, where g is the gradient of log p(y) by the state
(Martens 2020, arXiv 1412.1193). BRECQ (Li et al. 2021, arXiv 2102.05426) weighs the error of a block by the diagonal of
such an F. Here a few drawn g stand for all of it, of each token its own. They are cut where a change in proportion to
the state would be felt far more than at other tokens: states of some first tokens are a hundred times as long as
others (Sun et al. 2024, arXiv 2402.17762), and a second derivative says nothing of changes that large.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from leangrid.solve.gradient import gradients

_CUT = 4  # times the median over tokens of |g| |state|


def draw_gradients(
    output: Float[Tensor, "windows length width"],
    states: Sequence[Float[Tensor, "..."]],
    draws: int,
    generator: torch.Generator,
    predicts: bool,
) -> list[Float[Tensor, "draws ..."]]:
    """The gradients by each of ``states`` of the log-probability of drawn labels.

    Args:
        output: logits of the next token, differentiable by ``states``; without ``predicts`` last hidden states.
        states: those that leave each block, of any shape, as [windows, length, hidden].
        draws: how many times labels are drawn.
        generator: of the labels, on the CPU.
        predicts: whether ``output`` are logits. Of other models the relative change of the output takes the place of
            KL: the gradient is that of its product with a drawn direction, over its length.

    Raises:
        NoGradient: code of the model lets none through.
    """
    told = output.float()
    if predicts:
        told = told.log_softmax(-1).flatten(0, -2)
        chances = told.detach().exp().cpu()
    else:
        told = told / told.detach().norm(dim=-1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
    found: list[list[Tensor]] = [[] for _ in states]
    for number in range(draws):
        if predicts:
            labels = torch.multinomial(chances, 1, generator=generator)
            total = told.gather(-1, labels.to(told.device)).sum()
        else:
            total = (told * torch.randn(told.shape, generator=generator).to(told.device)).sum()
        slopes = gradients(total, states, keep=number + 1 < draws)
        for one, slope in zip(found, slopes, strict=True):
            one.append(slope.detach())
    return [_cut(torch.stack(one), state.detach()) for one, state in zip(found, states, strict=True)]


def _cut(drawn: Float[Tensor, "draws *tokens hidden"], states: Float[Tensor, "*tokens hidden"]) -> Tensor:
    """``drawn`` with no token's |g| |state| above ``_CUT`` times the median of all tokens."""
    sizes = drawn.float().square().mean(0).sum(-1).sqrt() * states.float().norm(dim=-1)
    most = _CUT * sizes.median()
    return drawn * torch.where(sizes > most, most / sizes, 1.0)[..., None].to(drawn.dtype)


def felt_change(
    change: Float[Tensor, "*tokens hidden"], gradients: Float[Tensor, "draws *tokens hidden"]
) -> Float[Tensor, ""]:
    """The mean over tokens and drawn gradients g of (g . change)^2: an estimate of change' F change."""
    return (gradients.to(change.dtype) * change).sum(-1).square().mean()
