"""The same codes in another container: a finished result in, a directory that another engine reads out. Exact, or
refused.

Containers that lie in a Hugging Face directory are the rows of ``formats.FORMATS``, written layer by layer. Whole-file
targets are the rows of ``WHOLE``. ``dense`` has no container: it is the dequantized checkpoint."""

import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from leangrid._version import __version__
from leangrid.errors import CheckpointError, FormatError, OutputError, RecipeError, ResumeError
from leangrid.exporters import gguf_file, onnx_model
from leangrid.exporters.result_reader import Finished
from leangrid.formats import CONFIG_KEYS, FORMATS, Format, config_entries, config_of, stored_as
from leangrid.progress import Event, Progress
from leangrid.recipe import OFFSET_FORMATS, Scheme
from leangrid.report.facts import RECORDS, RUN, Facts
from leangrid.report.views import views
from leangrid.storage import files, writer
from leangrid.storage.config import with_older_ropes
from leangrid.storage.journal import Journal
from leangrid.storage.safetensors import TensorInfo

DENSE = "dense"

# A writer of one whole file: it refuses (LeangridError) what it cannot hold before it writes, puts its files into the
# staged directory through storage/files.py, and returns the stored bits per quantized weight, or None where that has no
# meaning.
WholeFile = Callable[[Finished, Path, Path | None, Progress | None], float | None]
WHOLE: dict[str, WholeFile] = {"gguf": gguf_file.write, "onnx": onnx_model.write}
TAKES_LIKE: frozenset[str] = frozenset(
    {"gguf"}
)  # whole-file targets that can take their metadata from an existing file


@dataclass(frozen=True)
class ExportResult:
    """What an export wrote. ``bits_per_weight`` counts codes and grids of the quantized linears; ``bytes`` is the whole
    directory."""

    out: str
    model: str
    format: str
    scheme: str
    layers: int
    bits_per_weight: float | None
    bytes: int
    seconds: float

    def to_json(self) -> dict[str, Any]:
        """The keys of ``export --json``."""
        return asdict(self)


