"""Mixtures of experts with one nn.Linear for each matrix of each expert.

transformers 5 holds all experts of a block in a few fused tensors (expert_forms.py). ``unfuse_experts`` replaces each
such module by ``Experts``: the same sums in the same order, but every matrix is a linear that can be read, quantized
and packed on its own. The forward pass has stages, in most every expert's gate and up, then every expert's down, and
calls ``before_stage`` before each, where the walk (walk.py) pauses it to read the inputs."""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from leangrid.models.expert_forms import DOWN, GATE, LINEAR, UP, FusedForm, form_of, own_gate


class Experts(nn.ModuleList):
    """The experts of one block; child ``3`` is expert 3 with its linears, once ``make_linears`` was called: a model has
    tens of thousands of them, which differ in nothing but their weights.

    Args:
        form: shapes, and how the fused module computes.
        fused: that module, whose activation, gate and norm are used; its parameters are not.

    Attributes:
        form: of the fused module.
        before_stage: called before a stage multiplies, with its number and the inputs of each expert, [tokens routed to
            it, cols]; None: nothing is called.
    """

    def __init__(self, form: FusedForm, fused: nn.Module) -> None:
        super().__init__()
        self.form = form
        self.act_fn: Any
        self.post_expert_norm: Any
        dtype = fused.get_parameter(min(form.fused_names)).dtype
        example = {
            leaf: nn.Linear(cols, rows, bias=form.biased, dtype=dtype, device="meta")
            for leaves in form.stages
            for leaf in leaves
            for rows, cols in (form.shape(leaf),)
        }
        object.__setattr__(self, "_example", nn.ModuleDict(example))  # what each expert is a copy of; no child
        for part in ("act_fn", "post_expert_norm", "identity_expert"):
            if hasattr(fused, part):
                setattr(self, part, getattr(fused, part))
        object.__setattr__(self, "_own_gate", own_gate(fused))
        self.before_stage: Callable[[int, list[Tensor]], None] | None = None

    def __len__(self) -> int:
        return self.form.count

    def make_linears(self) -> None:
        """Give each expert its linears, on the meta device, unless they are there."""
        if "0" not in self._modules:
            example: Any = self._example
            example.train(self.training)
            # Copying is ten times as fast as making them.
            self._modules.update({str(expert): _copied(example) for expert in range(len(self))})

    def drop_linears(self) -> None:
        """Let go of the experts' linears and their weights."""
        for expert in range(len(self)):
            self._modules.pop(str(expert), None)

    def parameter_names(self) -> Iterator[str]:
        """The names, relative to this module, of all its linears' parameters, expert after expert."""
        kinds = ("weight", "bias") if self.form.biased else ("weight",)
        leaves = [f"{leaf}.{kind}" for leaf in self.form.leaves for kind in kinds]
        return (f"{expert}.{leaf}" for expert in range(len(self)) for leaf in leaves)

    def choices(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> int:
        """Through how many of the experts a token goes in a call with these arguments."""
        index = args[1] if len(args) > 1 else kwargs.get("top_k_index")
        return index.shape[-1] if isinstance(index, Tensor) and index.ndim else len(self)

    @property
    def stages(self) -> int:
        """Stages of the forward pass."""
        return len(self.form.stages)

    def stage(self, number: int) -> tuple[tuple[str, ...], ...]:
        """The names, relative to this module, of the linears that read the inputs of stage ``number``: a tuple for each
        expert."""
        return _stage(self.form, number)

    def stage_paths(self, number: int, path: str) -> tuple[str, ...]:
        """The paths of all linears that read the inputs of stage ``number``, where this module is at ``path``."""
        return _stage_paths(self.form, number, path)

    def forward(
        self,
        hidden_states: Float[Tensor, "tokens hidden"],
        top_k_index: Int[Tensor, "tokens k"] | None = None,
        top_k_weights: Float[Tensor, "tokens k"] | None = None,
    ) -> Float[Tensor, "tokens hidden"]:
        """The weighted sum of each token's experts, added in ascending order of experts as transformers does.

        Args:
            hidden_states: the tokens; of a batched form as many rows for each expert, one expert after another.
            top_k_index: which k experts each token is routed to; a number past the last expert leaves the token as it
                is where the module has experts that do nothing, and is skipped elsewhere.
            top_k_weights: their weights.
        """
        if top_k_index is None or top_k_weights is None:  # batched
            shape, hidden_states = hidden_states.shape, hidden_states.reshape(-1, hidden_states.shape[-1])
            each = torch.arange(len(self), device=hidden_states.device)
            top_k_index = each.repeat_interleave(len(hidden_states) // len(self))[:, None]
            return self.forward(hidden_states, top_k_index, torch.ones_like(hidden_states[:, :1])).reshape(shape)
        # Of each expert: which of its tokens' k choices it is, and which tokens.
        routed = [torch.where((top_k_index == expert).T) for expert in range(len(self))]
        active = [expert for expert, (_, tokens) in enumerate(routed) if len(tokens)]
        if self.before_stage is not None:
            self.before_stage(0, [hidden_states[tokens] for _, tokens in routed])
        # Stage 0: act(gate(x)) * up(x) of each expert.
        inner = {expert: self._first_stage(expert, hidden_states[routed[expert][1]]) for expert in active}
        if self.before_stage is not None:
            empty = hidden_states.new_empty(0, self.form.inner)
            self.before_stage(1, [inner.get(expert, empty) for expert in range(len(self))])
        # Stage 1: down, weighted and added to the tokens.
        out = torch.zeros_like(hidden_states)
        for expert in active:
            choice, tokens = routed[expert]
            found = self._linears(expert)[DOWN](inner.pop(expert))
            if hasattr(self, "post_expert_norm"):
                found = self.post_expert_norm(found)  # pyright: ignore[reportCallIssue]
            weighted = found * top_k_weights[tokens, choice, None]
            out.index_add_(0, tokens, weighted.to(out.dtype))
        if hasattr(self, "identity_expert"):
            tokens, choice = torch.where(top_k_index >= len(self))
            same = hidden_states[tokens] * top_k_weights[tokens, choice, None]
            out.index_add_(0, tokens, same.to(out.dtype))
        return out

    def _first_stage(self, expert: int, x: Tensor) -> Tensor:
        linears = self._linears(expert)
        up = linears[UP](x)
        if not self.form.gated:
            return self.act_fn(up)
        gate = linears[GATE](x)
        own_gate: Any = self._own_gate
        if own_gate is None:
            return self.act_fn(gate) * up
        both = torch.stack((gate, up), -1).flatten(-2) if self.form.interleaved else torch.cat((gate, up), -1)
        return own_gate(both)

    def _linears(self, expert: int) -> Any:
        return self._modules[str(expert)]


class SharedExperts(Experts):
    """Experts that all read every token."""

    def forward(self, hidden_states: Float[Tensor, "... hidden"], *args: Tensor, **kwargs: Tensor) -> Tensor:
        """The sum of all experts, whose inner activations are multiplied by the other argument, the experts' weights
        for each token, [..., experts]."""
        (weights,) = (*args, *kwargs.values())
        tokens, scales = hidden_states.reshape(-1, hidden_states.shape[-1]), weights.reshape(-1, len(self))
        if self.before_stage is not None:
            self.before_stage(0, [tokens] * len(self))
        inner = [self._first_stage(expert, tokens) * scales[:, expert, None] for expert in range(len(self))]
        if self.before_stage is not None:
            self.before_stage(1, list(inner))
        out = torch.stack([self._linears(expert)[DOWN](x) for expert, x in enumerate(inner)])
        return out.float().sum(0).to(hidden_states.dtype).view(hidden_states.shape)


class SplitExperts(Experts):
    """Experts that are one matrix each, which their caller hands their rows."""

    def forward(self, hidden_states: Float[Tensor, "rows hidden"], *args: Any, **kwargs: Any) -> Tensor:
        """Each expert's rows multiplied by its matrix, [rows, out]. The other argument says how many rows each has."""
        (sizes,) = (*args, *kwargs.values())
        parts = hidden_states.split(sizes.tolist() if isinstance(sizes, Tensor) else list(sizes))
        if self.before_stage is not None:
            self.before_stage(0, list(parts))
        return torch.cat([self._linears(expert)[LINEAR](x) for expert, x in enumerate(parts)])


_CLASSES: dict[str, type[Experts]] = {"shared": SharedExperts, "split": SplitExperts}


@lru_cache(maxsize=64)  # blocks are alike
def _stage(form: FusedForm, number: int) -> tuple[tuple[str, ...], ...]:
    return tuple(tuple(f"{expert}.{leaf}" for leaf in form.stages[number]) for expert in range(form.count))


@lru_cache(maxsize=64)
def _stage_paths(form: FusedForm, number: int, path: str) -> tuple[str, ...]:
    dot = f"{path}." if path else ""
    return tuple(f"{dot}{name}" for names in _stage(form, number) for name in names)


def _copied(module: nn.Module) -> nn.Module:
    """A module like ``module``, whose parameters are on the meta device, with parameters and hooks of its own."""
    new = object.__new__(type(module))
    new.__dict__.update(
        {key: value.copy() if isinstance(value, dict) else value for key, value in vars(module).items()}
    )
    new._modules = {name: None if child is None else _copied(child) for name, child in module._modules.items()}
    new._parameters = {
        name: None if p is None else nn.Parameter(p.data, requires_grad=p.requires_grad)
        for name, p in module._parameters.items()
    }
    return new


def unfuse_experts(model: nn.Module, keep: Collection[str] = (), linears: bool = True) -> bool:
    """Replace every module of ``model`` with fused experts by ``Experts`` without weights, but those at the paths
    ``keep``; True if there were any. ``linears``: with their linears; False: ``make_linears`` is called later."""
    found = [(name, module, form) for name, module in model.named_modules() if (form := form_of(module)) is not None]
    found = [one for one in found if one[0] not in keep]
    for name, fused, form in found:
        own = _CLASSES.get(form.handed, Experts)(form, fused)
        model.set_submodule(name, own.train(fused.training))
        if linears:
            own.make_linears()
    return bool(found)


def experts_of_group(block: nn.Module, names: tuple[str, ...]) -> tuple[str, "Experts", int] | None:
    """For a group whose linears ``names`` belong to experts: the path of their ``Experts`` in ``block``, the module,
    and the stage (0 or 1) in which they are computed. None for a group of other linears."""
    path = names[0].rpartition(".")[0].rpartition(".")[0]
    module = block.get_submodule(path) if path else block
    if not isinstance(module, Experts):
        return None
    leaf = names[0].rpartition(".")[2]
    return path, module, next(n for n, leaves in enumerate(module.form.stages) if leaf in leaves)


def mixtures_in(module: nn.Module) -> dict[str, Experts]:
    """The mixtures of experts in ``module`` by their paths."""
    found = modules_outside_experts(module)
    return {path: mixture for path, mixture in found if isinstance(mixture, Experts)}


def modules_outside_experts(module: nn.Module, path: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Every module of ``module`` with its path, itself first, but those of single experts."""
    left = [(path, module)]
    while left:
        path, module = left.pop()
        yield path, module
        if not isinstance(module, Experts):
            dot = f"{path}." if path else ""
            left += [(dot + name, child) for name, child in reversed(module._modules.items()) if child is not None]
