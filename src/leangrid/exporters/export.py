"""A finished result written once more, with the same codes, in another container: exactly, or refused.

Containers that lie in a Hugging Face directory are the rows of ``formats.FORMATS``, written layer by layer. Targets
that are one whole file are the rows of ``WHOLE``. ``dense`` is the dequantized checkpoint."""

import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from leangrid._version import __version__
from leangrid.errors import CheckpointError, FormatError, OutputError, RecipeError, ResumeError
from leangrid.exporters import gguf_file, onnx_model
from leangrid.exporters.merged_experts import find_merged_experts
from leangrid.exporters.stacked_experts import StackedLinear, stackings
from leangrid.formats import CONFIG_KEYS, FORMATS, Format, schemes_stored_by
from leangrid.formats.base import Layout
from leangrid.models.result_reader import ResultReader
from leangrid.planning.readers import (
    LOAD,
    MLX,
    MLX_LM,
    PLAIN,
    TRANSFORMERS,
    ask_mlx_lm,
    describe_obstacle,
    describe_words,
)
from leangrid.progress import Event, Progress
from leangrid.report.facts import RECORDS, RUN, Facts
from leangrid.report.views import render_views
from leangrid.results import Result
from leangrid.schemes import Scheme
from leangrid.storage import disk, writer
from leangrid.storage.config import add_older_rope_keys
from leangrid.storage.journal import Journal
from leangrid.storage.safetensors import TensorInfo

DENSE = "dense"

# A writer of one whole file: (result, staged directory, existing file to take metadata from, progress) -> stored bits
# per quantized weight, or None where that has no meaning. It refuses (LeangridError) what it cannot hold before it
# writes.
WholeFile = Callable[[ResultReader, Path, Path | None, Progress | None], float | None]
WHOLE: dict[str, WholeFile] = {"gguf": gguf_file.write, "onnx": onnx_model.write}
TAKES_LIKE: frozenset[str] = frozenset(
    {"gguf"}
)  # whole-file targets that can take their metadata from an existing file


