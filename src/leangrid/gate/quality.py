"""What the quality gate found: distances, the limit, and whether a result may be used."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

# Above these a model is broken rather than quantized. Measured on SmolLM2: 0.11 at 4 bits, 0.47 at 3, and 3.3 for plain
# rounding at 3, which is perplexity 371 instead of 13.
KL_LIMITS = {8: 0.1, 5: 0.5, 4: 1.0, 3: 2.0, 2: 6.0}
COSINE_LIMITS = {8: 0.02, 5: 0.1, 4: 0.2, 3: 0.4, 2: 0.7}
# How much more than rounding's the result's distance may grow from the calibration's windows to unseen ones. Measured
# on tiny models: 4 to 30 after 4 or 8 windows of 32 tokens, at most 2.8 after 32 of them and 1.3 after 32 of 128.
MUCH_WORSE = 4.0
TINY = 0.001  # share of the limit below which no distance is worth a warning


@dataclass(frozen=True)
class Distance:
    """How far a result is from its original on one text.

    Attributes:
        measure: kl (mean KL from the original per predicted token, in nats), or cosine (mean 1 - cosine similarity of
            the mean-pooled last hidden states) for models without a language-model head.
        value: the distance; NaN where the result's outputs are not finite.
        windows, tokens: how much text was measured.
        top1_agreement: share of predicted tokens on which both models agree; None for cosine.
        perplexity, reference_perplexity: of the result and of the original; None for cosine, infinite on overflow.
        rounding: the distance of plain rounding; None where it was not measured.
    """

    measure: str
    value: float
    windows: int
    tokens: int
    top1_agreement: float | None = None
    perplexity: float | None = None
    reference_perplexity: float | None = None
    rounding: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """The figures that were measured, for JSON: null for what is not finite."""
        figures: dict[str, Any] = {"measure": self.measure, "value": _to_json(self.value)}
        for name in ("top1_agreement", "perplexity", "reference_perplexity", "rounding"):
            figure = getattr(self, name)
            figures |= {} if figure is None else {name: _to_json(figure)}
        return figures | {"windows": self.windows, "tokens": self.tokens}

    @classmethod
    def from_dict(cls, stored: Mapping[str, Any]) -> "Distance":
        """The inverse of ``to_dict``; what is null is NaN."""
        names = (field.name for field in fields(cls) if field.name in stored)
        figures: dict[str, Any] = {name: math.nan if stored[name] is None else stored[name] for name in names}
        return cls(**figures)


@dataclass(frozen=True)
class Quality:
    """What the gate found.

    Attributes:
        seen: measured on the first calibration windows, of a calibration by pictures on its first rows; None where the
            result could not be opened or run.
        unseen: measured on ``unseen_text``, which calibration did not see; None where there is no such text.
        pictures: measured on rows with pictures that calibration did not see, or the same as ``seen`` where there were
            no more; None where calibration was by text.
        original: what leangrid's reading of the original was compared with, in words.
        worst_layers: the linears whose outputs differ most, as {"name": path, "error": |y^ - y| / |y|}.
        limit: the largest distance that passes.
        error: why the result cannot be trusted, one sentence; None where it can.
        warnings: signs of a calibration that was too small, one sentence each.
    """

    seen: Distance | None = None
    unseen: Distance | None = None
    unseen_text: str = ""
    original: str = ""
    worst_layers: tuple[Mapping[str, Any], ...] = ()
    limit: float | None = None
    error: str | None = None
    warnings: tuple[str, ...] = ()
    pictures: Distance | None = None

    @property
    def distance(self) -> float:
        """The largest of the distances on what calibration saw and did not see, which the limit is for; NaN where one
        is not finite."""
        values = [text.value for text in (self.seen, self.unseen, self.pictures) if text is not None]
        return max(values) if values and all(map(math.isfinite, values)) else math.nan

    @property
    def passed(self) -> bool:
        """Whether the result may be used: it was measured, without an error, and is within the limit."""
        return self.error is None and self.limit is not None and self.distance <= self.limit

    @property
    def verdict(self) -> str:
        """Why a result did not pass, in one sentence."""
        if self.error is not None:
            return self.error
        what = (
            "the mean KL from the original"
            if self.seen is not None and self.seen.measure == "kl"
            else "the distance of the embeddings from the original's"
        )
        worst = ", ".join(f"{layer['name']} ({layer['error']:.2g})" for layer in self.worst_layers)
        layers = f"worst layers by the relative error of their outputs: {worst}"
        return f"{what} is {_to_json(self.distance)}, {self.limit} is allowed; {layers}"

    def to_dict(self) -> dict[str, Any]:
        """What the manifest holds as ``quality``; ``seen`` is spread out in it."""
        if self.seen is None:
            return {} if self.error is None else {"error": self.error}
        found = self.seen.to_dict() | {"original": self.original, "worst_layers": [dict(x) for x in self.worst_layers]}
        found["limit"] = self.limit
        if self.unseen is not None:
            found["unseen"] = {"text": self.unseen_text} | self.unseen.to_dict()
        if self.pictures is not None:
            found["pictures"] = self.pictures.to_dict()
        if self.error is not None:
            found["error"] = self.error
        return found | ({"warnings": list(self.warnings)} if self.warnings else {})

    @classmethod
    def from_dict(cls, stored: Mapping[str, Any]) -> "Quality":
        """The inverse of ``to_dict``; what is null is NaN."""
        unseen, pictures = stored.get("unseen"), stored.get("pictures")
        return cls(
            Distance.from_dict(stored) if "measure" in stored else None,
            None if unseen is None else Distance.from_dict(unseen),
            "" if unseen is None else unseen["text"],
            stored.get("original", ""),
            tuple(stored.get("worst_layers", ())),
            stored.get("limit"),
            stored.get("error"),
            tuple(stored.get("warnings", ())),
            None if pictures is None else Distance.from_dict(pictures),
        )


def default_limit(bits: int, measure: str) -> float:
    """The largest distance that passes at ``bits`` bits; ``measure`` is kl or cosine."""
    limits = COSINE_LIMITS if measure == "cosine" else KL_LIMITS
    return limits[max((known for known in limits if known <= bits), default=min(limits))]


def list_warnings(found: Quality) -> list[str]:
    """A sentence where there is a sign of a calibration that was too small, seen on what it did not hold: text, or
    pictures."""
    others = [(found.unseen, f"text that calibration did not see ({found.unseen_text})")]
    if found.pictures is not found.seen:
        others.append((found.pictures, "pictures that calibration did not see"))
    sentences = (_warning(found, other, what) for other, what in others if other is not None)
    return [sentence for sentence in sentences if sentence][:1]


def _warning(found: Quality, other: Distance, what: str) -> str:
    """The sentence for ``other``, measured on ``what``; "" where nothing is wrong."""
    seen, limit = found.seen, found.limit
    if seen is None or limit is None or seen.rounding is None or other.rounding is None:
        return ""
    value, rounding = other.value, other.rounding
    if not all(map(math.isfinite, (seen.value, seen.rounding, value, rounding))) or value <= TINY * limit:
        return ""
    distance = "KL from the original" if seen.measure == "kl" else "distance from the original"
    more = "calibrate with more text (--samples, --length)"
    if value > rounding:
        return (
            f"on {what} plain rounding is nearer to the original: "
            f"its {distance} is {rounding:.3g}, the result's {value:.3g}; {more}"
        )
    # How much the result's distance grew on what it did not see, over how much rounding's did.
    if value * seen.rounding > MUCH_WORSE * seen.value * rounding:
        return f"the {distance} is {value:.3g} on {what}, {seen.value:.3g} on the text it saw; {more}"
    return ""


def _to_json(value: float) -> float | None:
    """JSON has no NaN and no infinity."""
    return value if math.isfinite(value) else None
