"""The hub, on this machine: one model's files by the requests that the hub's own client makes, parts of files
included."""

import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub(ThreadingHTTPServer):
    """Serves ``folder`` as org/tiny, in a ``with``. ``parts`` are the (file, start, stop) that were asked for; of a
    part that ``breaks`` holds by its number, half is sent and the connection closed. ``closed`` answers everything with
    503."""

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), _Answers)
        self.folder, self.parts, self.whole = folder, list[tuple[str, int, int]](), list[str]()
        self.breaks, self.closed = set[int](), False

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def __enter__(self) -> "Hub":
        threading.Thread(target=self.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()
        self.server_close()

    def files(self) -> list[Path]:
        return sorted(path for path in self.folder.iterdir() if path.is_file())


class _Answers(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm, wbufsize = True, 1 << 16  # an answer in one packet, not in two that wait for each other
    server: Hub  # pyright: ignore[reportIncompatibleVariableOverride]

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing on stderr."""

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        if self.server.closed:
            return self._send(503, b"closed")
        if re.fullmatch(rf"/api/models/org/tiny/tree/{COMMIT}", path):
            return self._json(
                [
                    {"type": "file", "path": f.name, "size": f.stat().st_size, "oid": _hash(f)}
                    for f in self.server.files()
                ]
            )
        if re.fullmatch(rf"/api/models/org/tiny(/revision/(main|{COMMIT}))?", path):
            siblings = [
                {"rfilename": f.name, "size": f.stat().st_size, "blobId": _hash(f)} for f in self.server.files()
            ]
            return self._json(
                {"id": "org/tiny", "sha": COMMIT, "siblings": siblings, "private": False, "tags": [], "downloads": 0}
            )
        found = re.fullmatch(rf"/org/tiny/resolve/{COMMIT}/([\w.-]+)", path)
        if found is None or not (self.server.folder / found[1]).is_file():
            return self._send(404, b"", {"X-Error-Code": "RepoNotFound"})
        self._file(self.server.folder / found[1])

    def _file(self, path: Path) -> None:
        body, about = path.read_bytes(), {"ETag": f'"{_hash(path)}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
        asked = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        if asked is None:
            if self.command == "GET":
                self.server.whole.append(path.name)
            return self._send(200, body, about)
        start, stop = int(asked[1]), int(asked[2]) + 1
        number = len(self.server.parts)
        self.server.parts.append((path.name, start, stop))
        about["Content-Range"] = f"bytes {start}-{stop - 1}/{len(body)}"
        self._send(206, body[start:stop], about, half=number in self.server.breaks)

    def _json(self, value: object) -> None:
        self._send(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _send(self, status: int, body: bytes, headers: dict[str, str] | None = None, half: bool = False) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body[: len(body) // 2] if half else body)
        if half:
            self.close_connection = True


def _hash(path: Path) -> str:
    return hashlib.sha1(path.read_bytes(), usedforsecurity=False).hexdigest()
