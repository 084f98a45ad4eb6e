"""How transformers' modules of experts hold their matrices: all experts of a block in a few tensors.

Most say it themselves (transformers.integrations.moe, ``use_experts_implementation``): with a gate or without, gate and
up one after the other or interleaved, [out, in] or [in, out], with biases, with a norm behind. The few that do not are
told by their shapes."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

GATE, UP, DOWN = "gate_proj", "up_proj", "down_proj"
FUSED_NAMES = frozenset(f"{name}{bias}" for name in ("gate_up_proj", UP, DOWN) for bias in ("", "_bias"))
_DEFAULT_GATE = "_default_apply_gate"  # transformers' own: act(gate) * up


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
        batched: whether the module is handed as many rows for each expert, one expert after another, instead of tokens
            with their experts' numbers (Llama 4).
        stages: the leaves of an expert that read the same input, stage by stage.
    """

    count: int
    hidden: int
    inner: int
    gated: bool = True
    interleaved: bool = False
    transposed: bool = False
    biased: bool = False
    batched: bool = False

    @property
    def stages(self) -> tuple[tuple[str, ...], ...]:
        return ((GATE, UP) if self.gated else (UP,), (DOWN,))

    def shape(self, leaf: str) -> tuple[int, int]:
        """(rows, cols) of an expert's linear."""
        return (self.hidden, self.inner) if leaf == DOWN else (self.inner, self.hidden)

    def fused_name(self, leaf: str, kind: str = "weight") -> str:
        """The tensor of the module that holds the ``kind`` ("weight" or "bias") of every expert's ``leaf``."""
        name = DOWN if leaf == DOWN else "gate_up_proj" if self.gated else UP
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
            if leaf == DOWN or not self.gated:
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
    down: Any = own.get(DOWN)
    first: Any = own.get("gate_up_proj")
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
        not declared and _takes_rows_only(module),
    )


def own_gate(module: nn.Module) -> Callable[[Tensor], Tensor] | None:
    """The module's own function of (gate, up) in one tensor, where it has one; None for act(gate) * up."""
    gate = getattr(type(module), "_apply_gate", None)
    return None if gate is None or gate.__name__ == _DEFAULT_GATE else module._apply_gate  # pyright: ignore


def _takes_rows_only(module: nn.Module) -> bool:
    code = getattr(type(module).forward, "__code__", None)
    return code is not None and code.co_argcount == 2  # self and the rows
