"""Mixtures of experts with one nn.Linear for each matrix of each expert, under the names that checkpoints store.

transformers 5 holds all experts of a block in two fused tensors (storage/fused.py). ``separate`` puts an ``Experts`` in
the place of each such module: the same sums in the same order, but every matrix is a linear that can be read, replaced
and packed on its own. It multiplies in two stages (every expert's gate and up, then every expert's down), and whoever
walks through the block may stop a pass before either."""

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from leangrid.storage.fused import FUSED, MIXTRAL, PLAIN


class Experts(nn.ModuleList):
    """The experts of one block; child ``3`` is expert 3 with its three linears.

    Attributes:
        names: what the family calls gate, up and down.
        stop: is called with (stage 0 or 1, the inputs of every expert: [tokens routed to it, cols] each) before a stage
        multiplies.
    """

    def __init__(
        self,
        count: int,
        hidden: int,
        intermediate: int,
        act: nn.Module,
        names: tuple[str, str, str],
        dtype: torch.dtype,
    ) -> None:
        gate, up, down = names
        shapes = {gate: (hidden, intermediate), up: (hidden, intermediate), down: (intermediate, hidden)}
        super().__init__(
            nn.ModuleDict(
                {
                    name: nn.Linear(cols, rows, bias=False, dtype=dtype, device="meta")
                    for name, (cols, rows) in shapes.items()
                }
            )
            for _ in range(count)
        )
        self.names = names
        self.act_fn = act
        self.stop: Callable[[int, list[Tensor]], None] | None = None

    def __len__(self) -> int:
        return sum(name.isdigit() for name in self._modules)

    def stage(self, number: int) -> tuple[tuple[str, ...], ...]:
        """Names of the linears that read stage ``number``'s inputs, an expert at a time, from this module."""
        parts = self.names[:2] if number == 0 else self.names[2:]
        return tuple(tuple(f"{expert}.{part}" for part in parts) for expert in range(len(self)))

    def forward(
        self,
        hidden_states: Float[Tensor, "tokens hidden"],
        top_k_index: Int[Tensor, "tokens k"],
        top_k_weights: Float[Tensor, "tokens k"],
    ) -> Float[Tensor, "tokens hidden"]:
        """The weighted sum of each token's experts; expert by expert in ascending order, as transformers adds them."""
        gate, up, down = self.names
        routed = [
            torch.where((top_k_index == expert).T) for expert in range(len(self))
        ]  # (which of the k, which token)
        active = [expert for expert, (_, tokens) in enumerate(routed) if len(tokens)]
        if self.stop is not None:
            self.stop(0, [hidden_states[tokens] for _, tokens in routed])
        inner: dict[int, Tensor] = {}
        for expert in active:
            x, linears = hidden_states[routed[expert][1]], self._linears(expert)
            inner[expert] = self.act_fn(linears[gate](x)) * linears[up](x)
        if self.stop is not None:
            empty = hidden_states.new_empty(0, self._linears(0)[down].in_features)
            self.stop(1, [inner.get(expert, empty) for expert in range(len(self))])
        out = torch.zeros_like(hidden_states)
        for expert in active:
            choice, tokens = routed[expert]
            weighted = self._linears(expert)[down](inner.pop(expert)) * top_k_weights[tokens, choice, None]
            out.index_add_(0, tokens, weighted.to(out.dtype))
        return out

    def _linears(self, expert: int) -> Any:
        return self._modules[str(expert)]


def separate(model: nn.Module, mixtral: bool = False) -> bool:
    """Put ``Experts`` (without weights) in the place of every fused module of ``model``; True if there were any.

    With ``mixtral`` the block's mixture is also named as Mixtral's checkpoints do: ``block_sparse_moe`` instead of
    ``mlp``."""
    found = [
        (name, module)
        for name, module in model.named_modules()
        if all(getattr(module.__dict__["_parameters"].get(part), "ndim", 0) == 3 for part in FUSED)
    ]
    for name, module in found:
        fused: Any = module
        count, hidden, intermediate = fused.down_proj.shape
        own = Experts(count, hidden, intermediate, fused.act_fn, MIXTRAL if mixtral else PLAIN, fused.down_proj.dtype)
        model.set_submodule(name, own.train(fused.training))
        if mixtral:
            layer: Any = model.get_submodule(name.removesuffix(".mlp.experts"))
            mixture = layer._modules.pop("mlp")
            layer.block_sparse_moe = mixture
            object.__setattr__(
                layer, "mlp", mixture
            )  # the layer's forward asks for it under this name; a plain attribute is no module
    return bool(found)


def of_group(block: nn.Module, names: tuple[str, ...]) -> tuple[str, "Experts", int] | None:
    """Where the linears ``names`` of a group are experts': the path of the mixture in ``block``, it, and the stage they
    belong to."""
    path = names[0].rpartition(".")[0].rpartition(".")[0]
    module = block.get_submodule(path) if path else block
    return (path, module, int(names[0].rpartition(".")[2] == module.names[2])) if isinstance(module, Experts) else None
