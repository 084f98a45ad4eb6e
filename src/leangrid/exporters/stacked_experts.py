"""Experts that a result holds one by one, in the tensors of all experts that mlx-lm's models have.

mlx-lm stacks dense experts as it reads them, and writes what it has quantized stacked. Of packed experts one by one
only some of its models make the same, so an export to MLX stacks them where mlx-lm, asked, opens nothing else."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from leangrid.formats.base import Layout
from leangrid.models.expert_forms import DOWN, UP
from leangrid.models.result_reader import ResultReader

# Where mlx-lm's models keep all experts of a mixture: (its name in the files, that of the module around it) -> prefix.
_PLACES: tuple[Callable[[str, str], str], ...] = (
    lambda experts, around: f"{around}.switch_mlp",
    lambda experts, around: experts,
    lambda experts, around: f"{experts}.switch_glu",
)
_WITHOUT_GATE = {UP: "fc1", DOWN: "fc2"}  # its names for the linears of experts that have no gate


@dataclass(frozen=True)
class StackedLinear:
    """One linear of every expert of a mixture.

    Attributes:
        name: the name for all.
        layers: the layers of the result, expert by expert.
    """

    name: str
    layers: tuple[str, ...]

    def layout(self, layouts: Mapping[str, Layout]) -> Layout:
        """Its tensors, by those of the layers."""
        return {
            suffix: (dtype, (len(self.layers), *shape)) for suffix, (dtype, shape) in layouts[self.layers[0]].items()
        }

    def pack(self, pack: Callable[[str], dict[str, Tensor]]) -> dict[str, Tensor]:
        """Its tensors, by what ``pack`` makes of each layer."""
        packed = [pack(layer) for layer in self.layers]
        return {suffix: torch.stack([one[suffix] for one in packed]) for suffix in packed[0]}


def stackings(result: ResultReader) -> list[list[StackedLinear]]:
    """The ways in which the experts of all mixtures may be stacked: one for each place where mlx-lm's models keep
    them. None for a result whose experts are not quantized as a whole, by one scheme, or have biases."""
    if not result.expert_forms or any(form.biased for form in result.expert_forms.values()):
        return []
    names = {result.path_of(name): name for name in result.layers}
    mixtures: list[tuple[str, dict[str, tuple[str, ...]]]] = []
    for path, form in result.expert_forms.items():
        wanted = {leaf: [f"{path}.{expert}.{leaf}" for expert in range(form.count)] for leaf in form.leaves}
        if any(one not in names for paths in wanted.values() for one in paths):
            return []
        layers = {leaf: tuple(names[one] for one in paths) for leaf, paths in wanted.items()}
        if any(result.schemes[layer] != result.schemes[one[0]] for one in layers.values() for layer in one):
            return []
        named = layers if form.gated else {_WITHOUT_GATE.get(leaf, leaf): one for leaf, one in layers.items()}
        mixtures.append((next(iter(layers.values()))[0].rsplit(".", 2)[0], named))
    return [
        [
            StackedLinear(f"{place(experts, experts.rpartition('.')[0])}.{leaf}", layers)
            for experts, linears in mixtures
            for leaf, layers in linears.items()
        ]
        for place in _PLACES
    ]
