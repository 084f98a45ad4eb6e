"""What a run keeps on its device, what waits elsewhere, and how much it does at once.

A recipe does not ask for it: it is the same arithmetic in another place. The plan takes the first placement whose
memory fits (footprint.py). A run that still runs out of memory takes the next smaller one, says so, and stays with it.
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Literal

FailedPhase = Literal["forward", "algebra"]


@dataclass(frozen=True)
class Placement:
    """Where things are and how much is done at once.

    Attributes:
        windows: calibration windows in a forward pass.
        replay: walk blocks by replaying (models/walk.py) instead of pausing.
        host_streams: hidden states wait in host memory between their turns; what else a model's own forward holds
            between its blocks (models/flow.py) stays on the device.
        disk_streams: they wait in mapped files beside the journal's states instead.
        in_place: the algebra of solve/in_place.py, with three matrices of the Hessian's size at once.
        host_groups: groups of linears whose Hessian, factor and solve are on the CPU.
        host_block: the whole block is on the CPU.

    Example:
        >>> placement = leangrid.Placement(windows=2, replay=True)
        >>> recipe = leangrid.Recipe(scheme="NU4", calibration="text.txt", samples=8, length=64)
        >>> leangrid.quantize("model", "out-replayed", recipe, placement=placement).layers
        14
    """

    windows: int
    replay: bool = False
    host_streams: bool = False
    disk_streams: bool = False
    in_place: bool = False
    host_groups: tuple[int, ...] = ()
    host_block: bool = False

    def candidates(self) -> "Iterator[Placement]":
        """Placements that need less and less memory and more and more time; the plan takes the first that fits."""
        base = Placement(self.windows)
        yield from (base, replace(base, replay=True))
        for in_place in (False, True):
            for disk in (False, True):
                yield replace(base, replay=True, host_streams=True, disk_streams=disk, in_place=in_place)
        while base.windows > 1:
            base = replace(base, windows=base.windows // 2)
            for disk in (False, True):
                yield replace(base, replay=True, host_streams=True, disk_streams=disk, in_place=True)

    def next_smaller(
        self, failed: FailedPhase, group: int, groups: int, accelerated: bool
    ) -> "tuple[Placement, str] | None":
        """The next smaller placement after this one ran out of memory, and the change in words; None: there is none.

        Args:
            failed: what ran out: a forward pass, or the algebra of ``group``. Smaller batches help the first alone.
            groups: how many groups a block has.
            accelerated: whether the device has memory of its own, so that the CPU's is another.
        """
        if self.windows > 1 and failed == "forward":
            half = self.windows // 2
            return replace(self, windows=half), f"{half} instead of {self.windows} windows a forward pass"
        if not self.replay:
            words = "forward passes replayed for each group instead of paused"
            return replace(self, replay=True, host_streams=True), words
        if not self.in_place:
            words = "three matrices of the Hessian's size at once, rows in tiles"
            return replace(self, in_place=True, host_streams=True), words
        if not accelerated:
            return None if self.disk_streams else (replace(self, disk_streams=True), "hidden states in mapped files")
        every = tuple(range(groups))
        if not self.host_block and len(self.host_groups) < groups:
            one = failed == "algebra" and group not in self.host_groups
            moved = tuple(sorted({*self.host_groups, group})) if one else every
            which = "all groups" if len(moved) == groups else f"group {group}"
            return replace(self, host_groups=moved, host_streams=True), f"Hessian and factor of {which} on the CPU"
        if not self.host_block:
            words = "the whole block on the CPU"
            return replace(self, host_block=True, host_streams=True, host_groups=every), words
        return None

    def to_json(self) -> dict[str, Any]:
        """The fields as JSON holds them."""
        return asdict(self) | {"host_groups": list(self.host_groups)}

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> "Placement":
        """The inverse of ``to_json``; unknown keys are left out, and ``lean`` is an older name of ``in_place``."""
        value = {"in_place": value["lean"]} | value if "lean" in value else value
        known = {field.name for field in fields(cls)}
        given: dict[str, Any] = {key: item for key, item in value.items() if key in known}
        given["host_groups"] = tuple(given.get("host_groups", ()))
        return cls(**given)
