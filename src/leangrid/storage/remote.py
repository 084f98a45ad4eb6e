"""Weights of a hub model, read over the network while they are needed: one tensor at a time, nothing of them on disk.

Ranges of bytes are asked for at the commit that the run began with, so no file can change under it. Each tensor is
fetched when a block is quantized, and again when the finished result is held against the original."""

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from leangrid.errors import CheckpointError, Interrupted, first_line

_TRIES, _PAUSE = 5, 1.0  # of a range; seconds before the second, doubled before each further one
_PIECE = 1 << 20


class Remote:
    """The safetensors files of one commit of a hub model: ``sizes`` is name -> bytes."""

    def __init__(self, repo: str, commit: str, sizes: dict[str, int]) -> None:
        self.repo, self.commit, self.sizes = repo, commit, sizes

    @classmethod
    def of(cls, repo: str, revision: str | None) -> "Remote":
        """What the hub lists; its own client's errors pass."""
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

    def open(self, name: str) -> "RemoteFile":
        """One file, as if it were open here."""
        return RemoteFile(self, name)

    def pieces(self, name: str, start: int, stop: int) -> Iterator[bytes]:
        """Bytes ``start`` to ``stop`` of a file in one request; the client's errors pass."""
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
    """Reads like an open, unbuffered file. A connection that breaks is taken up where it broke; Interrupted once that
    fails too often."""

    def __init__(self, remote: Remote, name: str) -> None:
        self._remote, self._name, self._at = remote, name, 0

    def seek(self, offset: int, /) -> int:
        """Go to ``offset`` from the start."""
        self._at = offset
        return offset

    def read(self, size: int, /) -> bytes:
        """Up to ``size`` bytes; fewer only at the end."""
        found = bytearray(size)
        return bytes(found[: self.readinto(found)])

    def readinto(self, buffer: Any, /) -> int:
        """Fill ``buffer`` up to the file's end; returns how many bytes."""
        view = memoryview(buffer).cast("B")
        wanted = max(0, min(len(view), self._remote.sizes[self._name] - self._at))
        filled, failures = 0, 0
        while filled < wanted:
            try:
                for piece in self._remote.pieces(self._name, self._at, self._at + wanted - filled):
                    view[filled : filled + len(piece)] = piece
                    filled, self._at = filled + len(piece), self._at + len(piece)
            except (
                Exception
            ) as error:  # what each version of the hub's client raises for a broken connection, nobody can list
                failures += 1
                if failures == _TRIES:
                    raise self._lost(error) from error
                time.sleep(_PAUSE * 2 ** (failures - 1))
        return filled

    def close(self) -> None:
        """Nothing is held open."""

    def _lost(self, error: Exception) -> Interrupted:
        return Interrupted(
            f"'{self._name}' cannot be read from the hub any more ({first_line(error)})",
            f"{self._remote.repo}@{self._remote.commit}",
            "Finished blocks are kept: run the same command again when the hub can be reached",
        )


def here(remote: Remote | None, path: Path) -> bool:
    """Whether a file lies on this machine."""
    return remote is None or path.name not in remote.sizes
