"""Mixtures of experts with one nn.Linear for each matrix of each expert, under the names that checkpoints store.

transformers 5 holds all experts of a block in two fused tensors (storage/fused.py). ``unfuse_experts`` replaces each
such module by ``Experts``: the same sums in the same order, but every matrix is a linear that can be read, quantized
and packed on its own. The forward pass has two stages, every expert's gate and up, then every expert's down, and calls
``before_stage`` before each, where the walk (walk.py) pauses it to read the inputs."""

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from leangrid.storage.fused import FUSED, MIXTRAL, PLAIN


class Experts(nn.ModuleList):
    """The experts of one block; child ``3`` is expert 3 with its three linears.

    Attributes:
        names: the checkpoint's names of gate, up and down.
        before_stage: called before a stage multiplies, with its number (0 or 1) and the inputs of each expert,
            [tokens routed to it, cols]; None: nothing is called.
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
        self.before_stage: Callable[[int, list[Tensor]], None] | None = None

    def __len__(self) -> int:
        return sum(name.isdigit() for name in self._modules)

    def stage(self, number: int) -> tuple[tuple[str, ...], ...]:
        """The names, relative to this module, of the linears that read the inputs of stage ``number``: a tuple for each
        expert."""
        parts = self.names[:2] if number == 0 else self.names[2:]
        return tuple(tuple(f"{expert}.{part}" for part in parts) for expert in range(len(self)))

    def forward(
        self,
        hidden_states: Float[Tensor, "tokens hidden"],
        top_k_index: Int[Tensor, "tokens k"],
        top_k_weights: Float[Tensor, "tokens k"],
    ) -> Float[Tensor, "tokens hidden"]:
        """The weighted sum of each token's experts, added in ascending order of experts as transformers does.

        Args:
            hidden_states: the tokens.
            top_k_index: which k experts each token is routed to.
            top_k_weights: their weights.
        """
        gate, up, down = self.names
        # Of each expert: which of its tokens' k choices it is, and which tokens.
        routed = [torch.where((top_k_index == expert).T) for expert in range(len(self))]
        active = [expert for expert, (_, tokens) in enumerate(routed) if len(tokens)]
        if self.before_stage is not None:
            self.before_stage(0, [hidden_states[tokens] for _, tokens in routed])
        # Stage 0: act(gate(x)) * up(x) of each expert.
        inner: dict[int, Tensor] = {}
        for expert in active:
            x, linears = hidden_states[routed[expert][1]], self._linears(expert)
            inner[expert] = self.act_fn(linears[gate](x)) * linears[up](x)
        if self.before_stage is not None:
            empty = hidden_states.new_empty(0, self._linears(0)[down].in_features)
            self.before_stage(1, [inner.get(expert, empty) for expert in range(len(self))])
        # Stage 1: down, weighted and added to the tokens.
        out = torch.zeros_like(hidden_states)
        for expert in active:
            choice, tokens = routed[expert]
            weighted = self._linears(expert)[down](inner.pop(expert)) * top_k_weights[tokens, choice, None]
            out.index_add_(0, tokens, weighted.to(out.dtype))
        return out

    def _linears(self, expert: int) -> Any:
        return self._modules[str(expert)]


def unfuse_experts(model: nn.Module, mixtral: bool = False) -> bool:
    """Replace every module of ``model`` with fused experts by ``Experts`` without weights; True if there were any.

    ``mixtral``: also rename ``mlp`` to ``block_sparse_moe``, as Mixtral's checkpoints call it."""
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
            # The layer's forward reads the old name. A plain attribute is no submodule: there is one set of weights.
            object.__setattr__(layer, "mlp", mixture)
    return bool(found)


def experts_of_group(block: nn.Module, names: tuple[str, ...]) -> tuple[str, "Experts", int] | None:
    """For a group whose linears ``names`` belong to experts: the path of their ``Experts`` in ``block``, the module,
    and the stage (0 or 1) in which they are computed. None for a group of other linears."""
    path = names[0].rpartition(".")[0].rpartition(".")[0]
    module = block.get_submodule(path) if path else block
    return (path, module, int(names[0].rpartition(".")[2] == module.names[2])) if isinstance(module, Experts) else None
