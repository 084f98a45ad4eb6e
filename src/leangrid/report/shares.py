"""The shares of the correction that were measured, from the records; for summary, manifest and model card."""

from collections.abc import Mapping, Sequence
from statistics import median

from leangrid.recipe import Recipe
from leangrid.report.records import LayerRecord


def share_figures(recipe: Recipe, records: Sequence[LayerRecord]) -> dict[str, float]:
    """ "min", "median" and "max" of the shares over all layers; empty where the recipe fixes one share for all."""
    shares = [record.correct for record in records if record.correct is not None]
    if not recipe.measures_correction or not shares:
        return {}
    return {"min": min(shares), "median": round(median(shares), 6), "max": max(shares)}


def describe_shares(found: Mapping[str, float]) -> list[tuple[str, str]]:
    """The figures as a (name, value) row; no row without them."""
    if not found:
        return []
    words = (
        f"measured for each layer: {found['median']:.2f} in the median, from {found['min']:.2f} to {found['max']:.2f}"
    )
    return [("corrected share", words)]
