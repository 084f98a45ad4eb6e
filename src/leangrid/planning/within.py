"""How much calibration text a run of a given time bears, by the plan's model of cost on this machine.

Time grows with the tokens, and so does what they are worth, ever more slowly. The number of windows and their length
are chosen before work and written into the recipe, so the run is one that its recipe repeats anywhere."""

import json
import math
import re
from pathlib import Path

from leangrid.errors import RecipeError
from leangrid.machine.devices import set_threads
from leangrid.machine.memory import without_garbage_collection
from leangrid.models.skeleton import Skeleton
from leangrid.planning.cost import Described
from leangrid.planning.plan import estimate, open_planned
from leangrid.recipe import Recipe
from leangrid.storage.journal import partial_of

# (windows, tokens of each), each about twice the one before; the last are the defaults.
WINDOWS = ((4, 512), (8, 512), (16, 512), (16, 1024), (32, 1024), (32, 2048), (64, 2048), (128, 2048))
SHARE = 0.8  # of the time that the plan may fill: it is right within about a quarter
_UNITS = (3600, 60, 1)
_TIME = re.compile(r"(?:(\d+(?:\.\d+)?)h)?(?:(\d+(?:\.\d+)?)m(?:in)?)?(?:(\d+(?:\.\d+)?)s)?")


def read_duration(text: str) -> float:
    """ "30m", "1h30m" or "90s" in seconds; RecipeError for anything else."""
    found = _TIME.fullmatch(text.strip().lower().replace(" ", ""))
    parts = found.groups() if found else ()
    seconds = sum(float(part) * unit for part, unit in zip(parts, _UNITS, strict=False) if part)
    if seconds <= 0:
        raise RecipeError(f"'{text}' is no time", "--within", "Use 30m, 1h30m or 90s")
    return seconds


def choose_tokens(
    source: str | Path | None,
    recipe: Recipe,
    seconds: float,
    threads: int | None = None,
    device: str = "cpu",
    *,
    shape: str | None = None,
) -> tuple[Recipe, float]:
    """The recipe with the most calibration tokens whose run takes at most ``seconds``, and the seconds it will take.

    Args:
        source, threads, device, shape: as in ``plan``.
        recipe: with everything else; ``samples`` or ``length`` stay where it names one of them.

    Raises:
        RecipeError: the recipe names both, or a mixture, which names its windows; or not even the least fits.
    """
    set_threads(threads)
    if recipe.parts or {"samples", "length"} <= recipe.model_fields_set:
        named = "a mixture names its windows" if recipe.parts else "--samples and --length are given"
        raise RecipeError(f"nothing is left to choose: {named}", "--within", "Leave one of them out")
    absent = Described.parse(device)
    with without_garbage_collection():
        skeleton = Skeleton(open_planned(source, shape))

        def planned(windows: int, length: int) -> tuple[Recipe, float]:
            found = recipe.model_copy(update={"samples": windows, "length": length})
            return found, estimate(str(source or shape), skeleton, found, device, absent).seconds["total"]

        candidates = _candidates(recipe, skeleton)
        chosen = planned(*candidates[0])
        if chosen[1] > SHARE * seconds:
            least = f"the least that is possible, {candidates[0][0]} windows of {candidates[0][1]} tokens"
            what = f"{least}, takes about {chosen[1] / 60:.1f} minutes here"
            at_least = math.ceil(chosen[1] / SHARE / 60)
            or_else = "" if recipe.effort == "fast" else ", or --effort fast"
            raise RecipeError(what, "--within", f"Give {at_least}m or more{or_else}")
        low, high = 0, len(candidates)
        while high - low > 1:  # the time grows with the tokens
            middle = (low + high) // 2
            tried = planned(*candidates[middle])
            low, high, chosen = (middle, high, tried) if tried[1] <= SHARE * seconds else (low, middle, chosen)
    return chosen


def tokens_of_unfinished_run(out: Path, recipe: Recipe) -> Recipe | None:
    """``recipe`` with the windows of the run that was begun in ``out`` and differs from it in nothing else; None where
    there is none."""
    try:
        begun = json.loads((partial_of(out) / "identity.json").read_bytes())["recipe"]
        found = recipe.model_copy(update={"samples": begun["samples"], "length": begun["length"]})
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return found if json.loads(found.model_dump_json()) == begun else None


def _candidates(recipe: Recipe, skeleton: Skeleton) -> list[tuple[int, int]]:
    """What may be chosen, fewest tokens first."""
    longest = getattr(skeleton.config.get_text_config(), "max_position_embeddings", None)
    given = recipe.model_fields_set
    found: list[tuple[int, int]] = []
    for windows, length in WINDOWS:
        windows = recipe.samples if "samples" in given else windows
        length = recipe.length if "length" in given else min(length, longest or length)
        if (windows, length) not in found:
            found.append((windows, length))
    return sorted(found, key=lambda pair: (pair[0] * pair[1], pair[1]))
