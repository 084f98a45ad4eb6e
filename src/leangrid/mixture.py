"""Calibration from several sources at once, written ``c4:64,self:64``: so many windows of each."""

import re
from dataclasses import dataclass

_PART = re.compile(r"(.+):(\d{1,7})")


@dataclass(frozen=True)
class Part:
    """One source of a mixture, and how many calibration windows it gives."""

    source: str
    windows: int


def split_mixture(calibration: str) -> tuple[Part, ...]:
    """The sources that ``calibration`` names, in its order; none where it is one source and no mixture.

    Of a mixture every part between commas ends with a colon and a number, and there are two parts or more."""
    found = [_PART.fullmatch(part.strip()) for part in calibration.split(",")]
    if len(found) < 2 or None in found:
        return ()
    return tuple(Part(part[1], int(part[2])) for part in found if part is not None)


def beside_own_text(calibration: str, samples: int, length: int, most: int) -> str:
    """One source as a mixture of its ``samples`` windows with those that the model writes itself: three to each, up to
    ``most`` tokens in all. ``calibration`` itself where that is none, where the model writes all of it already, or
    where its name cannot stand in a mixture."""
    own = min(3 * samples, most // length - samples)
    mixed = f"{calibration}:{samples},self:{own}"
    stands = split_mixture(mixed) == (Part(calibration, samples), Part("self", own))
    return mixed if own > 0 and calibration != "self" and not split_mixture(calibration) and stands else calibration


def sources_of(calibration: str) -> tuple[str, ...]:
    """The names of all sources: those of a mixture, or the one."""
    return tuple(part.source for part in split_mixture(calibration)) or (calibration,)


def first_read(calibration: str) -> str:
    """The first source that is read and not written by the model itself, of which the quality gate takes more; else the
    first."""
    sources = sources_of(calibration)
    return next((source for source in sources if source != "self"), sources[0])


def spread(counts: tuple[int, ...]) -> list[int]:
    """The source, by its number, of each window of a mixture, spread so that every stretch has them in about their
    proportion: the windows that are held out for judging are the last ones."""
    places = [((2 * place + 1) / (2 * count), source) for source, count in enumerate(counts) for place in range(count)]
    return [source for _, source in sorted(places)]
