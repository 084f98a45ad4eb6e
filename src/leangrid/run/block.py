"""The block that is being quantized: its weights, the groups of its linears, and what will be committed of it."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from leangrid.models.linears import rows_first
from leangrid.models.skeleton import Skeleton
from leangrid.models.walk import BlockWalk, ExpertInputs, GroupInputs
from leangrid.report.records import LayerRecord
from leangrid.run.accounting import SolvedLinear
from leangrid.run.repeated import RepeatedWalk
from leangrid.solve.tuning import Tuning

StageTimer = Callable[..., AbstractContextManager[None]]  # Run.stage: counts the time of its body


@dataclass
class Block:
    """Block ``index`` of the model, in memory.

    Attributes:
        name: its path in the model, such as ``model.layers.3``.
        walk: both streams on their way through it.
        skeleton: of the model; it says what the result calls its linears.
        tensors: packed codes and grids, by their names in the result.
        records: what will stand in records.jsonl.
        sample: one row of one layer for the report, where this block has that layer.
        resident_bytes: the most that the process held while the block was open.
        solved, originals: for block tuning, the solved linears and their original weights [rows, cols], by name.
        tuning: what it did; None where the recipe does not ask for it.
    """

    index: int
    name: str
    module: nn.Module
    walk: BlockWalk | RepeatedWalk
    skeleton: Skeleton
    tensors: dict[str, Tensor] = field(default_factory=dict)
    records: list[LayerRecord] = field(default_factory=list)
    sample: dict[str, Any] | None = None
    resident_bytes: int = 0
    solved: dict[str, SolvedLinear] = field(default_factory=dict)
    originals: dict[str, Tensor] = field(default_factory=dict)
    tuning: Tuning | None = None
    _queued: dict[str, Tensor] = field(default_factory=dict)

    def groups(self, timer: StageTimer) -> Iterator[tuple[int, GroupInputs | ExpertInputs]]:
        """The groups of linears that read the same input, numbered, in the order of the forward pass.

        The streams stop at a group until the next one is asked for. Then the weights that were queued meanwhile take
        their places, and the quantized stream goes on with them."""
        groups = enumerate(self.walk)
        while True:
            with timer("calibrate"):
                number, group = next(groups, (-1, None))
            if group is None:
                return
            yield number, group
            for name, weight in self._queued.items():
                self.walk.replace(name, weight)
            self._queued.clear()

    def queue_weight(self, name: str, weight: Tensor) -> None:
        """Give the linear ``name`` a new weight [rows, cols] once the streams go on."""
        self._queued[name] = rows_first(self.module.get_submodule(name), weight).contiguous()

    def weight(self, name: str) -> Tensor:
        """The original weight of a linear, [rows, cols] in the compute dtype."""
        return rows_first(self.module.get_submodule(name), self.parameter(name).data)

    def parameter(self, name: str) -> Tensor:
        """The original weight of a linear, as the module stores it."""
        return self.module.get_parameter(f"{name}.weight")

    def paths(self, names: Sequence[str]) -> list[str]:
        """The names in the result of some of its linears."""
        return [self.path(name) for name in names]

    def path(self, name: str) -> str:
        """The name in the result of the linear at the path ``name`` in the block."""
        return self.skeleton.linear_name(self.index, name)
