"""What the public ``leangrid.verify`` answers: true where a result is as it was written, and what differs where it is
not."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from leangrid.storage import writer


@dataclass(frozen=True, eq=False)
class Verified:
    """The answer of ``verify``: its truth is "every file is as its manifest says"; its items are what differs.

    Attributes:
        directory: what was looked at. differences: one sentence each; empty for a sound result.
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
        """Answers are equal that name the same differences; a list or tuple of them is equal too."""
        return self.differences == tuple(other) if isinstance(other, Verified | list | tuple) else NotImplemented

    def __hash__(self) -> int:
        return hash(self.differences)

    def __str__(self) -> str:
        return "\n".join(self.differences) or f"{self.directory}: every file is as its manifest says"


def verify(directory: str | Path) -> Verified:
    """Hold every file of the result ``directory`` against its manifest; true where nothing differs.

    Missing, changed, truncated, appended and additional files, links, folders that its own modules.json names, and any
    change of the manifest itself are found. Raises VerifyError if there is no such directory."""
    return Verified(Path(directory), tuple(writer.verify(Path(directory))))
