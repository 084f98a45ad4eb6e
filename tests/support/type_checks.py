"""While tests run, calls into leangrid are checked: types of arguments and results, and shapes of tensors.

Shapes cost some tenths of a millisecond a call, a third of a whole run on a tiny model: of each function that has them
the first ``ALWAYS`` calls of a process are checked, and one in ``THEN`` after that."""

import functools
import gc
import importlib
import inspect
from collections.abc import Callable
from typing import Any, get_args, get_type_hints

import jaxtyping
from beartype import beartype
from jaxtyping import install_import_hook

ALWAYS, THEN = 64, 8
_jaxtyped = jaxtyping.jaxtyped


def install() -> None:
    """Make the import of leangrid add the checks to every function. Call it before the first import of leangrid."""
    jaxtyping.jaxtyped = _check  # the decorator that jaxtyping's import hook adds
    hook: Any = importlib.import_module("jaxtyping._import_hook")
    hook._call_with_frames_removed = _compile
    install_import_hook("leangrid", "beartype.beartype")


def _compile(compile_source: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
    """Compile a module without collecting garbage: Python 3.11 takes a greenlet that is ended meanwhile, a pass that a
    test has left, for an error in its count of the stack's depth."""
    collects = gc.isenabled()
    gc.disable()
    try:
        return compile_source(*arguments, **options)
    finally:
        if collects:
            gc.enable()


def _check(fn: Any = None, *, typechecker: Any = None) -> Any:
    """jaxtyping's decorator. A function whose signature has no tensor shapes gets beartype's alone, which checks the
    same types in a tenth of the time."""
    if fn is None:
        return lambda fn: _check(fn, typechecker=typechecker)
    if not inspect.isfunction(fn):  # a class, a property ...
        return _jaxtyped(fn, typechecker=typechecker)
    try:
        hints = get_type_hints(fn, include_extras=True)
    except NameError:  # an annotation that only type checkers can read: jaxtyping leaves it out
        return _jaxtyped(fn, typechecker=typechecker)
    if any(_has_shapes(hint) for hint in hints.values()):
        return _sometimes(fn, _jaxtyped(fn, typechecker=typechecker))
    fn.__annotations__ = hints
    return beartype(fn)


def _sometimes(fn: Callable[..., Any], checked: Callable[..., Any]) -> Callable[..., Any]:
    """``fn``, in most of its calls as it is, in the first and in some later ones ``checked``."""
    calls = 0

    @functools.wraps(checked)
    def call(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        return (checked if calls <= ALWAYS or calls % THEN == 0 else fn)(*args, **kwargs)

    return call


def _has_shapes(hint: Any) -> bool:
    if inspect.isclass(hint) and issubclass(hint, jaxtyping.AbstractArray):
        return True
    parts = hint if isinstance(hint, list) else get_args(hint)  # the first part of Callable[[A, B], C] is a list
    return any(_has_shapes(part) for part in parts)
