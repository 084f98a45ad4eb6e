"""The journal of one run: what is finished survives a kill, and nothing else is believed.

::

    OUT.partial/                    no model by its name, no config.json at its top
      LOCK  identity.json           who works here; what the run is
      named/windows.safetensors     one-off artefacts (+ .json)
      blocks/0007.safetensors       packed tensors of block 7
      blocks/0007.json              their sha256 and the block's records       <- written after: this is the commit
      state/0008.safetensors        hidden states entering block 8 (+ .json); older ones go once a newer one is durable
      source/                       the dequantized checkpoint of a .gguf source
      publish/                      the result while it is being put together, then renamed to OUT

Where OUT is a mount point, all of it lies inside, as OUT/.partial (storage/mount.py).

A tensor file counts only if its .json is there and its bytes have the hash written in it.
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
from leangrid.storage.mount import INSIDE, MANIFEST, fixed, restore

FORMAT_VERSION = 3  # of this layout; part of the identity, so that a newer leangrid never misreads an older journal
_ENTRIES = frozenset(
    {"LOCK", "identity.json", "sealed.json", "blocks", "state", "named", "head", "publish", "replaced", "source"}
)
_RESTART = "--restart discards the unfinished run"
_NAME = re.compile(r"[a-z][a-z0-9_]{0,40}")


class Journal:
    """The run directory ``OUT.partial``; a context manager whose end releases the lock and sweeps temporaries, however
    it is left.

    ``notices`` holds sentences for the user. ``state_dir`` puts the hidden states on another disk; ``states`` is their
    directory."""

    def __init__(self, partial: Path, state_dir: Path | None = None) -> None:
        self.partial = partial
        self.notices: list[str] = []
        self.identity: dict[str, Any] = {}
        self.is_fresh = False  # True for a run that this process began: nothing of an earlier one can be lost
        self.states = partial / "state" if state_dir is None else state_dir / f"{out_of(partial).name}.partial.state"
        self._lock = files.FileLock(partial / "LOCK")
        self._committed: int | None = None

    @classmethod
    def beside(cls, out: Path, state_dir: Path | None = None) -> "Journal":
        """The journal of the run whose result will be ``out``."""
        return cls(partial_of(out), state_dir)

    def open(self, identity: Mapping[str, Any], restart: bool = False) -> "Journal":
        """Take the lock and start or resume the run that ``identity`` (nested dicts of JSON values) describes.

        Raises OutputError if another process is at work or the directory is not a run's; ResumeError naming the first
        field in which an unfinished run differs. ``restart`` discards the unfinished run instead."""
        self.identity = json.loads(json.dumps({"format_version": FORMAT_VERSION, **identity}))
        if self.partial.is_symlink() or (self.partial.exists() and not self.partial.is_dir()):
            raise OutputError("not a directory", self.partial, "Remove it, or choose another output directory")
        files.make_dir(self.partial)
        self._refuse_strangers()
        self._lock.acquire()
        try:
            self._enter(restart)
        except BaseException:
            self.close()
            raise
        return self

    def _enter(self, restart: bool) -> None:
        if self._lock.stale_owner:
            self.notices.append(f"taking over an unfinished run of {self._lock.stale_owner}, which is gone")
        self._sweep()
        path = self.partial / "identity.json"
        if restart:
            self._wipe()
        elif path.exists():
            self._compare(path)
        elif any((self.partial / name).exists() for name in ("blocks", "state", "named")):
            raise ResumeError("an unfinished run without its identity.json", self.partial, _RESTART)
        if self.states.parent != self.partial:
            files.make_dir(self.states)  # first, so that a place that cannot be written to leaves nothing behind
        failpoint("journal.before_identity")
        if not path.exists():
            files.write_json(path, self.identity)
            self.is_fresh = True
        for directory in (self.partial / "blocks", self.partial / "named", self.states):
            files.make_dir(directory)

    def _compare(self, path: Path) -> None:
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
        """Sweep temporaries and release the lock; the journal stays for the next run. Fine to call twice."""
        if self._lock.held:
            self._sweep()
            self._lock.release()
            files.remove_if_empty(self.partial)  # nothing was begun

    def __enter__(self) -> "Journal":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # Blocks
    # -------------------------------------------------------------------------------------------------------------------------

    def commit_block(self, index: int, tensors: Mapping[str, Tensor], info: Mapping[str, Any]) -> None:
        """Make block ``index`` (0 is the first; blocks come in order) durable. ``info`` is its records: JSON values."""
        done = self.committed()
        if index > done:
            raise ValueError(f"block {index} cannot be committed before block {done}")
        self._drop_blocks(index)
        self._put(self._block(index), tensors, {"info": dict(info)})
        failpoint("journal.after_block")
        self._committed = index + 1

    def committed(self) -> int:
        """How many blocks from the first on are good. The first call hashes them all; a bad one is removed with all
        after it."""
        if self._committed is None:
            count = 0
            while self._sound(self._block(count)):
                count += 1
            self._drop_blocks(count)
            self._committed = count
        return self._committed

    def read_block(self, index: int) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """The tensors and records of a committed block; ResumeError if its bytes changed since."""
        path = self._block(index)
        try:
            entry = json.loads(path.with_suffix(".json").read_bytes())
            return safetensors.load(path, entry["sha256"]), entry["info"]
        except (OSError, ValueError, KeyError, CheckpointError) as error:
            raise ResumeError(
                f"block {index} of the journal is damaged: {error}", path, "Run the same command again: it is redone"
            ) from error

    def block_info(self, index: int) -> dict[str, Any]:
        """The records of a committed block alone."""
        return json.loads(self._block(index).with_suffix(".json").read_bytes())["info"]

    def block_tensors(self, index: int) -> dict[str, safetensors.TensorInfo]:
        """Where the tensors of a committed block lie, for copying without loading."""
        return safetensors.read_header(self._block(index))

    # Hidden states and one-off artefacts
    # --------------------------------------------------------------------------------------------

    def save_state(self, index: int, tensors: Mapping[str, Tensor]) -> None:
        """Make the hidden states that enter block ``index`` durable, then remove older ones that no resume can need."""
        self._put(self._state(index), tensors, {})
        failpoint("journal.after_state")
        keep = min(index, self.committed())
        for path in self.states.glob("[0-9]*.safetensors"):
            if int(path.stem) < keep:
                self._remove(path)

    def load_state(self, index: int, keep: Callable[[Tensor], Tensor] = lambda x: x) -> dict[str, Tensor] | None:
        """The hidden states that enter block ``index``, of each tensor what ``keep`` makes of it; None if they are
        absent or damaged."""
        return self._get(self._state(index), keep)

    def resume_point(self) -> int:
        """The block to go on with: the last one whose hidden states are good and all of whose predecessors are
        committed, else 0. Later blocks are dropped, so that ``committed() == resume_point()`` afterwards."""
        done = self.committed()
        if done and not self._sound(self._state(done)):
            point = done - 1
            while point and not self._sound(self._state(point)):
                point -= 1
            self.notices.append(
                f"the hidden states after block {done} are missing or damaged: going on from block {point + 1}"
            )
            self._drop_blocks(point)
            self._committed = point
        return self.committed()

    def save_named(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        """Keep an artefact of the whole run, such as ``windows``."""
        if not _NAME.fullmatch(name):
            raise ValueError(f"not a plain name: {name!r}")
        self._put(self.partial / "named" / f"{name}.safetensors", tensors, {})

    def load_named(self, name: str) -> dict[str, Tensor] | None:
        """The artefact, or None if it is absent or damaged."""
        return self._get(self.partial / "named" / f"{name}.safetensors")

    # A tensor file and the .json that makes it count
    # --------------------------------------------------------------------------------

    def _block(self, index: int) -> Path:
        return self.partial / "blocks" / f"{index:04d}.safetensors"

    def _state(self, index: int) -> Path:
        return self.states / f"{index:04d}.safetensors"

    def _put(self, path: Path, tensors: Mapping[str, Tensor], entry: dict[str, Any]) -> None:
        files.remove(path.with_suffix(".json"))  # from here until the new one is written, the file does not count
        sha256 = safetensors.save(path, tensors)
        failpoint("journal.before_commit")
        files.write_json(path.with_suffix(".json"), {"sha256": sha256, "bytes": path.stat().st_size, **entry})

    def _get(self, path: Path, keep: Callable[[Tensor], Tensor] = lambda x: x) -> dict[str, Tensor] | None:
        if not path.with_suffix(".json").exists():
            return None
        try:
            return safetensors.load(path, json.loads(path.with_suffix(".json").read_bytes())["sha256"], keep)
        except (OSError, ValueError, KeyError, TypeError, CheckpointError):
            self.notices.append(f"{path.name} in the journal's {path.parent.name} is damaged and is made again")
            return None

    def _sound(self, path: Path) -> bool:
        if not path.with_suffix(".json").exists():
            return False
        try:
            entry = json.loads(path.with_suffix(".json").read_bytes())
            sound = path.stat().st_size == entry["bytes"] and files.hash_file(path) == entry["sha256"]
        except (OSError, ValueError, KeyError, TypeError):
            sound = False
        if not sound:
            self.notices.append(
                f"{path.parent.name}/{path.name} of the journal is damaged: it and what follows are made again"
            )
        return sound

    def _remove(self, path: Path) -> None:
        files.remove(path.with_suffix(".json"))
        files.remove(path)

    def _drop_blocks(self, first: int) -> None:
        for path in sorted((self.partial / "blocks").glob("[0-9]*"), reverse=True):
            if int(path.stem) >= first:
                files.remove(path)

    # Beginning, ending
    # ---------------------------------------------------------------------------------------------------------------

    def _refuse_strangers(self) -> None:
        strangers = [p.name for p in self.partial.iterdir() if p.name not in _ENTRIES and not p.name.endswith(".tmp")]
        if strangers:
            raise OutputError(
                f"the directory holds files that no run of leangrid made: {', '.join(sorted(strangers)[:3])}",
                self.partial,
                "Move them away, or choose another output directory",
            )

    def _sweep(self) -> None:
        for directory in (
            self.partial,
            self.partial / "blocks",
            self.partial / "named",
            self.partial / "head",
            self.states,
        ):
            files.sweep_temporaries(directory)

    def _wipe(self) -> None:
        """Remove everything but the lock; last what says whose it is, so that a kill leaves a directory that is still a
        run's."""
        out, replaced = out_of(self.partial), self.partial / "replaced"
        if replaced.exists() and self.partial.parent == out:
            if not (out / MANIFEST).exists():
                restore(self.partial, out)
        elif replaced.exists() and not out.exists():
            files.move_dir(replaced, out)  # a kill came between moving the old result away and the new one in
        for name in ("publish", "head", "blocks", "named", "replaced", "source"):
            files.remove_tree(self.partial / name)
        files.remove_tree(self.states)
        files.sync_names(self.partial)  # a power cut must not bring the blocks back and leave out whose they are
        for name in ("identity.json", "sealed.json"):
            files.remove(self.partial / name)
        self._committed = None

    def lock(self) -> None:
        """Take the lock without opening the run; fine if it is held."""
        if not self._lock.held:
            self._lock.acquire()

    def discard(self) -> None:
        """After publishing: remove the whole journal and release the lock. Takes the lock if ``open`` was not
        called."""
        self.lock()
        self._sweep()
        self._wipe()
        self._lock.release()
        files.remove_if_empty(self.partial)


def partial_of(out: Path) -> Path:
    """``OUT.partial``, beside OUT so that the final rename stays on one file system; ``OUT/.partial`` where no rename
    can replace OUT. OutputError for a path without a name."""
    if out.name in ("", ".."):
        raise OutputError("not a name for an output directory", out, "Give a new directory, such as ./out")
    return out / INSIDE if fixed(out) else out.with_name(f"{out.name}.partial")


def out_of(partial: Path) -> Path:
    """The inverse of ``partial_of``."""
    return partial.parent if partial.name == INSIDE else partial.with_name(partial.name.removesuffix(".partial"))


def first_difference(then: Any, now: Any, field: str = "") -> tuple[str, Any, Any] | None:
    """The first dotted field, in sorted order, in which two JSON values differ, with both values; None if they are
    equal."""
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
