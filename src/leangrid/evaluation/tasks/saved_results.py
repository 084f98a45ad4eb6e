"""Finished parts of tasks on disk: ``--out FILE`` is written again after each, and the same command goes on from it."""

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from leangrid.errors import CheckpointError, OutputError
from leangrid.storage.files import make_dir, write_json
from leangrid.storage.manifest import MANIFEST, read_manifest


def identify_model(path: Path) -> str:
    """A sha256 that changes when the model does.

    Of a finished result it is made from the hashes of the files that decide its answers, so that model card, report and
    figures may change; of anything else from the names, sizes and times of its files. Raises CheckpointError for a
    manifest that cannot be read."""
    manifest = path / MANIFEST
    if manifest.is_file():
        try:
            files = read_manifest(path)["files"]
            decisive = [name for name in sorted(files) if name.endswith((".safetensors", ".json", ".jinja"))]
            facts = [(name, files[name]["sha256"]) for name in decisive]
        except (OSError, ValueError, KeyError, TypeError) as error:
            way_out = "Compare it with the files: leangrid verify DIR"
            raise CheckpointError("the manifest cannot be read", manifest, way_out) from error
    else:
        places = sorted(file for file in path.iterdir() if file.is_file()) if path.is_dir() else [path]
        facts = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in places]
    return hashlib.sha256(repr(facts).encode()).hexdigest()


@dataclass
class SavedResults:
    """The results of one model's finished parts, with the conditions they were made under.

    Attributes:
        path: the file; None: the results are in memory alone.
        model: as ``identify_model`` gives it.
        parts: name -> {"conditions": text, "result": figures}.
    """

    path: Path | None
    model: str
    parts: dict[str, dict[str, Any]] = field(default_factory=dict)

    @classmethod
    def open(cls, path: Path | None, model: str) -> "SavedResults":
        """Read ``path`` where it exists, and write it to see that it can be written.

        Raises:
            OutputError: it is another model's, no such file, or cannot be written.
        """
        saved = cls(path, model) if path is None or not path.exists() else cls._read(path, model)
        saved._save()
        return saved

    @classmethod
    def _read(cls, path: Path, model: str) -> "SavedResults":
        try:
            stored = json.loads(path.read_text(encoding="utf-8"))
            found, parts = stored["identity"]["model"], stored["identity"]["tasks"]
            saved = cls(path, model, {name: dict(entry) for name, entry in parts.items()})
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise OutputError("the file holds no results of leangrid eval", path, "Choose another --out") from error
        if found != model:
            raise OutputError("the file holds another model's results", path, "Choose another --out, or remove it")
        return saved

    def get(self, name: str, conditions: str) -> dict[str, Any] | None:
        """The result of part ``name``; None where there is none that was made under the same ``conditions``."""
        entry = self.parts.get(name)
        return entry["result"] if entry is not None and entry.get("conditions") == conditions else None

    def put(self, name: str, conditions: str, result: dict[str, Any]) -> None:
        """Add the result of one part and save the file."""
        self.parts[name] = {"conditions": conditions, "result": result}
        self._save()

    def _save(self) -> None:
        self.write({"tasks": {name: entry["result"] for name, entry in self.parts.items()}})

    def write(self, values: dict[str, Any]) -> None:
        """Write the file: ``values`` for its reader, and what a later call compares; OutputError where that fails."""
        if self.path is not None:
            make_dir(self.path.parent)
            write_json(self.path, values | {"identity": {"model": self.model, "tasks": self.parts}})
