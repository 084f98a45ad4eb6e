"""What one call of ``leangrid.quantize`` asks for, as one value that every step of the run reads."""

from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from leangrid.errors import CalibrationError, RecipeError
from leangrid.planning.placement import Placement
from leangrid.progress import Progress
from leangrid.recipe import Recipe


@dataclass(frozen=True, eq=False)
class Request:
    """The arguments of ``leangrid.quantize``, under the same names and with the same meaning.

    Raises:
        RecipeError: ``recipe`` is no Recipe, or ``placement`` no Placement.
        CalibrationError: ``windows`` is no tensor.
    """

    source: str | Path
    out: Path
    recipe: Recipe
    windows: Tensor | None = None
    device: str = "cpu"
    threads: int | None = None
    overwrite: bool = False
    restart: bool = False
    max_rescued: float = 0.01
    max_kl: float | None = None
    state_dir: Path | None = None
    progress: Progress | None = None
    placement: Placement | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.recipe, Recipe):
            what = f"a recipe is a leangrid.Recipe, not {type(self.recipe).__name__}"
            raise RecipeError(what, "recipe", 'Write leangrid.Recipe(scheme="NU4")')
        if self.windows is not None and not isinstance(self.windows, Tensor):
            what = f"windows must be a tensor of int64 [samples, length], not {type(self.windows).__name__}"
            raise CalibrationError(what, "windows")
        if self.placement is not None and not isinstance(self.placement, Placement):
            what = f"a placement is a leangrid.Placement, not {type(self.placement).__name__}"
            raise RecipeError(what, "placement", "Leave it out: the plan chooses one")
