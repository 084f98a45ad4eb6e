"""How a caller learns where the time of ``solve_linear`` goes, without a clock in the mathematics."""

from contextlib import AbstractContextManager, nullcontext
from typing import Literal, Protocol, runtime_checkable

# grid: fitting it. solve: the sweeps onto it. refine: refits and descents. baseline: rounding and min-max GPTQ, with
# which the result is compared.
Stage = Literal["grid", "solve", "refine", "baseline"]


@runtime_checkable
class Observer(Protocol):
    """Is told what ``solve_linear`` does, stage by stage. Stages do not nest."""

    def stage(self, name: Stage) -> AbstractContextManager[None]:
        """Stage ``name`` lasts as long as the ``with``; a stage may be entered several times."""
        ...

    def count(self, name: Stage, operations: float) -> None:
        """Stage ``name`` does so many floating-point operations (machine/flops.py)."""
        ...


class NoObserver:
    """Observes nothing."""

    def stage(self, name: Stage) -> AbstractContextManager[None]:
        return nullcontext()

    def count(self, name: Stage, operations: float) -> None:
        return None
