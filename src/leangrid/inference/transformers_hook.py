"""Registering leangrid's quantizer with transformers, without importing transformers.

transformers looks a checkpoint's ``quant_method`` up in the tables of ``transformers.quantizers.auto`` and knows no
entry points. ``install`` adds our quantizer at once if that module is loaded, else right after it is first imported.
"""

import importlib
import importlib.util
import sys
import warnings
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

_TABLES = "transformers.quantizers.auto"


def install() -> None:
    """Register with transformers, now or as soon as it is imported. Calling it twice changes nothing."""
    if _TABLES in sys.modules:
        _register()
    elif not any(isinstance(finder, _AfterImport) for finder in sys.meta_path):
        sys.meta_path.insert(0, _AfterImport())


def _register() -> None:
    try:
        importlib.import_module("leangrid.inference.transformers_quantizer")  # registers when it is first executed
    except ImportError as error:  # an older or newer transformers must stay usable for everything else
        warnings.warn(
            f"leangrid cannot register with this transformers, so it will not open LUT results: {error}", stacklevel=2
        )


class _AfterImport(MetaPathFinder):
    """A finder that finds ``_TABLES`` once, through the other finders, and registers when it has been executed."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != _TABLES:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        loader = spec.loader if spec else None
        if loader is not None:
            execute = loader.exec_module

            def execute_and_register(module: ModuleType) -> None:
                execute(module)
                _register()

            loader.exec_module = execute_and_register  # pyright: ignore[reportAttributeAccessIssue]
        return spec
