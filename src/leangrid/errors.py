"""The errors that leangrid raises. A message says what is wrong, where, and what to do next.

Exit codes of the command line: 2 bad input, nothing written; 3 stopped, the same command resumes; 4 finished, but with
more rescues than allowed or too far from the original. Anything that is not a LeangridError is a bug (1).
"""


class LeangridError(Exception):
    """Base of all errors that a user can do something about; its text is the three parts in one line.

    Args:
        what: what is wrong.
        where: the file, tensor, layer or option concerned; None where there is none.
        way_out: what to do next, a command where there is one; None where there is nothing.
    """

    exit_code = 2

    def __init__(self, what: str, where: object | None = None, way_out: str | None = None) -> None:
        self.what, self.where, self.way_out = what, None if where is None else str(where), way_out
        sentence = what if where is None else f"{what} ({where})"
        super().__init__(sentence if way_out is None else f"{sentence}. {way_out}")


class RecipeError(LeangridError):
    """A scheme, option or recipe file with a wrong or impossible value."""


class CheckpointError(LeangridError):
    """A source that is missing, damaged, unsafe to read, or not what its config says."""


class ArchitectureError(LeangridError):
    """A model type that is not in the table of models/architectures.py."""


class CalibrationError(LeangridError):
    """Too little text, no network, a tokenizer that does not fit the model, or a layer without calibration tokens."""


class ShapeError(LeangridError):
    """Tensors whose shapes, dtypes or values an operation does not accept."""


class FormatError(LeangridError):
    """A container that is unknown or cannot hold a result exactly."""


class OutputError(LeangridError):
    """An output directory that exists, is in use, or cannot be written."""


class ResumeError(LeangridError):
    """An unfinished run that belongs to another recipe, model or calibration."""


class VerifyError(LeangridError):
    """A directory that is no result, or differs from its manifest."""


class NumericalError(LeangridError):
    """A Hessian or weight for which no rescue gave a usable result."""


class TaskError(LeangridError):
    """An unknown task, or one whose data, judge or program is missing or not usable."""


class Interrupted(LeangridError):
    """The run stopped early. All finished blocks are on disk; the same command resumes."""

    exit_code = 3


def first_line(error: BaseException) -> str:
    """The message of another library's error in one line of at most 200 characters: its first line, and the next ones
    where a line ends with a colon; the name of its type where it has no message."""
    if isinstance(error, KeyError) and len(error.args) == 1 and isinstance(error.args[0], str):
        return f"it does not know {error.args[0]!r}"[:200]
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    said = lines[:1]
    while said and said[-1].endswith(":") and len(said) < len(lines):
        said.append(lines[len(said)])
    return (" ".join(said) or type(error).__name__)[:200]