def export(
    model: str | Path,
    out: str | Path,
    to: str,
    like: str | Path | None = None,
    *,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> ExportResult:
    """Write the finished result ``model`` once more, as ``to``, into the new directory ``out``.

    Args:
        to: a container (``formats.FORMATS``), ``dense``, or a whole file (``WHOLE``).
        like: an existing file of that kind whose metadata are taken; whole files only.
        overwrite: replace ``out`` if it is one of our results.
        progress: is called with an Event after every layer.

    Raises:
        LeangridError: ``model`` is not finished or differs from its manifest, ``to`` cannot hold one of its layers
            exactly, or ``out`` is in the way. Nothing called ``out`` is there then.
    """
    began = time.perf_counter()
    model, out = Path(model), Path(out)
    _check_target(to, like)
    complete = writer.settle(out)  # a kill may have come when only the journal was left to remove
    if complete is None:
        writer.check_output(out, model, overwrite)
    work = _Work(Finished.open(model), to, None if like is None else Path(like), progress)
    if complete is None or complete.get("exported") != work.came:
        writer.check_output(out, model, overwrite)
        work.refuse()
        complete = work.written(out, overwrite)
    return _result(model, out, to, complete, time.perf_counter() - began)


def _result(model: Path, out: Path, to: str, manifest: dict[str, Any], seconds: float) -> ExportResult:
    figures = manifest["result"]
    return ExportResult(
        out=str(out),
        model=str(model),
        format=to,
        scheme=figures["scheme"],
        layers=figures["layers"],
        bits_per_weight=figures["bits_per_weight"],
        bytes=sum(entry["bytes"] for entry in manifest["files"].values()),
        seconds=round(seconds, 3),
    )


def targets() -> tuple[str, ...]:
    """Every name that ``to`` may have."""
    return tuple(dict.fromkeys((*FORMATS, DENSE, *WHOLE)))


def _check_target(to: str, like: str | Path | None) -> None:
    if to not in targets():
        raise FormatError(f"'{to}' is no format that export writes", "--to", f"Choose one of: {', '.join(targets())}")
    if like is not None and to not in TAKES_LIKE:
        raise RecipeError(
            f"--like has no meaning for {to}", "--like", f"Leave it out; it is for: {', '.join(sorted(TAKES_LIKE))}"
        )
    if like is not None and not Path(like).is_file():
        raise CheckpointError("there is no such file", like, "Give an existing .gguf file of the same model")


@dataclass(frozen=True, eq=False)
class _Work:
    """One export: what is open, what it becomes."""

    finished: Finished
    to: str
    like: Path | None
    progress: Progress | None

    @property
    def target(self) -> Format | None:
        """The container's row; None for dense and whole files."""
        return None if self.to in WHOLE else FORMATS.get(self.to)

    @property
    def came(self) -> dict[str, str]:
        """What the manifest says of where the codes came from, and what they became."""
        before = self.finished.manifest
        return {
            "from": self.finished.directory.name,
            "format": before["result"]["format"],
            "seal": before["seal"],
            "to": self.to,
        }

    @cached_property
    def schemes(self) -> dict[str, Scheme]:
        """Layer -> what the target's files will say."""
        layers = {name: (self.finished.schemes[name], cols) for name, (_, cols) in self.finished.layers.items()}
        return self.finished.schemes if self.target is None else stored_as(self.target, layers)

    def refuse(self) -> None:
        """FormatError for the first layer that the container cannot hold; whole files refuse as they begin."""
        target = self.target
        if target is None:
            return
        for name, (rows, cols) in self.finished.layers.items():
            if self.finished.schemes[name].block:
                what = f"{self.to} does not hold llama.cpp's {self.finished.schemes[name].block}"
                raise FormatError(what, name, f"Use gguf or dense, or quantize again with --format {self.to}")
            if self.finished.schemes[name].grid == "offset" and self.to not in OFFSET_FORMATS:
                what = f"{self.to} has no place for the offsets of {self.finished.manifest['result']['format']}"
                raise FormatError(what, name, f"Use format dense, or quantize again with --format {self.to}")
            reason = target.refuse(self.finished.schemes[name], name, rows, cols, self.finished.architecture.layer)
            if reason:
                raise FormatError(reason)
        config_of(target, self.schemes, self.finished.ignore, self.finished.dtype)

    def written(self, out: Path, overwrite: bool) -> dict[str, Any]:
        """Write everything beside ``out``, give it its name, and return the manifest. Whatever goes wrong, nothing is
        left."""
        journal = Journal.beside(out)
        try:
            journal.open({"export": {"seal": self.finished.manifest["seal"], "to": self.to}})
        except ResumeError as error:
            way_out = "Finish it with its own command, remove it, or choose another output directory"
            raise OutputError("an unfinished run of another command is in the way", journal.partial, way_out) from error
        try:
            if self.to in WHOLE:
                bits = WHOLE[self.to](self.finished, writer.stage(journal), self.like, self.progress)
                return writer.publish_staged(
                    journal, out, self._texts(), self._manifest(bits), overwrite=overwrite, views=self._views
                )
            files.require_space(journal.partial, 2 * self._bytes())
            bits, side = self._bits_per_weight(), self.finished.checkpoint.side_files()
            texts, manifest = self._texts(), self._manifest(bits)
            return writer.publish(
                journal,
                out,
                self._tensors(),
                self._config(),
                side,
                texts,
                manifest,
                overwrite=overwrite,
                views=self._views,
            )
        except BaseException:
            journal.discard()  # an export is quick: there is nothing to resume
            raise
        finally:
            journal.close()

    def _tensors(self) -> Iterator[tuple[str, Tensor | TensorInfo]]:
        """What is copied, then each layer packed anew as the writer asks for it."""
        yield from self.finished.others().items()
        blocks = len(self.finished.layers)
        for done, name in enumerate(self.finished.layers):
            for suffix, tensor in self._layer(name).items():
                yield f"{name}.{suffix}", tensor
            if self.progress is not None:
                self.progress(Event("export", done, blocks, layer=name))

    def _layer(self, name: str) -> dict[str, Tensor]:
        if self.target is None:
            weight = self.finished.dense(name)
            return {"weight": weight.T.contiguous() if self.finished.architecture.layer == "conv1d" else weight}
        codes, grid = self.finished.layer(name)
        try:
            return self.target.pack(codes, grid, self.finished.dtype, self.schemes[name])
        except FormatError as error:
            raise FormatError(error.what, name, error.way_out) from error

    def _config(self) -> dict[str, Any]:
        config = {key: value for key, value in self.finished.checkpoint.config.items() if key not in CONFIG_KEYS}
        if self.target is None:
            return config
        stored = config_of(self.target, self.schemes, self.finished.ignore, self.finished.dtype)
        return with_older_ropes(config) | config_entries(self.to, stored)

    def _layer_bytes(self) -> int:
        if self.target is None:
            return sum(rows * cols for rows, cols in self.finished.layers.values()) * self.finished.dtype.itemsize
        layouts = (
            self.target.layout(self.schemes[name], shape, self.finished.dtype)
            for name, shape in self.finished.layers.items()
        )
        return sum(math.prod(shape) * dtype.itemsize for layout in layouts for dtype, shape in layout.values())

    def _bytes(self) -> int:
        return self._layer_bytes() + sum(info.nbytes for info in self.finished.others().values())

    def _bits_per_weight(self) -> float:
        return round(8 * self._layer_bytes() / sum(rows * cols for rows, cols in self.finished.layers.values()), 4)

    def _texts(self) -> dict[str, str]:
        """The records and the run as they are: the codes are the same."""
        kept = (self.finished.directory / name for name in (RECORDS, RUN))
        return {path.name: path.read_text(encoding="utf-8") for path in kept if path.exists()}

    def _views(self, manifest: Mapping[str, Any]) -> Mapping[str, str]:
        """Card and report of this container."""
        facts = Facts.read(self.finished.directory)
        return views(manifest, facts.records, facts.run)

    def _manifest(self, bits: float | None) -> dict[str, Any]:
        """The source's, with what is another here and where it came from."""
        before = self.finished.manifest
        kept = {key: value for key, value in before.items() if key not in ("files", "seal")}
        versions = {**before["versions"], "leangrid": __version__, "torch": torch.__version__}
        result = {**before["result"], "format": self.to, "bits_per_weight": bits}
        return {**kept, "versions": versions, "exported": self.came, "result": result}
