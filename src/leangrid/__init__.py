"""leangrid: language models in 4, 3 or 2 bits, on grids learned from the inverse Hessian (LeanQuant, arXiv 2407.10032).

The public names are imported when they are first used, so that ``import leangrid`` loads neither torch's extras nor
transformers."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from leangrid._version import __version__
from leangrid.inference import transformers_hook

if TYPE_CHECKING:
    from leangrid import grids as grids
    from leangrid.evaluation import evaluate as evaluate
    from leangrid.evaluation.compare import compare as compare
    from leangrid.evaluation.tasks.job import Tasks as Tasks
    from leangrid.exporters.export import export as export
    from leangrid.inference.load import load as load
    from leangrid.planning.placement import Placement as Placement
    from leangrid.planning.plan import plan as plan
    from leangrid.recipe import Recipe as Recipe
    from leangrid.run.quantize import quantize as quantize
    from leangrid.schemes import Scheme as Scheme
    from leangrid.solve.layer import quantize_linear as quantize_linear
    from leangrid.storage.verified import verify as verify

_MODULES = {
    "Placement": "planning.placement",
    "Recipe": "recipe",
    "Scheme": "schemes",
    "Tasks": "evaluation.tasks.job",
    "compare": "evaluation.compare",
    "evaluate": "evaluation",
    "export": "exporters.export",
    "load": "inference.load",
    "plan": "planning.plan",
    "quantize": "run.quantize",
    "quantize_linear": "solve.layer",
    "verify": "storage.verified",
}
__all__ = [
    "Placement",
    "Recipe",
    "Scheme",
    "Tasks",
    "__version__",
    "compare",
    "evaluate",
    "export",
    "grids",
    "load",
    "plan",
    "quantize",
    "quantize_linear",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name == "grids":
        return import_module("leangrid.grids")
    if name in _MODULES:
        return getattr(import_module(f"leangrid.{_MODULES[name]}"), name)
    raise AttributeError(f"module 'leangrid' has no attribute '{name}'")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


transformers_hook.install()
