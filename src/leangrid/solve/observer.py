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

    def record_sweep(self, stage: Stage, rows: int, cols: int, exact: bool) -> None:
        """``rows`` of a weight are swept, by LeanQuant-Exact if ``exact``."""
        ...

    def record_loss(self, stage: Stage, rows: int, cols: int) -> None:
        """The loss of ``rows`` is computed by a product with H."""
        ...

    def record_refinement(self, stage: Stage, rows: int, cols: int, rounds: int) -> None:
        """``rows`` are refined in so many rounds."""
        ...


class NoObserver:
    """Observes nothing."""

    def stage(self, name: Stage) -> AbstractContextManager[None]:
        return nullcontext()

    def record_sweep(self, stage: Stage, rows: int, cols: int, exact: bool) -> None:
        return None

    def record_loss(self, stage: Stage, rows: int, cols: int) -> None:
        return None

    def record_refinement(self, stage: Stage, rows: int, cols: int, rounds: int) -> None:
        return None
