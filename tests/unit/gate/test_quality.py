"""The limit, the warnings and the JSON of what the quality gate found: row O8 of the fault table."""

import math
from dataclasses import replace

import pytest

from leangrid.gate import quality
from leangrid.gate.quality import Distance, Quality, list_warnings

pytestmark = pytest.mark.fault("O8")
SEEN = Distance("kl", 0.01, 2, 96, 0.99, 13.0, 12.9, rounding=0.2)
UNSEEN = replace(SEEN, value=0.3, rounding=0.25)


def found(seen: Distance = SEEN, unseen: Distance | None = UNSEEN) -> Quality:
    return Quality(seen, unseen, "other text of a.txt", limit=1.0)


def test_rounding_that_is_nearer_is_said() -> None:
    (warning,) = list_warnings(found())
    assert "plain rounding is nearer" in warning and "other text of a.txt" in warning


def test_a_distance_that_grows_on_unseen_text_is_said() -> None:
    assert list_warnings(found(unseen=replace(UNSEEN, value=0.03))) == []
    assert "0.24 on text" in list_warnings(found(unseen=replace(UNSEEN, value=0.24)))[0]
    # Rounding's distance grows as much: the text is harder, the calibration was not too small.
    harder = replace(SEEN, value=0.02, rounding=0.02)
    assert list_warnings(found(harder, replace(UNSEEN, value=0.24))) == []


@pytest.mark.parametrize("unseen", [None, replace(UNSEEN, value=math.nan), replace(UNSEEN, rounding=None)])
def test_what_was_not_measured_gives_no_warning(unseen: Distance | None) -> None:
    assert list_warnings(found(unseen=unseen)) == []


def test_the_limit_is_for_the_larger_distance() -> None:
    far = found(replace(SEEN, value=0.1), replace(UNSEEN, value=1.5))
    assert not far.passed and "is 1.5, 1.0 is allowed" in far.verdict
    assert replace(far, limit=2.0).passed and replace(far, unseen=replace(UNSEEN, value=0.9)).passed


def test_what_is_not_finite_or_was_not_measured_does_not_pass() -> None:
    assert not found(unseen=replace(UNSEEN, value=math.nan)).passed
    assert not found(replace(SEEN, value=math.inf)).passed
    assert not Quality().passed and not Quality(error="no").passed and Quality(error="no").verdict == "no"
    assert not replace(found(), error="the result's predictions are not finite").passed


@pytest.mark.parametrize(
    "each",
    [
        Quality(),
        Quality(error="the result cannot be opened"),
        found(),
        found(unseen=None),
        Quality(Distance("cosine", 0.1, 2, 96), limit=0.2),
        replace(found(), original="transformers", worst_layers=({"name": "a", "error": 0.1},), warnings=("few",)),
    ],
)
def test_the_json_holds_all_of_it(each: Quality) -> None:
    again = Quality.from_dict(each.to_dict())
    assert again.to_dict() == each.to_dict() and again.passed == each.passed
    assert again == each or each.unseen is None  # the text of what was not measured is left out


def test_json_has_null_for_what_is_not_finite() -> None:
    stored = found(replace(SEEN, value=math.nan, rounding=math.inf)).to_dict()
    assert stored["value"] is None and stored["rounding"] is None
    again = Quality.from_dict(stored)
    assert math.isnan(again.distance) and again.to_dict() == stored


def test_more_bits_are_allowed_less() -> None:
    for measure in ("kl", "cosine"):
        limits = [quality.default_limit(bits, measure) for bits in (2, 3, 4, 5, 6, 8)]
        assert limits == sorted(limits, reverse=True) and limits[-1] < 0.2


def test_pictures_count_for_the_limit_the_json_and_the_warnings() -> None:
    pictures = replace(SEEN, value=1.5, rounding=1.0)
    whole = replace(found(unseen=replace(UNSEEN, value=0.02)), pictures=pictures)
    assert not whole.passed and "is 1.5, 1.0 is allowed" in whole.verdict
    assert Quality.from_dict(whole.to_dict()) == whole and whole.to_dict()["pictures"]["value"] == 1.5
    (warning,) = list_warnings(whole)
    assert warning.startswith("on pictures that calibration did not see plain rounding is nearer")
    # Where there are no other rows, the figures are those of the rows that calibration saw: no sign of anything.
    assert list_warnings(replace(whole, pictures=whole.seen)) == [] and "pictures" not in found().to_dict()
