"""How a run uses its device: how much at a time, what waits on the host, and what gives way when memory runs out.

None of it is asked for in a recipe: the same arithmetic in another place. The plan chooses the first placement whose
sum fits (footprint.py); a run that still runs out goes one step down, says so, and keeps the step for the blocks that
follow."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Literal

Failed = Literal["forward", "algebra"]


@dataclass(frozen=True)
class Placement:
    """Where things are and how much at once.

    Args:
        windows: calibration windows a forward pass.
        replay: walk blocks by replaying (models/walk.py) instead of pausing.
        host_streams: hidden states wait in host memory between their turns.
        disk_streams: they wait in mapped files beside the journal's states instead.
        lean: the algebra of wide.py.
        host_groups: groups of linears whose Hessian, factor and solve are on the CPU.
        host_block: the whole block is on the CPU.
    """

    windows: int
    replay: bool = False
    host_streams: bool = False
    disk_streams: bool = False
    lean: bool = False
    host_groups: tuple[int, ...] = ()
    host_block: bool = False

    def options(self) -> "Iterator[Placement]":
        """This placement and ever thriftier ones, in the order in which they cost time; what the plan chooses from."""
        base = Placement(self.windows)
        yield from (base, replace(base, replay=True))
        for lean in (False, True):
            for disk in (False, True):
                yield replace(base, replay=True, host_streams=True, disk_streams=disk, lean=lean)
        while base.windows > 1:
            base = replace(base, windows=base.windows // 2)
            for disk in (False, True):
                yield replace(base, replay=True, host_streams=True, disk_streams=disk, lean=True)

    def thriftier(self, failed: Failed, group: int, groups: int, accelerated: bool) -> "tuple[Placement, str] | None":
        """One step down the ladder after running out of memory, and the step in words; None at its end.

        Args:
            failed: what ran out: a forward pass, or the algebra of ``group``; smaller batches help the first alone.
            groups: how many groups a block has.
            accelerated: whether the CPU is another place than the device.
        """
        if self.windows > 1 and failed == "forward":
            return replace(
                self, windows=self.windows // 2
            ), f"{self.windows // 2} instead of {self.windows} windows a forward pass"
        if not self.replay:
            return replace(
                self, replay=True, host_streams=True
            ), "forward passes replayed for each group instead of paused"
        if not self.lean:
            return replace(
                self, lean=True, host_streams=True
            ), "three matrices of the Hessian's size at once, rows in tiles"
        if not accelerated and not self.disk_streams:
            return replace(self, disk_streams=True), "hidden states in mapped files"
        if accelerated and not self.host_block and len(self.host_groups) < groups:
            moved = (
                tuple(range(groups))
                if failed == "forward" or group in self.host_groups
                else tuple(sorted({*self.host_groups, group}))
            )
            which = "all groups" if len(moved) == groups else f"group {group}"
            return replace(self, host_groups=moved, host_streams=True), f"Hessian and factor of {which} on the CPU"
        if accelerated and not self.host_block:
            return replace(
                self, host_block=True, host_streams=True, host_groups=tuple(range(groups))
            ), "the whole block on the CPU"
        return None

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self) | {"host_groups": list(self.host_groups)}

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> "Placement":
        """The inverse of ``to_json``; unknown keys are left out."""
        known = {field.name for field in fields(cls)}
        given: dict[str, Any] = {key: item for key, item in value.items() if key in known}
        given["host_groups"] = tuple(given.get("host_groups", ()))
        return cls(**given)
