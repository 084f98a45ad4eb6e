"""Reads the weights of a hub model over the network, one tensor at a time, without storing them on disk.

Ranges of bytes are requested at the commit with which the run began, so no file can change meanwhile. Each tensor is
fetched when its block is quantized, and again when the finished result is compared with the original."""

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from leangrid.errors import CheckpointError, Interrupted, first_line

_TRIES, _PAUSE = 5, 1.0  # attempts to read a range; seconds before the second, doubled before each further one
_PIECE = 1 << 20  # bytes


class Remote:
    """The safetensors files of one commit of a hub model; ``sizes`` is file name -> size in bytes."""

    def __init__(self, repo: str, commit: str, sizes: dict[str, int]) -> None:
        self.repo, self.commit, self.sizes = repo, commit, sizes

    @classmethod
    def list_files(cls, repo: str, revision: str | None) -> "Remote":
        """Ask the hub for the commit of ``revision`` (None: the default branch) and its safetensors files.

        Errors of the hub's client pass through; CheckpointError if the hub does not tell commit or sizes."""
        from huggingface_hub import HfApi

        info = HfApi().model_info(repo, revision=revision, files_metadata=True)
        files = {file.rfilename: file.size for file in info.siblings or [] if file.rfilename.endswith(".safetensors")}
        if info.sha is None or None in files.values():
            raise CheckpointError(
                "the hub does not tell its commit or the sizes of its files",
                repo,
                "Leave stream: out: it is downloaded",
            )
        return cls(repo, info.sha, {name: int(size or 0) for name, size in files.items()})

    def open_file(self, name: str) -> "RemoteFile":
        """A file object that reads the file ``name``."""
        return RemoteFile(self, name)

    def stream_range(self, name: str, start: int, stop: int) -> Iterator[bytes]:
        """Yield the bytes ``start`` to ``stop`` (exclusive) of a file, in one request. Errors of the client pass."""
        from huggingface_hub import hf_hub_url
        from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status

        headers = build_hf_headers() | {"range": f"bytes={start}-{stop - 1}", "accept-encoding": "identity"}
        url = hf_hub_url(self.repo, name, revision=self.commit)
        with get_session().stream("GET", url, headers=headers, follow_redirects=True) as response:
            hf_raise_for_status(response)
            if response.status_code != 206:
                raise OSError(f"the server does not give parts of files (status {response.status_code})")
            yield from response.iter_bytes(_PIECE)


class RemoteFile:
    """A file on the hub with the methods of an open, unbuffered file.

    After a broken connection the rest is requested again; Interrupted (exit code 3) after five failures."""

    def __init__(self, remote: Remote, name: str) -> None:
        self._remote, self._name, self._at = remote, name, 0

    def seek(self, offset: int, /) -> int:
        """Go to the byte ``offset``, counted from the start of the file; return it."""
        self._at = offset
        return offset

    def read(self, size: int, /) -> bytes:
        """Read ``size`` bytes; fewer only at the end of the file."""
        found = bytearray(size)
        return bytes(found[: self.readinto(found)])

    def readinto(self, buffer: Any, /) -> int:
        """Fill ``buffer``, or what the file has left, and return the number of bytes."""
        view = memoryview(buffer).cast("B")
        wanted = max(0, min(len(view), self._remote.sizes[self._name] - self._at))
        filled, failures = 0, 0
        while filled < wanted:
            try:
                for piece in self._remote.stream_range(self._name, self._at, self._at + wanted - filled):
                    view[filled : filled + len(piece)] = piece
                    filled, self._at = filled + len(piece), self._at + len(piece)
            except Exception as error:  # the exceptions of a broken connection differ between versions of the client
                failures += 1
                if failures == _TRIES:
                    raise self._lost(error) from error
                time.sleep(_PAUSE * 2 ** (failures - 1))
        return filled

    def close(self) -> None:
        """Do nothing: there is no open connection between two reads."""

    def _lost(self, error: Exception) -> Interrupted:
        return Interrupted(
            f"'{self._name}' cannot be read from the hub any more ({first_line(error)})",
            f"{self._remote.repo}@{self._remote.commit}",
            "Finished blocks are kept: run the same command again when the hub can be reached",
        )


def is_local(remote: Remote | None, path: Path) -> bool:
    """Whether the file ``path`` of a checkpoint is on this machine, not on the hub."""
    return remote is None or path.name not in remote.sizes
