"""What was done differently from what the recipe asks, as a value for the records, the summary and the exit code.

The mathematics never prints or warns: a function that deviates returns a Rescue."""

from dataclasses import dataclass

from leangrid.errors import LeangridError

KINDS = {
    "damping": "more damping than asked before the Hessian could be factored",
    "float64": "the Hessian was factored in float64",
    "diagonal": "only the diagonal of the Hessian was used",
    "worse_than_rounding": "the result was worse than rounding on its own Hessian; the better one was kept",
    "nonfinite_tokens": "calibration tokens with NaN or infinite activations were left out",
    "dead_columns": "input columns that calibration never touched",
    "guarded_rows": "rows that fell behind min-max GPTQ and took another grid",
    "starved_expert": "an expert saw fewer tokens than its linears have columns: "
    "its Hessian was blended with that of all experts",
    "unseen_expert": "an expert saw no token: the Hessian of all experts' inputs was used instead",
    "memory": "memory ran out: the same work in smaller pieces or on the CPU",
    "unguided": "no gradient of the predictions could be drawn: blocks were tuned by their own outputs alone",
}
NOTES = frozenset({"dead_columns", "guarded_rows", "starved_expert", "memory", "unguided"})


@dataclass(frozen=True)
class Rescue:
    """One recorded deviation.

    Args:
        kind: a key of KINDS.
        detail: one sentence with the numbers.
        count: how many columns, rows or tokens it concerns.
    """

    kind: str
    detail: str
    count: int = 1

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise LeangridError(f"'{self.kind}' is not a kind of rescue", "rescue.py", f"Kinds: {', '.join(KINDS)}")

    @property
    def is_note(self) -> bool:
        """True where the deviation costs no quality and does not count against the limit of rescues."""
        return self.kind in NOTES
