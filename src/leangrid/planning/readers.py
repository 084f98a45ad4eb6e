"""What opens the result of a run, known before it: said by the plan, as a notice of the run, and in the manifest."""

from collections.abc import Mapping

from leangrid.formats.base import Reading
from leangrid.models.plain_readers import mixtures_of, plain_reading
from leangrid.models.skeleton import Skeleton
from leangrid.planning.sizes import stored_schemes
from leangrid.recipe import Recipe, Scheme

LOAD, TRANSFORMERS = "leangrid.load", "transformers"
_DENSE = "what leangrid export --to dense makes of the result"
_PLAIN = "compressed-tensors"  # the container that transformers reads with neither leangrid nor another library of ours


def plain_reading_of(skeleton: Skeleton, recipe: Recipe) -> Reading | None:
    """How plain transformers reads the result of a resolved ``recipe``; None for a container that it does not read."""
    return _reading(skeleton, stored_schemes(skeleton, recipe)) if recipe.format == _PLAIN else None


def opened_in(skeleton: Skeleton, recipe: Recipe) -> dict[str, str]:
    """Reader -> "yes", or "no: " and why it does not open the result of a resolved ``recipe``, and what it would
    open; of the readers that can be asked before work."""
    reading = plain_reading_of(skeleton, recipe)
    if reading is None:
        return {LOAD: "yes"}
    if reading.obstacle is None:
        return {LOAD: "yes", TRANSFORMERS: "yes"}
    schemes = {
        name: one.model_copy(update={"symmetric": True}) for name, one in stored_schemes(skeleton, recipe).items()
    }
    other = _reading(skeleton, schemes)
    named = sorted({one.name for one in schemes.values()})
    opens = " and ".join(named) if other is not None and other.obstacle is None else _DENSE
    return {LOAD: "yes", TRANSFORMERS: f"no: {reading.obstacle}; it opens {opens}"}


def describe_readers(skeleton: Skeleton, recipe: Recipe) -> list[str]:
    """One sentence where plain transformers does not open the result; none where it does or never reads the format."""
    word = opened_in(skeleton, recipe).get(TRANSFORMERS, "yes")
    why = word.removeprefix("no: ")
    return [] if word == "yes" else [f"{LOAD} opens the result, transformers without leangrid does not: {why}"]


def _reading(skeleton: Skeleton, schemes: Mapping[str, Scheme]) -> Reading | None:
    names = skeleton.stored.result_names
    if names is None:
        return None
    paths = {name: skeleton.path(name) for name in schemes}
    return plain_reading(names, paths, mixtures_of(skeleton.model), schemes, skeleton.stored.not_found)
