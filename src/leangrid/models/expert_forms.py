"""How transformers' modules of experts hold their matrices: all experts of a block in a few tensors.

Most say it themselves (transformers.integrations.moe, ``use_experts_implementation``): with a gate or without, gate and
up one after the other or interleaved, [out, in] or [in, out], with biases, with a norm behind. The few that do not are
told by their shapes, or by what they compute of random numbers."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from leangrid.models.linears import twin_of

GATE, UP, DOWN = "gate_proj", "up_proj", "down_proj"
LINEAR = "linear"  # of an expert that is one matrix
_DEFAULT_GATE = "_default_apply_gate"  # transformers' own: act(gate) * up
_known: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()  # tried on random numbers -> whether it has the form


@dataclass(frozen=True)
class FusedForm:
    """The form of one module.

    Attributes:
        count: experts that have matrices.
        hidden, inner: columns of the first stage and of the second.
        gated: whether there is a gate beside up.
        interleaved: whether gate and up take turns in the rows of the first tensor; else gate comes first.
        transposed: whether an expert's matrix is stored as [in, out].
        biased: whether every matrix has a bias.
        parted: whether gate and up are tensors of their own.
        handed: what the module is called with. "routed": tokens, the numbers of their experts, and weights; "batched":
            as many rows for each expert, one expert after another; "shared": tokens that every expert reads, and a
            weight for each expert, by which what its second stage reads is multiplied; "split": each expert's rows, one
            expert after another, and how many each has, of which an expert is one matrix.
        stages: the leaves of an expert that read the same input, stage by stage.
    """

    count: int
    hidden: int
    inner: int
    gated: bool = True
    interleaved: bool = False
    transposed: bool = False
    biased: bool = False
    parted: bool = False
    handed: Literal["routed", "batched", "shared", "split"] = "routed"

    @property
    def stages(self) -> tuple[tuple[str, ...], ...]:
        if self.handed == "split":
            return ((LINEAR,),)
        return ((GATE, UP) if self.gated else (UP,), (DOWN,))

    @cached_property
    def leaves(self) -> tuple[str, ...]:
        """The linears of one expert, in the order of the stages."""
        return tuple(leaf for stage in self.stages for leaf in stage)

    @property
    def linears(self) -> int:
        """How many linears all its experts have."""
        return self.count * len(self.leaves)

    @property
    def numbers(self) -> int:
        """How many numbers their weights hold."""
        return self.count * sum(math.prod(self.shape(leaf)) for leaf in self.leaves)

    def shape(self, leaf: str) -> tuple[int, int]:
        """(rows, cols) of an expert's linear."""
        return (self.hidden, self.inner) if leaf == DOWN else (self.inner, self.hidden)

    @property
    def returned(self) -> int:
        """Columns of what the module returns."""
        return self.inner if self.handed == "split" else self.hidden

    def fused_name(self, leaf: str, kind: str = "weight") -> str:
        """The tensor of the module that holds the ``kind`` ("weight" or "bias") of every expert's ``leaf``."""
        if leaf == LINEAR:
            return kind
        name = leaf if leaf == DOWN or self.parted or not self.gated else "gate_up_proj"
        return name if kind == "weight" else f"{name}_bias"

    @property
    def fused_names(self) -> frozenset[str]:
        """The names of the module's tensors."""
        kinds = ("weight", "bias") if self.biased else ("weight",)
        return frozenset(self.fused_name(leaf, kind) for stage in self.stages for leaf in stage for kind in kinds)

    def taken(self, leaf: str, kind: str = "weight") -> Callable[[Tensor], Tensor]:
        """How an expert's ``leaf`` is taken from its part of the fused tensor: [rows, cols], or [rows] for a bias."""

        def take(whole: Tensor) -> Tensor:
            part = whole.t() if self.transposed and kind == "weight" else whole
            if leaf == DOWN or self.parted or not self.gated:
                return part
            first = leaf == GATE
            if self.interleaved:
                return part[0 if first else 1 :: 2]
            return part[: self.inner] if first else part[self.inner :]

        return take

    def joined(self, leaves: list[Tensor], kind: str = "weight") -> Tensor:
        """The inverse of ``taken``: one expert's part of a fused tensor, of its linears' weights [rows, cols] or biases
        [rows]: down's alone, or gate's and up's (up's alone where there is no gate)."""
        if len(leaves) == 1:
            whole = leaves[0]
        else:
            whole = torch.stack(leaves, 1).flatten(0, 1) if self.interleaved else torch.cat(leaves)
        return (whole.t() if self.transposed and kind == "weight" else whole).contiguous()


