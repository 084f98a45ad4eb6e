"""The journal of a run: what it has finished, in a directory from which the same command resumes after a kill.

::

    OUT.partial/                    its name and its lack of a config.json show that this is no model
      LOCK  identity.json           the process that uses it; source, recipe and settings of the run
      named/windows.safetensors     tensors of the whole run, such as the calibration windows (+ .json)
      named/finished.safetensors    what takes the place of tensors of the blocks (+ .json, the commit)
      blocks/0007.safetensors       the packed tensors of block 7
      blocks/0007.json              their sha256 and what the run noted of the block; written second: the commit
      state/0008.safetensors        the hidden states that enter block 8 (+ .json); replaced by those of a later block
      source/                       the dequantized checkpoint of a .gguf source
      head/                         the tensors outside of the blocks, while the result is written
      publish/                      the result while it is written; then renamed to OUT

If OUT cannot be replaced, such as a mount point, this directory is OUT/.partial (storage/mount.py).

A tensor file counts only if its .json exists and its bytes have the sha256 in that .json.
"""

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from torch import Tensor

from leangrid.errors import CheckpointError, OutputError, ResumeError
from leangrid.storage import files, safetensors
from leangrid.storage.failpoints import failpoint
from leangrid.storage.manifest import MANIFEST, RUN_INSIDE
from leangrid.storage.mount import cannot_be_replaced, restore_older_result

FORMAT_VERSION = 3  # of this layout; part of the identity, so that no version resumes a journal of another layout
_ENTRIES = frozenset(
    {"LOCK", "identity.json", "sealed.json", "blocks", "state", "named", "head", "publish", "replaced", "source"}
)
_RESTART = "--restart discards the unfinished run"
_NAME = re.compile(r"[a-z][a-z0-9_]{0,40}")


