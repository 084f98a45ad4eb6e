"""Finished tasks on disk: ``--out FILE`` is written again after each, and the same command takes what it holds."""

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from leangrid.errors import CheckpointError, OutputError
from leangrid.storage.files import make_dir, write_json


def model_identity(path: Path) -> str:
    """Of a finished result, from the sha256 of the files that decide what it answers; of anything else, from its files'
    names, sizes and times. Model card, report and figures of a result may change."""
    manifest = path / "manifest.json"
    if manifest.is_file():
        try:
            files = json.loads(manifest.read_bytes())["files"]
            facts = [
                (name, files[name]["sha256"])
                for name in sorted(files)
                if name.endswith((".safetensors", ".json", ".jinja"))
            ]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CheckpointError(
                "the manifest cannot be read", manifest, "Compare it with the files: leangrid verify DIR"
            ) from error
    else:
        places = sorted(file for file in path.iterdir() if file.is_file()) if path.is_dir() else [path]
        facts = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in places]
    return hashlib.sha256(repr(facts).encode()).hexdigest()


@dataclass
class Kept:
    """The tasks of one model with the data and settings they were run with; ``path`` None keeps them in memory
    alone."""

    path: Path | None
    model: str
    tasks: dict[str, dict[str, Any]] = field(default_factory=dict)

    @classmethod
    def open(cls, path: Path | None, model: str) -> "Kept":
        """What ``path`` holds, if it holds anything; OutputError where it is another model's, no such file, or cannot
        be written."""
        known = cls(path, model) if path is None or not path.exists() else cls._read(path, model)
        known._save()
        return known

    @classmethod
    def _read(cls, path: Path, model: str) -> "Kept":
        try:
            stored = json.loads(path.read_text(encoding="utf-8"))
            found, tasks = stored["identity"]["model"], stored["identity"]["tasks"]
            known = cls(path, model, {name: dict(entry) for name, entry in tasks.items()})
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise OutputError("the file holds no results of leangrid eval", path, "Choose another --out") from error
        if found != model:
            raise OutputError("the file holds another model's results", path, "Choose another --out, or remove it")
        return known

    def get(self, name: str, conditions: str) -> dict[str, Any] | None:
        """The result of task ``name``, if it was made under the same ``conditions`` (data, settings, versions)."""
        entry = self.tasks.get(name)
        return entry["result"] if entry is not None and entry.get("conditions") == conditions else None

    def put(self, name: str, conditions: str, result: dict[str, Any]) -> None:
        """Remember one finished task, on disk before the next begins."""
        self.tasks[name] = {"conditions": conditions, "result": result}
        self._save()

    def _save(self) -> None:
        self.write({"tasks": {task: entry["result"] for task, entry in self.tasks.items()}})

    def write(self, values: dict[str, Any]) -> None:
        """Write the file anew: ``values`` and what a later run compares; OutputError where that fails."""
        if self.path is not None:
            make_dir(self.path.parent)
            write_json(self.path, values | {"identity": {"model": self.model, "tasks": self.tasks}})
