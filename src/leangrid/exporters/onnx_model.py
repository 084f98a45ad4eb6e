"""A finished result -> one ONNX model for ONNX Runtime (and onnxruntime-genai): its linears are MatMulNBits, everything
else float32.

onnxruntime-genai's own builder writes the decoder's graph from the dequantized checkpoint. Then every MatMul whose
weight is, bit for bit, that of one of our layers (or of several, row under row, as q, k and v) becomes a MatMulNBits of
the layer's codes. A layer that is not found so is an error: nothing is approximated.

The operator computes S (q - Z) in float32, without the rounding to the model's dtype that 16-bit readers do.
"""

import math
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from hashlib import sha256
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from leangrid.errors import FormatError
from leangrid.exporters.result_reader import Finished
from leangrid.formats import onnx as nbits
from leangrid.progress import Event, Progress
from leangrid.storage import files, safetensors

MODEL, DATA = "model.onnx", "model.onnx.data"
_BUILDER = "onnxruntime_genai.models.builder"
_ALIGNED = 4096  # bytes: ONNX Runtime maps a tensor that begins on a page
_TAIL = 400  # characters of the builder's complaint that are shown


def write(finished: Finished, staged: Path, like: Path | None = None, progress: Progress | None = None) -> float:
    """Put model.onnx, model.onnx.data, genai_config.json and the tokenizer into ``staged``; return the bits per
    quantized weight.

    ``progress`` is called as each layer goes to the builder; its graph is written after that.

    Raises:
        FormatError: a layer that MatMulNBits cannot hold, a package that is missing, or an architecture that the
        builder does not know.
    """
    refuse(finished)
    size = sum(rows * cols for rows, cols in finished.layers.values())
    others = sum(info.nbytes // info.torch_dtype.itemsize for info in finished.others().values())
    # Twice in float32 at most (the checkpoint in its own dtype, the builder's graph, ours), and the codes.
    files.require_space(staged, 4 * (2 * size + 3 * others))
    plain, graph = staged / "plain", staged / "graph"
    _write_plain(finished, plain, progress)
    _build(plain, graph)
    files.remove_tree(plain)
    _Swap(finished, graph).write(staged)
    for path in sorted(graph.iterdir()):
        if path.is_file() and path.name not in (MODEL, DATA):
            files.atomic_write(staged / path.name, files.read_chunks(path))
    files.remove_tree(graph)
    return round(8 * sum(_nbytes(finished, name) for name in finished.layers) / size, 4)


def _nbytes(finished: Finished, name: str) -> int:
    layout = nbits.layout(finished.scheme, finished.layers[name])
    return sum(math.prod(shape) * dtype.itemsize for dtype, shape in layout.values())


def refuse(finished: Finished) -> None:
    """FormatError for a model without a language-model head, the first layer that MatMulNBits cannot hold, a missing
    package."""
    if not finished.predicts:
        raise FormatError(
            "onnxruntime-genai builds decoders with a language-model head, and this model has none",
            finished.directory,
            "Export to dense, or serve it as compressed-tensors",
        )
    for name, (rows, cols) in finished.layers.items():
        if reason := nbits.refuse(finished.scheme, name, rows, cols, finished.architecture.layer):
            raise FormatError(reason)
    missing = [name for name in ("onnx", "onnx_ir", "onnxruntime_genai") if find_spec(name) is None]
    if missing:
        what = f"export to onnx needs the package {missing[0].replace('_', '-')}"
        raise FormatError(what, "--to onnx", "pip install 'leangrid[onnx]'")


def _write_plain(finished: Finished, directory: Path, progress: Progress | None) -> None:
    """The dequantized checkpoint, one file a layer, for the builder."""
    files.make_dir(directory)
    others, weight_map = finished.others(), {}
    safetensors.save(directory / "others.safetensors", others, {"format": "pt"})
    weight_map.update(dict.fromkeys(others, "others.safetensors"))
    for number, name in enumerate(finished.layers):
        file = f"layer-{number:05d}.safetensors"
        safetensors.save(directory / file, {f"{name}.weight": finished.dense(name)}, {"format": "pt"})
        weight_map[f"{name}.weight"] = file
        if progress is not None:
            progress(Event("layer", number, len(finished.layers), layer=name))
    files.write_json(directory / "model.safetensors.index.json", {"metadata": {}, "weight_map": weight_map})
    for name, path in finished.checkpoint.side_files().items():
        files.make_dir((directory / name).parent)
        files.atomic_write(directory / name, files.read_chunks(path))
    config = {
        key: value
        for key, value in finished.checkpoint.config.items()
        if key not in ("quantization_config", "auto_map")
    }
    files.write_json(directory / "config.json", config)


def _build(plain: Path, graph: Path) -> None:
    """onnxruntime-genai's builder, float32 for the CPU, in a process of its own; FormatError with its last words where
    it gives up."""
    command = [
        sys.executable,
        "-m",
        _BUILDER,
        "--input",
        str(plain),
        "--output",
        str(graph),
        "--precision",
        "fp32",
        "--execution_provider",
        "cpu",
        "--cache_dir",
        str(graph / "cache"),
        "--extra_options",
        "hf_remote=false",
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603 - our own interpreter, paths of ours
    if done.returncode or not (graph / MODEL).is_file():
        last = " ".join((done.stderr.strip().splitlines() or ["it said nothing"])[-1].split())[-_TAIL:]
        raise FormatError(
            f"onnxruntime-genai cannot build this model's graph: {last}",
            plain.parent,
            "Its documentation lists the architectures; compressed-tensors serves the others",
        )


@dataclass
class _Layers:
    """Quantized layers by the sha256 of their dequantized weight, until each has been found once."""

    finished: Finished
    by_weight: dict[tuple[int, str], list[str]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in self.finished.layers:
            weight = self.finished.dense(name).float()
            self.by_weight.setdefault((weight.shape[1], _digest(weight)), []).append(name)

    def take(self, weight: Tensor) -> list[str]:
        """The layers whose rows, one under the other, are ``weight`` float32 [rows, cols]; none where a row belongs to
        no layer."""
        found, start, cols = [], 0, weight.shape[1]
        heights = sorted({rows for name, (rows, width) in self.finished.layers.items() if width == cols}, reverse=True)
        while start < len(weight):
            keys = ((cols, _digest(weight[start : start + rows])) for rows in heights if start + rows <= len(weight))
            key = next((key for key in keys if self.by_weight.get(key)), None)
            if key is None:
                for name in found:  # what was taken is not this weight's after all
                    self.by_weight[cols, _digest(self.finished.dense(name).float())].insert(0, name)
                return []
            found.append(self.by_weight[key].pop(0))
            start += self.finished.layers[found[-1]][0]
        return found

    @property
    def left(self) -> list[str]:
        return [name for names in self.by_weight.values() for name in names]


class _Swap:
    """The builder's graph with MatMul -> MatMulNBits, and its data file written anew."""

    def __init__(self, finished: Finished, graph: Path) -> None:
        import onnx  # an extra: 'leangrid[onnx]'

        self.onnx, self.finished, self.graph = onnx, finished, graph
        self.model: Any = onnx.load(str(graph / MODEL), load_external_data=False)
        self.kept: list[
            tuple[Any, int, Callable[[], Iterator[Any]]]
        ] = []  # initializer, bytes, its bytes when they are asked for

    def write(self, staged: Path) -> None:
        """``staged``/model.onnx and its data."""
        layers, graph = _Layers(self.finished), self.model.graph
        initializers = {tensor.name: tensor for tensor in graph.initializer}
        uses: dict[str, int] = {}
        for node in graph.node:
            for name in node.input:
                uses[name] = uses.get(name, 0) + 1
        for node in graph.node:
            stored = initializers.get(node.input[1]) if node.op_type == "MatMul" else None
            if stored is None or len(stored.dims) != 2 or uses[stored.name] != 1:
                continue
            if names := layers.take(self._values(stored).T.contiguous()):
                del initializers[stored.name]
                self._replace(node, names)
        if layers.left:
            raise FormatError(
                "the graph that onnxruntime-genai builds holds its weight otherwise",
                layers.left[0],
                "Use compressed-tensors",
            )
        for tensor in initializers.values():
            self.kept.append((tensor, *self._source(tensor)))
        del graph.initializer[:]
        if "com.microsoft" not in {used.domain for used in self.model.opset_import}:
            self.model.opset_import.append(self.onnx.helper.make_opsetid("com.microsoft", 1))
        files.atomic_write(staged / DATA, self._placed())
        graph.initializer.extend(tensor for tensor, _, _ in self.kept)
        files.atomic_write(staged / MODEL, self.model.SerializeToString(deterministic=True))

    def _replace(self, node: Any, names: list[str]) -> None:
        """``node`` becomes a MatMulNBits whose rows are those of ``names``."""
        scheme, cols = self.finished.scheme, self.finished.layers[names[0]][1]
        rows = sum(self.finished.layers[name][0] for name in names)
        inputs = [node.input[0]]
        for suffix, (dtype, shape) in nbits.layout(scheme, (rows, cols)).items():
            kind = self.onnx.TensorProto.UINT8 if dtype == torch.uint8 else self.onnx.TensorProto.FLOAT
            tensor = self.onnx.TensorProto(name=f"{node.name}.{suffix}".lstrip("/"), data_type=kind, dims=shape)
            inputs.append(tensor.name)
            size = math.prod(shape) * dtype.itemsize
            self.kept.append(
                (
                    tensor,
                    size,
                    lambda suffix=suffix: iter((safetensors.memoryview_of(self._packed(tuple(names))[suffix]),)),
                )
            )
        made = self.onnx.helper.make_node(
            "MatMulNBits",
            inputs,
            list(node.output),
            name=node.name,
            domain="com.microsoft",
            K=cols,
            N=rows,
            bits=scheme.bits,
            block_size=nbits.block_size(scheme, cols),
        )
        node.CopyFrom(made)

    @lru_cache(maxsize=1)  # noqa: B019 - one layer, asked for by each of its tensors in turn; the object lives as long as one export
    def _packed(self, names: tuple[str, ...]) -> dict[str, Tensor]:
        layers = [nbits.pack(*self.finished.layer(name), self.finished.scheme) for name in names]
        return {suffix: torch.cat([tensors[suffix] for tensors in layers]).contiguous() for suffix in layers[0]}

    def _values(self, tensor: Any) -> Tensor:
        """A float32 initializer; FormatError for another dtype."""
        if tensor.data_type != self.onnx.TensorProto.FLOAT:
            raise FormatError(
                f"the builder's graph holds {tensor.name} in another dtype than float32",
                "--to onnx",
                "Use compressed-tensors",
            )
        data = b"".join(bytes(piece) for piece in self._source(tensor)[1]())
        return torch.frombuffer(bytearray(data), dtype=torch.float32).reshape(tuple(tensor.dims))

    def _source(self, tensor: Any) -> tuple[int, Callable[[], Iterator[Any]]]:
        """Bytes and pieces of an initializer, wherever the builder put it."""
        if tensor.data_location != self.onnx.TensorProto.EXTERNAL:
            raw = self.onnx.numpy_helper.to_array(tensor).tobytes()
            return len(raw), lambda: iter((raw,))
        where = {entry.key: entry.value for entry in tensor.external_data}
        start, length = int(where.get("offset", 0)), int(where["length"])
        return length, lambda: files.read_chunks(self.graph / where["location"], start, length)

    def _placed(self) -> Iterator[Any]:
        """The data file, piece by piece; every initializer learns its place in it."""
        at = 0
        for tensor, size, pieces in self.kept:
            gap = -at % _ALIGNED
            yield bytes(gap)
            at += gap
            for name in (
                "raw_data",
                "external_data",
                "float_data",
                "int32_data",
                "int64_data",
                "double_data",
                "uint64_data",
            ):
                tensor.ClearField(name)
            tensor.data_location = self.onnx.TensorProto.EXTERNAL
            for key, value in (("location", DATA), ("offset", str(at)), ("length", str(size))):
                tensor.external_data.add(key=key, value=value)
            yield from pieces()
            at += size


def _digest(weight: Tensor) -> str:
    return sha256(safetensors.memoryview_of(weight.contiguous())).hexdigest()