class Journal:
    """The run directory ``OUT.partial``; a context manager that releases the lock at its end.

    Args:
        partial: the run directory.
        state_dir: a directory on another disk for the hidden states; None: they are in the run directory.

    Attributes:
        states: the directory of the hidden states.
        identity: what the run is, as ``start_or_resume`` got it.
        is_fresh: whether this process started the run, so that nothing of an earlier process can be lost.
        keeps_states: whether hidden states are saved between blocks; False where a resumed run makes them again.
        computes_states: whether states that are missing are computed; else the blocks after the newest are made again.
        notices: sentences for the user.
    """

    def __init__(self, partial: Path, state_dir: Path | None = None) -> None:
        self.partial = partial
        self.notices: list[str] = []
        self.identity: dict[str, Any] = {}
        self.is_fresh = False
        self.keeps_states, self.computes_states = True, False
        self.states = partial / "state" if state_dir is None else state_dir / f"{output_of(partial).name}.partial.state"
        self._lock = files.FileLock(partial / "LOCK")
        self._committed: int | None = None
        self._is_finished: bool | None = None

    @classmethod
    def for_output(cls, out: Path, state_dir: Path | None = None) -> "Journal":
        """The journal of the run whose result will be ``out``."""
        return cls(partial_of(out), state_dir)

    def start_or_resume(self, identity: Mapping[str, Any], restart: bool = False) -> "Journal":
        """Take the lock, and start or resume the run that ``identity`` describes; return this journal.

        Args:
            identity: nested dicts of JSON values. A run is resumed only with an equal identity.
            restart: discard an unfinished run instead of resuming it.

        Raises:
            OutputError: another process uses the directory, or it is no run directory.
            ResumeError: the unfinished run has another identity; names the first field that differs.
        """
        self.identity = json.loads(json.dumps({"format_version": FORMAT_VERSION, **identity}))
        if self.partial.is_symlink() or (self.partial.exists() and not self.partial.is_dir()):
            raise OutputError("not a directory", self.partial, "Remove it, or choose another output directory")
        files.make_dir(self.partial)
        self._refuse_foreign_files()
        self._lock.acquire()
        try:
            self._start_locked(restart)
        except BaseException:
            self.close()
            raise
        return self

    def _start_locked(self, restart: bool) -> None:
        if self._lock.stale_owner:
            self.notices.append(f"taking over an unfinished run of {self._lock.stale_owner}, which is gone")
        self._sweep_temporaries()
        path = self.partial / "identity.json"
        if restart:
            self._wipe()
        elif path.exists():
            self._require_same_identity(path)
        elif any((self.partial / name).exists() for name in ("blocks", "state", "named")):
            raise ResumeError("an unfinished run without its identity.json", self.partial, _RESTART)
        if self.states.parent != self.partial:
            files.make_dir(self.states)  # first, so that a place that cannot be written to leaves no identity behind
        failpoint("journal.before_identity")
        if not path.exists():
            files.write_json(path, self.identity)
            self.is_fresh = True
        for directory in (self.partial / "blocks", self.partial / "named", self.states):
            files.make_dir(directory)

    def _require_same_identity(self, path: Path) -> None:
        try:
            stored = json.loads(path.read_bytes())
        except (OSError, ValueError) as error:
            raise ResumeError(f"the unfinished run's identity cannot be read: {error}", path, _RESTART) from None
        difference = first_difference(stored, self.identity)
        if difference:
            field, then, now = difference
            raise ResumeError(
                f"an unfinished run with another {field}: it has {_short(then)}, this one {_short(now)}",
                self.partial,
                f"Run the command it was started with to finish it; {_RESTART}",
            )

    def close(self) -> None:
        """Remove temporary files and release the lock. The journal stays, so the run can be resumed."""
        if self._lock.held:
            self._sweep_temporaries()
            self._lock.release()
            files.remove_if_empty(self.partial)  # a run that was never started

    def __enter__(self) -> "Journal":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # Blocks

    def commit_block(self, index: int, tensors: Mapping[str, Tensor], info: Mapping[str, Any]) -> None:
        """Store block ``index`` durably; later blocks of an earlier attempt are removed.

        Blocks are committed in order, the first is 0; ValueError for one whose predecessors are missing.

        Args:
            tensors: the packed tensors of the result, by name.
            info: what the run notes of the block (records of its layers, times, memory), as JSON values.
        """
        done = self.count_committed()
        if index > done:
            raise ValueError(f"block {index} cannot be committed before block {done}")
        self._drop_blocks(index)
        self._remove_finished()
        self._store(self._block(index), tensors, {"info": dict(info)})
        failpoint("journal.after_block")
        self._committed = index + 1

    def count_committed(self) -> int:
        """The number of committed blocks whose bytes are intact, counted from the first.

        The first call hashes them all, and removes a damaged block and those after it."""
        if self._committed is None:
            count = 0
            while self._is_intact(self._block(count)):
                count += 1
            self._drop_blocks(count)
            self._committed = count
        return self._committed

    def read_block_info(self, index: int) -> dict[str, Any]:
        """What ``commit_block`` was given as ``info`` for a committed block."""
        return json.loads(self._block(index).with_suffix(".json").read_bytes())["info"]

    def locate_block_tensors(self, index: int) -> dict[str, safetensors.TensorInfo]:
        """Where the tensors of a committed block are stored, so that they can be copied without loading them."""
        infos = safetensors.read_tensor_infos(self._block(index))
        others = safetensors.read_tensor_infos(self._finished) if self.read_finished_info() is not None else {}
        return {name: others.get(name, info) for name, info in infos.items()}

    def commit_finished(self, tensors: Mapping[str, Tensor], info: Mapping[str, Any]) -> None:
        """Store durably what takes the places of tensors of all committed blocks, and what the run notes of it."""
        self._store(self._finished, tensors, {"info": dict(info)})
        self._is_finished = True

    def read_finished_info(self) -> dict[str, Any] | None:
        """What ``commit_finished`` was given as ``info``; None before it was called. The first call looks whether what
        it stored is intact."""
        if self._is_finished is None:
            self._is_finished = self._is_intact(self._finished)
        return json.loads(self._finished.with_suffix(".json").read_bytes())["info"] if self._is_finished else None

    # Hidden states and tensors of the whole run

    def save_state(self, index: int, tensors: Mapping[str, Tensor]) -> None:
        """Store the hidden states that enter block ``index`` durably; then remove those that no resume can need."""
        self._store(self._state(index), tensors, {})
        failpoint("journal.after_state")
        oldest_needed = min(index, self.count_committed())
        for path in self.states.glob("[0-9]*.safetensors"):
            if int(path.stem) < oldest_needed:
                self._remove(path)

    def load_state(
        self, index: int, convert: Callable[[Tensor], Tensor] = lambda tensor: tensor
    ) -> dict[str, Tensor] | None:
        """The hidden states that enter block ``index``, each passed through ``convert`` as soon as it is read.

        None if they are missing or damaged."""
        return self._load(self._state(index), convert)

    def find_resume_point(self) -> int:
        """Find the block with which a resumed run continues, and remove the blocks from it on.

        It is the last block whose hidden states are intact and whose predecessors are all committed; 0 if there is
        none. Afterwards ``count_committed()`` is the same number. Where no states are kept, or those that are not there
        are computed, it is the first block that is not committed."""
        done = self.count_committed()
        ended = self.read_finished_info() is not None  # then no block reads states any more
        needs_states = self.keeps_states and not self.computes_states and not ended
        if needs_states and (point := self.find_state()) < done:
            self.notices.append(
                f"the hidden states after block {done} are missing or damaged: going on from block {point + 1}"
            )
            self._drop_blocks(point)
            self._committed = point
        return self.count_committed()

    def find_state(self) -> int:
        """The last block of those up to the first that is not committed whose hidden states are intact; 0 if there is
        none."""
        return next((index for index in range(self.count_committed(), 0, -1) if self._is_intact(self._state(index))), 0)

    def save_artifact(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        """Store tensors that belong to the whole run, such as the calibration ``windows``, under a plain name."""
        if not _NAME.fullmatch(name):
            raise ValueError(f"not a plain name: {name!r}")
        self._store(self.partial / "named" / f"{name}.safetensors", tensors, {})

    def load_artifact(self, name: str) -> dict[str, Tensor] | None:
        """The tensors that were stored under ``name``; None if they are missing or damaged."""
        return self._load(self.partial / "named" / f"{name}.safetensors")

    # A tensor file and its .json

    def _block(self, index: int) -> Path:
        return self.partial / "blocks" / f"{index:04d}.safetensors"

    @property
    def _finished(self) -> Path:
        return self.partial / "named" / "finished.safetensors"

    def _state(self, index: int) -> Path:
        return self.states / f"{index:04d}.safetensors"

    def _store(self, path: Path, tensors: Mapping[str, Tensor], entry: dict[str, Any]) -> None:
        files.remove(path.with_suffix(".json"))  # until the new one is written, the tensor file does not count
        sha256 = safetensors.save(path, tensors)
        failpoint("journal.before_commit")
        files.write_json(path.with_suffix(".json"), {"sha256": sha256, "bytes": path.stat().st_size, **entry})

    def _load(
        self, path: Path, convert: Callable[[Tensor], Tensor] = lambda tensor: tensor
    ) -> dict[str, Tensor] | None:
        if not path.with_suffix(".json").exists():
            return None
        try:
            return safetensors.load(path, json.loads(path.with_suffix(".json").read_bytes())["sha256"], convert)
        except (OSError, ValueError, KeyError, TypeError, CheckpointError):
            self.notices.append(f"{path.name} in the journal's {path.parent.name} is damaged and is made again")
            return None

    def _is_intact(self, path: Path) -> bool:
        if not path.with_suffix(".json").exists():
            return False
        try:
            entry = json.loads(path.with_suffix(".json").read_bytes())
            intact = path.stat().st_size == entry["bytes"] and files.hash_file(path) == entry["sha256"]
        except (OSError, ValueError, KeyError, TypeError):
            intact = False
        if not intact:
            self.notices.append(
                f"{path.parent.name}/{path.name} of the journal is damaged: it and what follows are made again"
            )
        return intact

    def _remove(self, path: Path) -> None:
        files.remove(path.with_suffix(".json"))
        files.remove(path)

    def _drop_blocks(self, first: int) -> None:
        dropped = [path for path in (self.partial / "blocks").glob("[0-9]*") if int(path.stem) >= first]
        if dropped:
            self._remove_finished()
        for path in sorted(dropped, reverse=True):
            files.remove(path)

    def _remove_finished(self) -> None:
        """What was made of blocks of which one is made again."""
        if self._is_finished is not False:
            self._remove(self._finished)
            self._is_finished = False

    # The directory as a whole

    def _refuse_foreign_files(self) -> None:
        """Raise OutputError if the directory holds anything that no run makes."""
        foreign = [p.name for p in self.partial.iterdir() if p.name not in _ENTRIES and not p.name.endswith(".tmp")]
        if foreign:
            raise OutputError(
                f"the directory holds files that no run of leangrid made: {', '.join(sorted(foreign)[:3])}",
                self.partial,
                "Move them away, or choose another output directory",
            )

    def _sweep_temporaries(self) -> None:
        for directory in (
            self.partial,
            self.partial / "blocks",
            self.partial / "named",
            self.partial / "head",
            self.states,
        ):
            files.sweep_temporaries(directory)

    def _wipe(self) -> None:
        """Remove everything but the lock.

        identity.json goes last, so that a kill in between leaves a directory that is still recognised as a run's. An
        older result that had been moved into ``replaced`` is restored first."""
        out, replaced = output_of(self.partial), self.partial / "replaced"
        if replaced.exists() and self.partial.parent == out:
            if not (out / MANIFEST).exists():
                restore_older_result(self.partial, out)
        elif replaced.exists() and not out.exists():
            files.rename_dir(replaced, out)  # killed after the older result was moved away, before the new one came
        for name in ("publish", "head", "blocks", "named", "replaced", "source"):
            files.remove_tree(self.partial / name)
        files.remove_tree(self.states)
        files.sync_names(self.partial)  # a power cut must not leave blocks without the identity they belong to
        for name in ("identity.json", "sealed.json"):
            files.remove(self.partial / name)
        self._committed = self._is_finished = None

    def acquire_lock(self) -> None:
        """Take the lock without starting the run. Does nothing if this journal holds it."""
        if not self._lock.held:
            self._lock.acquire()

    def discard(self) -> None:
        """Remove the whole journal and release the lock; takes the lock first if this journal does not hold it."""
        self.acquire_lock()
        self._sweep_temporaries()
        self._wipe()
        self._lock.release()
        files.remove_if_empty(self.partial)


def partial_of(out: Path) -> Path:
    """The run directory of the output ``out``: ``OUT.partial``, so that the final rename stays on one file system.

    ``OUT/.partial`` if no rename can replace OUT. Raises OutputError for a path without a name, such as ``..``."""
    if out.name in ("", ".."):
        raise OutputError("not a name for an output directory", out, "Give a new directory, such as ./out")
    return out / RUN_INSIDE if cannot_be_replaced(out) else out.with_name(f"{out.name}.partial")


def output_of(partial: Path) -> Path:
    """The output to which the run directory ``partial`` belongs: the inverse of ``partial_of``."""
    return partial.parent if partial.name == RUN_INSIDE else partial.with_name(partial.name.removesuffix(".partial"))


def first_difference(then: Any, now: Any, field: str = "") -> tuple[str, Any, Any] | None:
    """The first field, in sorted order, in which two JSON values differ: its dotted name and both values.

    None if they are equal. A field that one value lacks is "absent" there."""
    if isinstance(then, dict) and isinstance(now, dict):
        for key in sorted({*then, *now}):
            inner = first_difference(
                then.get(key, "absent"), now.get(key, "absent"), f"{field}.{key}" if field else str(key)
            )
            if inner:
                return inner
        return None
    return None if then == now and isinstance(then, bool) == isinstance(now, bool) else (field or "identity", then, now)


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 80 else text[:77] + "..."