@dataclass(frozen=True)
class ExportResult(Result):
    """What an export wrote.

    Attributes:
        out, model: the directory that was written, and the result it was made from.
        format: the container; ``scheme`` that of the result.
        layers: how many linears are quantized.
        bits_per_weight: codes and grids of the quantized linears; None where that has no meaning.
        bytes: size of all files of the directory.
        seconds: wall time.

    Example:
        >>> written = leangrid.export("out", "out-dense", to="dense")
        >>> written.layers, written.scheme
        (14, 'NU4')
    """

    out: str
    model: str
    format: str
    scheme: str
    layers: int
    bits_per_weight: float | None
    bytes: int
    seconds: float


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
        model: a directory that ``quantize`` or ``export`` wrote.
        out: the directory to make.
        to: compressed-tensors, lut, gptq, gptq_v1, awq, mlx, gguf, onnx, or dense (the dequantized checkpoint);
            ``targets()`` lists them.
        like: an existing .gguf file of the same model whose header and tokenizer are taken, for ``to="gguf"``; None:
            both are made from the checkpoint.
        overwrite: replace ``out`` if it is a result of leangrid.
        progress: is called with an Event after every layer.

    Returns:
        What was written.

    Raises:
        LeangridError: ``model`` is not finished or differs from its manifest, ``to`` cannot hold one of its layers
            exactly, or ``out`` is in the way. Nothing called ``out`` is made then.

    Example:
        >>> leangrid.export("out", "out-dense", to="dense").format
        'dense'
    """
    began = time.perf_counter()
    model, out = Path(model), Path(out)
    _check_target(to, like)
    complete = writer.finish_interrupted_rename(out)  # a kill may have come when only the journal was left to remove
    if complete is None:
        writer.check_output_path(out, model, overwrite)
    job = _Export(ResultReader.verified(model), to, None if like is None else Path(like), progress)
    if complete is None or complete.get("exported") != job.origin:
        writer.check_output_path(out, model, overwrite)
        job.refuse()
        complete = job.write(out, overwrite)
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


_KINDS = ("weight", "bias")


@dataclass(frozen=True, eq=False)
class _Export:
    """One export: the result that is read, and what it becomes."""

    result: ResultReader
    to: str
    like: Path | None
    progress: Progress | None

    @property
    def target(self) -> Format | None:
        """The container's row; None for dense and whole files."""
        return None if self.to in WHOLE else FORMATS.get(self.to)

    @property
    def origin(self) -> dict[str, str]:
        """``exported`` in the manifest: the result that the codes came from, and the container they went to."""
        before = self.result.manifest
        return {
            "from": self.result.directory.name,
            "format": before["result"]["format"],
            "seal": before["seal"],
            "to": self.to,
        }

    @cached_property
    def schemes(self) -> dict[str, Scheme]:
        """Layer -> the scheme that the target's files say."""
        layers = {name: (self.result.schemes[name], cols) for name, (_, cols) in self.result.layers.items()}
        return self.result.schemes if self.target is None else schemes_stored_by(self.target, layers)

    def refuse(self) -> None:
        """FormatError for the first layer that the container cannot hold; whole files refuse as they begin."""
        target, source = self.target, self.result.format
        if target is None:
            return
        for name, (rows, cols) in self.result.layers.items():
            scheme = self.result.schemes[name]
            if source.BLOCKS and not target.BLOCKS:
                what = f"{self.to} does not hold llama.cpp's {scheme.block}"
                raise FormatError(what, name, f"Use gguf or dense, or quantize again with --format {self.to}")
            if source.stores_offsets and not target.stores_offsets:
                what = f"{self.to} has no place for the offsets of {self.result.manifest['result']['format']}"
                raise FormatError(what, name, f"Use format dense, or quantize again with --format {self.to}")
            reason = target.refuse(scheme, name, rows, cols, self.result.kinds[name])
            if reason:
                raise FormatError(reason)
        target.config(self.schemes, self.result.ignore)

    @cached_property
    def opened_in(self) -> dict[str, str]:
        """What ``planning.readers.opened_in`` says of a run, of this export: nothing of a whole file."""
        if self.to in WHOLE:
            return {}
        if self.target is None:
            return {LOAD: "yes", TRANSFORMERS: "yes"}
        if self.to == PLAIN:
            return {LOAD: "yes", TRANSFORMERS: describe_obstacle(self.result.reading(self.schemes))}
        if self.to != MLX:
            return {LOAD: "yes"}
        word = self._ask_mlx_lm(self.stacked)
        return {MLX_LM: "yes"} if self.stacked else {LOAD: "yes"} if word is None else {LOAD: "yes", MLX_LM: word}

    @cached_property
    def stacked(self) -> list[StackedLinear]:
        """The experts that mlx-lm opens only stacked, as it opens them; none where it opens them one by one, or not at
        all, or is not there to be asked."""
        if self.to != MLX or not (self._ask_mlx_lm([]) or "").startswith("no"):
            return []
        return next((way for way in stackings(self.result) if self._ask_mlx_lm(way) == "yes"), [])

    def _ask_mlx_lm(self, stacked: list[StackedLinear]) -> str | None:
        """What mlx-lm says of the tensors that will be written, some of them ``stacked``."""
        layouts, layers = self._layouts(), {layer for one in stacked for layer in one.layers}
        tensors = self.result.plain_tensors() | {name: one for name, one in layouts.items() if name not in layers}
        owners = {self.result.path_of(name).rsplit(".", 2)[0] for name in self.result.layers}
        tensors |= {one.name: one.layout(layouts) for one in stacked}
        return ask_mlx_lm(self._config(), tensors, not owners.isdisjoint(self.result.expert_forms))

    def write(self, out: Path, overwrite: bool) -> dict[str, Any]:
        """Write everything beside ``out``, rename it, and return the manifest. Where anything goes wrong, nothing is
        left."""
        if self.progress is not None:
            for notice in describe_words(self.opened_in):
                self.progress(Event("notice", message=notice))
        journal = Journal.for_output(out)
        try:
            journal.start_or_resume({"export": {"seal": self.result.manifest["seal"], "to": self.to}})
        except ResumeError as error:
            way_out = "Finish it with its own command, remove it, or choose another output directory"
            raise OutputError("an unfinished run of another command is in the way", journal.partial, way_out) from error
        try:
            if self.to in WHOLE:
                bits = WHOLE[self.to](self.result, writer.make_staging_directory(journal), self.like, self.progress)
                return writer.write_staged_result(
                    journal, out, self._texts(), self._manifest(bits), overwrite=overwrite, views=self._views
                )
            disk.require_space(journal.partial, 2 * self._bytes())
            bits, side = self._bits_per_weight(), self.result.checkpoint.side_files()
            texts, manifest = self._texts(), self._manifest(bits)
            return writer.write_result(
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
        mixtures = find_merged_experts(self.result) if self.target is None else []
        merged = {
            f"{name}.{kind}" for one in mixtures for kind in _KINDS for n in one.parts(kind).values() for name in n
        }
        yield from ((name, info) for name, info in self.result.plain_tensors().items() if name not in merged)
        for mixture in mixtures:
            yield from mixture.tensors(self.result)
        for one in self.stacked:
            for suffix, tensor in one.pack(self._layer).items():
                yield f"{one.name}.{suffix}", tensor
        merged |= {f"{layer}.weight" for one in self.stacked for layer in one.layers}
        blocks = len(self.result.layers)
        for done, name in enumerate(self.result.layers):
            if f"{name}.weight" in merged:
                continue
            for suffix, tensor in self._layer(name).items():
                yield f"{name}.{suffix}", tensor
            if self.progress is not None:
                self.progress(Event("export", done, blocks, layer=name))

    def _layer(self, name: str) -> dict[str, Tensor]:
        if self.target is None:
            weight = self.result.weight_in_model_dtype(name)
            return {"weight": (weight if self.result.kinds[name] == "linear" else weight.t()).contiguous()}
        codes, grid = self.result.layer(name)
        try:
            return self.target.pack(codes, grid, self.result.dtype, self.schemes[name])
        except FormatError as error:
            raise FormatError(error.what, name, error.way_out) from error

    def _config(self) -> dict[str, Any]:
        config = {key: value for key, value in self.result.checkpoint.config.items() if key not in CONFIG_KEYS}
        if self.target is None:
            return config
        ignore, reading = self.result.ignore, self.result.reading(self.schemes)
        return add_older_rope_keys(config) | self.target.config_entries(self.schemes, ignore, reading)

    def _layer_bytes(self) -> int:
        if self.target is None:
            return sum(rows * cols for rows, cols in self.result.layers.values()) * self.result.dtype.itemsize
        layouts = self._layouts().values()
        return sum(math.prod(shape) * dtype.itemsize for layout in layouts for dtype, shape in layout.values())

    def _layouts(self) -> dict[str, Layout]:
        """Layer -> its tensors in the target; none for a dense export."""
        if self.target is None:
            return {}
        return {
            name: self.target.layout(self.schemes[name], shape, self.result.dtype)
            for name, shape in self.result.layers.items()
        }

    def _bytes(self) -> int:
        return self._layer_bytes() + sum(info.nbytes for info in self.result.plain_tensors().values())

    def _bits_per_weight(self) -> float:
        return round(8 * self._layer_bytes() / sum(rows * cols for rows, cols in self.result.layers.values()), 4)

    def _texts(self) -> dict[str, str]:
        """The records and the run as they are: the codes are the same."""
        paths = (self.result.directory / name for name in (RECORDS, RUN))
        return {path.name: path.read_text(encoding="utf-8") for path in paths if path.exists()}

    def _views(self, manifest: Mapping[str, Any]) -> Mapping[str, str]:
        """Card and report of this container."""
        facts = Facts.read(self.result.directory)
        return render_views(manifest, facts.records, facts.run)

    def _manifest(self, bits: float | None) -> dict[str, Any]:
        """The result's manifest with the container's own figures, and where the codes came from."""
        before = self.result.manifest
        same = {key: value for key, value in before.items() if key not in ("files", "seal")}
        versions = {**before["versions"], "leangrid": __version__, "torch": torch.__version__}
        result = {**before["result"], "format": self.to, "bits_per_weight": bits}
        return {**same, "versions": versions, "exported": self.origin, "result": result, "opened_in": self.opened_in}
