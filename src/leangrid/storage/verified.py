"""``leangrid.verify``: whether the files of a result are as they were written."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from leangrid.storage.manifest import list_differences


@dataclass(frozen=True, eq=False)
class Verified:
    """What ``verify`` returns: the differences between a result's files and its manifest.

    It reads like the list of their sentences (iteration, ``len``, ``==``; ``str`` has one a line), with one exception:
    it is true where the list is empty, so that ``if leangrid.verify(out):`` means that the result is intact.

    Attributes:
        directory: the result that was verified.
        differences: one sentence for each; empty where nothing differs.

    Example:
        >>> found = leangrid.verify("out")
        >>> bool(found), found.differences
        (True, ())
    """

    directory: Path
    differences: tuple[str, ...]

    def __bool__(self) -> bool:
        return not self.differences

    def __iter__(self) -> Iterator[str]:
        return iter(self.differences)

    def __len__(self) -> int:
        return len(self.differences)

    def __eq__(self, other: Any) -> bool:
        """Whether both name the same differences; a list or tuple of the sentences can be equal too."""
        return self.differences == tuple(other) if isinstance(other, Verified | list | tuple) else NotImplemented

    def __hash__(self) -> int:
        return hash(self.differences)

    def __str__(self) -> str:
        return "\n".join(self.differences) or f"{self.directory}: every file is as its manifest says"


def verify(directory: str | Path) -> Verified:
    """Compare every file of a result with the sizes and hashes in its manifest.

    Missing, changed, truncated, lengthened and additional files and links are found, in folders that modules.json names
    too, and any change of the manifest itself.

    Args:
        directory: a result of ``quantize`` or ``export``.

    Returns:
        What differs; it is true where nothing does.

    Raises:
        VerifyError: there is no such directory.

    Example:
        >>> assert leangrid.verify("out")
        >>> Path("out/tokenizer.json").unlink()
        >>> list(leangrid.verify("out"))
        ['tokenizer.json: missing']
    """
    return Verified(Path(directory), tuple(list_differences(Path(directory))))
