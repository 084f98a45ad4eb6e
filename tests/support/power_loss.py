"""A disk that may lose its power after any operation: every tree that could then be found on it.

``Recorder`` stands for the ``os`` module in storage/files.py. It carries each operation out and keeps a model of what
is durable: the bytes that an fsync covered, and the names that an fsync of their directory covered. After each
operation ``Recorder.crashes`` grows by every tree that a power cut may leave there:

* names changed since their directory was last synced: any subset of the changes, as long as a change comes with those
it builds on;
* files with bytes that no fsync covered: empty, cut in half, whole, or with garbage in place of the second half.

The idea is SQLite's (https://www.sqlite.org/testing.html, "Crash Testing"), for a tree of files instead of one.
"""

import itertools
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

Tree = dict[str, bytes | None]  # relative path -> contents; None is a directory
Change = tuple[
    tuple[int, str, int | None], ...
]  # (directory, name, what it now names): one operation, kept or lost as a whole

_ALL_SUBSETS = 6  # of so few pending changes; of more: the first n, all but one, one alone
TORN: tuple[Callable[[bytes], bytes], ...] = (
    lambda data: data,
    lambda data: b"",
    lambda data: data[: len(data) // 2],
    lambda data: data[: len(data) // 2] + bytes((31 * i + 7) % 256 for i in range(len(data) - len(data) // 2)),
)


@dataclass
class Node:
    """A file or a directory, by what a running program sees and by what is durable."""

    data: bytes | None  # None: a directory
    synced: bytes | None = None
    names: dict[str, int] = field(default_factory=dict)
    durable: dict[str, int] = field(default_factory=dict)


class Recorder:
    """``os`` for storage/files.py, on a directory that starts out durable as it is."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.nodes: list[Node] = []
        self.pending: list[Change] = []
        self.open_files: dict[int, int] = {}
        self.operations = 0
        self.crashes: dict[frozenset, Tree] = {}
        self._adopt(root)

    def _adopt(self, path: Path) -> int:
        node = Node(None if path.is_dir() else path.read_bytes())
        node.synced = node.data
        self.nodes.append(node)
        number = len(self.nodes) - 1
        if path.is_dir():
            node.names = {child.name: self._adopt(child) for child in sorted(path.iterdir())}
            node.durable = dict(node.names)
        return number

    def __getattr__(self, name: str) -> Any:
        return getattr(os, name)

    # What storage/files.py does
    # ----------------------------------------------------------------------------------------------------------

    def open(self, path: Any, flags: int, *rest: Any, **named: Any) -> int:
        descriptor = os.open(path, flags, *rest, **named)
        place = self._place(path)
        if place is None:
            return descriptor
        directory, name = place
        if name and name not in self.nodes[directory].names:
            self.nodes.append(Node(b""))
            self._change((directory, name, len(self.nodes) - 1))
        self.open_files[descriptor] = self.nodes[directory].names[name] if name else directory
        return descriptor

    def close(self, descriptor: int) -> None:
        self.open_files.pop(descriptor, None)
        os.close(descriptor)

    def write(self, descriptor: int, data: Any) -> int:
        count = os.write(descriptor, data)
        self._written(descriptor, bytes(data[:count]), append=True)
        return count

    def pwrite(self, descriptor: int, data: bytes, at: int) -> int:
        count = os.pwrite(descriptor, data, at)
        self._written(descriptor, data[:count], append=False)
        return count

    def fsync(self, descriptor: int) -> None:
        os.fsync(descriptor)
        number = self.open_files.get(descriptor)
        if number is None:
            return
        node = self.nodes[number]
        node.synced = node.data
        if node.data is None:
            for change in [c for c in self.pending if any(directory == number for directory, _, _ in c)]:
                self._make_durable(change)
        self._after()

    def replace(self, source: Any, target: Any) -> None:
        os.replace(source, target)
        (old, name), (new, renamed) = self._known(source), self._known(target)
        self._change((old, name, None), (new, renamed, self.nodes[old].names[name]))

    def unlink(self, path: Any) -> None:
        os.unlink(path)
        self._change((*self._known(path), None))

    def mkdir(self, path: Any) -> None:
        os.mkdir(path)
        self.nodes.append(Node(None))
        self._change((*self._known(path), len(self.nodes) - 1))

    def rmdir(self, path: Any) -> None:
        os.rmdir(path)
        self._change((*self._known(path), None))

    # The model

    def _place(self, path: Any) -> tuple[int, str] | None:
        """The directory and the name of ``path``; None outside of the root, no name for the root itself."""
        path = Path(path)
        if not path.is_relative_to(self.root):
            return None
        at, parts = 0, path.relative_to(self.root).parts
        for part in parts[:-1]:
            at = self.nodes[at].names[part]
        return at, parts[-1] if parts else ""

    def _known(self, path: Any) -> tuple[int, str]:
        place = self._place(path)
        if place is None:
            raise AssertionError(f"{path} is outside of {self.root}")
        return place

    def _written(self, descriptor: int, data: bytes, append: bool) -> None:
        number = self.open_files.get(descriptor)
        if number is not None:
            node = self.nodes[number]
            node.data = (node.data or b"") + data if append else data
            self._after()

    def _change(self, *steps: tuple[int, str, int | None]) -> None:
        self.pending.append(steps)
        _apply(steps, [node.names for node in self.nodes])
        self._after()

    def _make_durable(self, change: Change) -> None:
        """``change`` and whatever it builds on."""
        kept = _closed({self.pending.index(change)}, self.pending)
        for number in sorted(kept):
            _apply(self.pending[number], [node.durable for node in self.nodes])
        self.pending = [c for n, c in enumerate(self.pending) if n not in kept]

    def _after(self) -> None:
        self.operations += 1
        for kept in _subsets(self.pending):
            names = [dict(node.durable) for node in self.nodes]
            for number in sorted(kept):
                _apply(self.pending[number], names)
            for torn in TORN:
                tree: Tree = {}
                certain = self._read(0, "", names, torn, tree)
                self.crashes.setdefault(frozenset(tree.items()), tree)
                if certain:  # nothing here was waiting for an fsync
                    break

    def _read(
        self, number: int, path: str, names: list[dict[str, int]], torn: Callable[[bytes], bytes], tree: Tree
    ) -> bool:
        certain = True
        for name, child in names[number].items():
            node, where = self.nodes[child], f"{path}{name}"
            if node.data is None:
                tree[where] = None
                certain &= self._read(child, f"{where}/", names, torn, tree)
            else:
                tree[where] = node.data if node.data == node.synced else torn(node.data)
                certain &= node.data == node.synced
        return certain


def _apply(change: Change, names: list[dict[str, int]]) -> None:
    for directory, name, number in change:
        if number is None:
            names[directory].pop(name, None)
        else:
            names[directory][name] = number


def _closed(kept: set[int], pending: list[Change]) -> set[int]:
    """``kept`` and every earlier change of a name that one of them changes."""
    result: set[int] = set()
    touched: set[tuple[int, str]] = set()
    for number in reversed(range(len(pending))):
        names = {(directory, name) for directory, name, _ in pending[number]}
        if number in kept or names & touched:
            result.add(number)
            touched |= names
    return result


def _subsets(pending: list[Change]) -> Iterator[set[int]]:
    every = range(len(pending))
    if len(pending) <= _ALL_SUBSETS:
        chosen: Iterator[set[int]] = (
            set(c) for size in range(len(pending) + 1) for c in itertools.combinations(every, size)
        )
    else:
        chosen = (
            set(c)
            for c in itertools.chain(
                (range(n) for n in range(len(pending) + 1)),
                ([*range(n), *range(n + 1, len(pending))] for n in every),
                ([n] for n in every),
            )
        )
    yield from {frozenset(_closed(c, pending)): _closed(c, pending) for c in chosen}.values()


def materialise(tree: Tree, root: Path) -> None:
    """Make ``tree`` in ``root``, which is empty."""
    for where, data in sorted(tree.items()):
        if data is None:
            (root / where).mkdir(parents=True, exist_ok=True)
        else:
            (root / where).parent.mkdir(parents=True, exist_ok=True)
            (root / where).write_bytes(data)
