"""Every way leangrid says no. A message holds three things: what, where, and the way out.

Exit codes (the command line's promise): 2 bad input, nothing written; 3 stopped, the same command resumes;
4 finished, but with more rescues than allowed. Anything that is not a LeangridError is a bug of ours (1).
"""


class LeangridError(Exception):
    """One clear sentence for the user.

    Args:
        what: what is wrong, in the user's words.
        where: the file, tensor, layer or option concerned.
        way_out: what to do next, a command where there is one.
    """

    exit_code = 2

    def __init__(self, what: str, where: object | None = None, way_out: str | None = None) -> None:
        self.what, self.where, self.way_out = what, None if where is None else str(where), way_out
        sentence = what if where is None else f"{what} ({where})"
        super().__init__(sentence if way_out is None else f"{sentence}. {way_out}")


class RecipeError(LeangridError):
    """A scheme, option or recipe file that asks for something impossible."""


class CheckpointError(LeangridError):
    """A source that is missing, damaged, hostile or not what its config says."""


class ArchitectureError(LeangridError):
    """A model type that the table in models/architectures.py does not hold."""


class CalibrationError(LeangridError):
    """Too little text, no network, a tokenizer that does not fit, or a layer that saw no tokens."""


class ShapeError(LeangridError):
    """Tensors whose shapes, dtypes or values an operation cannot take."""


class FormatError(LeangridError):
    """A result that the asked-for container cannot hold exactly."""


class OutputError(LeangridError):
    """An output directory that exists, is in use, or cannot be written."""


class ResumeError(LeangridError):
    """An unfinished run that belongs to another recipe, model or calibration."""


class VerifyError(LeangridError):
    """A directory that differs from its manifest."""


class NumericalError(LeangridError):
    """A Hessian or weight on which no rung of the ladder gave a usable result."""


class TaskError(LeangridError):
    """A task that is not known, or whose data, judge or program is not there or not usable."""


class Interrupted(LeangridError):
    """The run stopped early and kept all finished blocks; the same command resumes."""

    exit_code = 3


def first_line(error: BaseException) -> str:
    """What another library's error says, in one line of at most 200 characters: its first, and those that a colon
    announces; its type where it says nothing."""
    if isinstance(error, KeyError) and len(error.args) == 1 and isinstance(error.args[0], str):
        return f"it does not know {error.args[0]!r}"[:200]
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    said = lines[:1]
    while said and said[-1].endswith(":") and len(said) < len(lines):
        said.append(lines[len(said)])
    return (" ".join(said) or type(error).__name__)[:200]
