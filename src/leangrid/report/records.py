"""records.jsonl: one line for each layer, with what was asked, what came out, and every deviation from the method."""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from leangrid.errors import LeangridError, VerifyError
from leangrid.recipe import Recipe
from leangrid.report.strict_json import strict
from leangrid.solve.factor import FactorSummary
from leangrid.solve.layer import LinearResult
from leangrid.solve.rescue import Rescue


@dataclass(frozen=True)
class LayerRecord:
    """One quantized linear layer.

    Attributes:
        name: the layer's name in the checkpoint.
        shape: [out_features, in_features].
        scheme: the scheme that it was quantized with: of a K type the narrow one where 256 does not divide the columns.
        loss: tr(E H E^T)/2 as it was solved (block tuning moves codes afterwards); ``loss_minmax`` min-max GPTQ's and
            ``loss_rounding`` rounding's on the same target, Hessian, bits and groups.
        damping: lambda / mean(diag H) that the factor needed.
        rescues: deviations from the method: kind, detail, count (solve/rescue.py).
        seconds: wall time by stage: grid, solve, refine.
        tokens: calibration tokens that its Hessian is a sum over.
        correct: share of its inputs' own error that was corrected, as asked for or as measured; None in the records of
            older versions, which do not say.
    """

    name: str
    shape: tuple[int, int]
    scheme: str
    loss: float
    loss_minmax: float
    loss_rounding: float
    damping: float
    rescues: tuple[Rescue, ...]
    seconds: dict[str, float]
    tokens: int
    correct: float | None = None

    @classmethod
    def of(
        cls,
        name: str,
        recipe: Recipe,
        result: LinearResult,
        factor: FactorSummary,
        seconds: Mapping[str, float],
        correct: float = 0.0,
    ) -> "LayerRecord":
        """The record of one solved layer. A rescue that is reported more than once appears once."""
        every = (*factor.rescues, *result.rescues)
        rows, cols = result.codes.shape
        return cls(
            name,
            (int(rows), int(cols)),
            recipe.scheme_name(int(cols)),
            float(result.loss),
            float(result.loss_minmax),
            float(result.loss_rounding),
            factor.damping,
            tuple(dict.fromkeys(every)),
            {key: round(value, 4) for key, value in seconds.items()},
            factor.tokens,
            round(correct, 6),
        )

    @property
    def rescued(self) -> bool:
        """Whether there is a rescue that is no note: the layer then counts against ``--max-rescued``."""
        return any(not rescue.is_note for rescue in self.rescues)

    def to_json(self) -> dict[str, Any]:
        """Plain values, in the order of the attributes."""
        return asdict(self) | {"shape": list(self.shape), "rescues": [asdict(rescue) for rescue in self.rescues]}

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> "LayerRecord":
        """The inverse of ``to_json``, and of strict JSON, where a loss that is None was not finite; KeyError or
        TypeError where a key is missing or of another type."""
        rows, cols = value["shape"]
        rescues = tuple(Rescue(**rescue) for rescue in value["rescues"])
        losses = {
            key: math.nan if value[key] is None else value[key] for key in ("loss", "loss_minmax", "loss_rounding")
        }
        fields = {key: value[key] for key in ("name", "scheme", "damping", "seconds", "tokens")}
        return cls(shape=(rows, cols), rescues=rescues, correct=value.get("correct"), **losses, **fields)


def to_lines(records: Iterable[LayerRecord]) -> str:
    """The text of records.jsonl: strict JSON, so a loss that is not finite becomes null."""
    return "".join(json.dumps(strict(record.to_json()), allow_nan=False) + "\n" for record in records)


def read_records(path: Path) -> list[LayerRecord]:
    """records.jsonl of a result; VerifyError naming the first line that is none of ours."""
    records: list[LayerRecord] = []
    try:
        for line in path.read_text(encoding="utf-8").splitlines():
            records.append(LayerRecord.from_json(json.loads(line)))
    except (OSError, ValueError, KeyError, TypeError, LeangridError) as error:
        raise VerifyError(
            f"the record cannot be read: {error}", f"{path}:{len(records) + 1}", "Run: leangrid verify DIR"
        ) from error
    return records


def totals(records: Sequence[LayerRecord]) -> dict[str, float]:
    """Sums of the three losses over all layers."""
    return {key: sum(getattr(record, key) for record in records) for key in ("loss", "loss_minmax", "loss_rounding")}