def form_of(module: nn.Module) -> FusedForm | None:
    """The form of a module of fused experts; None for another module."""
    own: dict[str, Any] = module.__dict__.get("_parameters", {})
    if getattr(own.get("weight"), "ndim", 0) == 3:
        with torch.device("cpu"):  # a model may be loaded under that of "meta"
            return _split_form(module, own)
    down: Any = own.get(DOWN)
    first: Any = own.get("gate_up_proj")
    if getattr(own.get(GATE), "ndim", 0) == 3:
        with torch.device("cpu"):
            return _shared_form(module, own)
    gated = first is not None
    first = own.get(UP) if first is None else first
    if getattr(down, "ndim", 0) != 3 or getattr(first, "ndim", 0) != 3:
        return None
    declared = hasattr(module, "has_gate")
    if not (declared or gated):  # shapes alone do not tell [in, out] from [out, in], nor what else it multiplies
        return None
    transposed = bool(getattr(module, "is_transposed", False))
    parts = 2 if gated else 1
    if not declared:  # [E, in, 2 x inner] or [E, 2 x inner, in]: only one of them fits the second tensor
        transposed = first.shape[1] == down.shape[2] and first.shape[2] == parts * down.shape[1]
    count, inner, hidden = down.shape if transposed else (down.shape[0], down.shape[2], down.shape[1])
    return FusedForm(
        int(count),
        int(hidden),
        int(inner),
        gated,
        not getattr(module, "is_concatenated", True),
        transposed,
        bool(getattr(module, "has_bias", False)),
        handed="batched" if not declared and _arguments(module) == 1 else "routed",
    )


def own_gate(module: nn.Module) -> Callable[[Tensor], Tensor] | None:
    """The module's own function of (gate, up) in one tensor, where it has one; None for act(gate) * up."""
    gate = getattr(type(module), "_apply_gate", None)
    return None if gate is None or gate.__name__ == _DEFAULT_GATE else module._apply_gate  # pyright: ignore


def _split_form(module: nn.Module, own: dict[str, Any]) -> FusedForm | None:
    """The form of a module that multiplies each part of its rows by another matrix [rows, cols] of its weight."""
    (count, rows, cols), alone = own["weight"].shape, [name for name, one in own.items() if one is not None]
    if alone != ["weight"] or _arguments(module) != 2:
        return None
    sizes = [(2 + expert) % 3 for expert in range(count)]

    def expected(x: Tensor, weight: Tensor) -> Tensor:
        return torch.cat([part @ one.T for part, one in zip(x.split(sizes), weight, strict=True)])

    draw = torch.Generator().manual_seed(0)  # the caller's random numbers stay as they are
    weight, x = torch.randn(count, 3, 4, generator=draw), torch.randn(sum(sizes), 4, generator=draw)
    if not _gives(module, {"weight": weight}, (x, sizes), lambda: expected(x, weight)):
        return None
    return FusedForm(int(count), int(cols), int(rows), gated=False, handed="split")


def _shared_form(module: nn.Module, own: dict[str, Any]) -> FusedForm | None:
    """The form of a module whose experts all read every token, with gate, up and down in tensors of their own."""
    if {name for name, one in own.items() if one is not None} != {GATE, UP, DOWN} or _arguments(module) != 2:
        return None
    count, inner, hidden = map(int, own[GATE].shape)
    if tuple(own[UP].shape) != (count, inner, hidden) or tuple(own[DOWN].shape) != (count, hidden, inner):
        return None
    draw = torch.Generator().manual_seed(0)
    gate, up = (torch.randn(count, 3, 4, generator=draw) for _ in range(2))
    down, x = torch.randn(count, 4, 3, generator=draw), torch.randn(2, 5, 4, generator=draw)
    weights, act = torch.randn(2, 5, count, generator=draw), getattr(module, "act_fn", None)

    def expected() -> Tensor:
        each = [(act(x @ g.T) * (x @ u.T) * weights[..., n : n + 1]) @ d.T  # pyright: ignore[reportOptionalCall]
                for n, (g, u, d) in enumerate(zip(gate, up, down, strict=True))]  # fmt: skip
        return torch.stack(each).sum(0)

    found = act is not None and _gives(module, {GATE: gate, UP: up, DOWN: down}, (x, weights), expected)
    return FusedForm(count, hidden, inner, parted=True, handed="shared") if found else None


def _gives(
    module: nn.Module, parameters: dict[str, Tensor], given: tuple[Any, ...], expected: Callable[[], Tensor]
) -> bool:
    """Whether the forward pass of a module like ``module`` with these parameters gives what is ``expected``."""
    if module not in _known:
        try:
            with torch.no_grad():
                out: Any = type(module).forward(twin_of(module, parameters), *given)
                _known[module] = isinstance(out, Tensor) and torch.allclose(out, expected(), rtol=1e-4, atol=1e-5)
        except Exception:  # a forward pass of another kind may raise anything on these numbers
            _known[module] = False
    return _known[module]


def _arguments(module: nn.Module) -> int:
    """How many positional arguments its forward pass has beside the module; 0 where that is not known."""
    code = getattr(type(module).forward, "__code__", None)
    return 0 if code is None else code.co_argcount - 1
