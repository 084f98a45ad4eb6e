"""What is known of a finished result: its manifest, its records, and run.json. Card, page and comparison are made from
it."""

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from leangrid.errors import VerifyError
from leangrid.recipe import Recipe
from leangrid.report.found import describe_found
from leangrid.report.records import LayerRecord, read_records
from leangrid.storage.manifest import read_manifest

RECORDS, RUN = "records.jsonl", "run.json"
_WEIGHTS = (".safetensors", ".gguf", ".onnx", ".onnx.data")
_BLOCK = re.compile(r"^(.*?)\.(\d+)\.(.+)$")


@dataclass(frozen=True)
class Facts:
    """One result.

    Attributes:
        manifest: the JSON of manifest.json.
        records: one for each quantized layer.
        run: the JSON of run.json (report/run_log.py); empty for results without one.
    """

    manifest: Mapping[str, Any]
    records: Sequence[LayerRecord]
    run: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def read(cls, directory: Path) -> "Facts":
        """Read the files of a directory that was verified; VerifyError where they are not those of a result."""
        try:
            manifest = read_manifest(directory)
            run = json.loads((directory / RUN).read_bytes()) if (directory / RUN).exists() else {}
            facts = cls(manifest, read_records(directory / RECORDS), run)
            _ = facts.recipe, facts.result["scheme"], facts.bytes_after
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            what = f"the result cannot be described: {type(error).__name__}: {error}"
            raise VerifyError(what, directory, "Give a finished result of leangrid quantize or export") from error
        return facts

    @property
    def recipe(self) -> Recipe:
        """The recipe with every default written out."""
        return Recipe.model_validate(self.manifest["recipe"])

    @property
    def result(self) -> Mapping[str, Any]:
        """The manifest's own figures: scheme, format, layers, bits_per_weight, losses, rescues."""
        return self.manifest["result"]

    @property
    def source(self) -> str:
        """The source as it was given to quantize: a path or a hub id."""
        return self.manifest.get("source_name") or "unknown (the manifest has its fingerprint)"

    @property
    def name(self) -> str:
        """The last part of the source's name."""
        return (self.manifest.get("source_name") or "").rstrip("/").replace("\\", "/").rsplit("/", 1)[-1] or "model"

    @property
    def container(self) -> str:
        """How the files hold the codes: a key of ``formats.FORMATS``, ``dense``, or the name of a whole-file export."""
        return self.result["format"]

    @property
    def exported_from(self) -> str | None:
        """The result that this one was exported from, and its format; None where quantize wrote it."""
        came = self.manifest.get("exported")
        return f"{came['from']}, {came['format']}" if came else None

    @property
    def model_class(self) -> str:
        """The class of transformers that opens the model; for results without a word of it that of most."""
        name = str((self.manifest.get("structure") or {}).get("model"))
        return name if name.isidentifier() and name != "None" else "AutoModelForCausalLM"

    @property
    def plain(self) -> bool:
        """Whether transformers opens the result without leangrid, as far as the run could tell."""
        return not (self.manifest.get("opened_in") or {}).get("transformers", "yes").startswith("no")

    @property
    def quality(self) -> Mapping[str, Any]:
        """What the quality gate found (gate/quality.py); empty where it did not run."""
        return self.manifest.get("quality") or {}

    @property
    def evaluations(self) -> Sequence[Mapping[str, Any]]:
        """The evaluations that ``eval --keep`` added, oldest first."""
        return self.manifest.get("evaluations") or []

    @property
    def structure(self) -> list[tuple[str, str]]:
        """What was found of the model, and what stays as it is stored, as rows; none for results without a word of
        it."""
        said = self.manifest
        return describe_found(said.get("structure") or {}, said.get("kept") or [], said.get("stored_as"))

    @property
    def bytes_after(self) -> int:
        """Size of the files with the weights."""
        return sum(entry["bytes"] for name, entry in self.manifest["files"].items() if name.endswith(_WEIGHTS))


@dataclass(frozen=True)
class LossMap:
    """Losses by linear and block: ``losses[linear][block]`` is (of this result, of min-max GPTQ, of rounding), or None
    where there is no such layer."""

    linears: list[str]
    blocks: list[str]
    losses: list[list[tuple[float, float, float] | None]]

    @classmethod
    def of(cls, records: Sequence[LayerRecord]) -> "LossMap":
        """The map of some records. Layers of one block whose names differ in a number only (experts) are added up in
        one cell, such as ``experts.*.up_proj``."""
        cells: dict[tuple[str, str], tuple[float, float, float]] = {}
        for record in records:
            block, linear = place(record.name)
            before = cells.get((linear, block), (0.0, 0.0, 0.0))
            mine = (record.loss, record.loss_minmax, record.loss_rounding)
            cells[linear, block] = (before[0] + mine[0], before[1] + mine[1], before[2] + mine[2])
        linears, blocks = (list(dict.fromkeys(key[axis] for key in cells)) for axis in (0, 1))
        return cls(_short(linears), blocks, [[cells.get((linear, block)) for block in blocks] for linear in linears])


def place(name: str) -> tuple[str, str]:
    """(block, linear) of a layer's name: ("12", "self_attn.q_proj"); further numbers become ``*``. Without a number:
    ("", name)."""
    match = _BLOCK.match(name)
    if match is None:
        return "", name
    return match[2], re.sub(r"(?<=\.)\d+(?=\.)", "*", match[3])


def finite(value: Any) -> bool:
    """Whether the value is a finite number."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _short(linears: list[str]) -> list[str]:
    """The last part of each name, where these are all different; else the names."""
    last = [linear.rsplit(".", 1)[-1] for linear in linears]
    return last if len(set(last)) == len(last) else linears
