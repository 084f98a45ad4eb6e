"""leangrid: LLM weights on learned grids. Public names only; each is imported when it is first asked for."""

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

from leangrid import transformers_hook
from leangrid._version import __version__

if TYPE_CHECKING:
    from leangrid import grids as grids
    from leangrid.evaluate import evaluate as evaluate
    from leangrid.export import export as export
    from leangrid.linear import quantize_linear as quantize_linear
    from leangrid.load import load as load
    from leangrid.pipeline import quantize as quantize
    from leangrid.plan import plan as plan
    from leangrid.recipe import Recipe as Recipe
    from leangrid.recipe import Scheme as Scheme
    from leangrid.storage.verified import verify as verify

_HOME = {"quantize": "pipeline", "load": "load", "quantize_linear": "linear", "Recipe": "recipe", "Scheme": "recipe",
         "evaluate": "evaluate", "verify": "storage.verified", "plan": "plan", "export": "export"}  # fmt: skip
__all__ = ["Recipe", "Scheme", "__version__", "evaluate", "export", "grids", "load", "plan", "quantize", "quantize_linear", "verify"]


class _Package(ModuleType):
    def __getattr__(self, name: str) -> Any:
        if name not in __all__:
            raise AttributeError(f"module 'leangrid' has no attribute '{name}'")
        return import_module("leangrid.grids") if name == "grids" else getattr(import_module(f"leangrid.{_HOME[name]}"), name)

    def __setattr__(self, name: str, value: object) -> None:
        """Importing leangrid/load.py would bind ``leangrid.load`` to the file; it stays the function of that name."""
        super().__setattr__(name, getattr(value, name) if name in _HOME and isinstance(value, ModuleType) else value)


sys.modules[__name__].__class__ = _Package
transformers_hook.install()
