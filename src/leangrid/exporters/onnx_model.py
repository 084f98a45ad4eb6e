"""A finished result as one ONNX model for ONNX Runtime (and onnxruntime-genai): MatMulNBits for its quantized linears,
float32 for everything else.

onnxruntime-genai's own builder writes the decoder's graph from the dequantized checkpoint. Then every MatMul whose
weight is, bit for bit, that of one quantized layer (or of several, one below the other, as q, k and v) becomes a
MatMulNBits of the layer's codes. A layer that is found nowhere in the graph is an error: nothing is approximated.

The operator computes S (q - Z) in float32, without the rounding to the model's dtype that 16-bit readers do.
"""

import math
import re
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
from leangrid.formats import CONFIG_KEYS
from leangrid.formats import onnx as nbits
from leangrid.models.result_reader import ResultReader
from leangrid.progress import Event, Progress
from leangrid.storage import disk, files, safetensors

MODEL, DATA = "model.onnx", "model.onnx.data"
_BUILDER = "onnxruntime_genai.models.builder"
_ALIGNED = 4096  # bytes: ONNX Runtime maps a tensor that begins on a page
_OTHERS = "Use compressed-tensors, or export to dense."
_TAIL = 400  # characters of the builder's error message that are shown


def write(result: ResultReader, staged: Path, like: Path | None = None, progress: Progress | None = None) -> float:
    """Write model.onnx, model.onnx.data, genai_config.json and the tokenizer into the directory ``staged``.

    Args:
        like: not used; every writer of a whole file takes it.
        progress: is called when each layer is dequantized for the builder, whose graph is written after that.

    Returns:
        The stored bits per quantized weight.

    Raises:
        FormatError: MatMulNBits cannot hold a layer, a package is missing, or the builder does not know the
            architecture.
    """
    refuse(result)
    size = sum(rows * cols for rows, cols in result.layers.values())
    others = sum(info.nbytes // info.torch_dtype.itemsize for info in result.plain_tensors().values())
    # In float32, at most: the quantized weights twice and the others three times (in the dequantized checkpoint, the
    # builder's graph and ours).
    disk.require_space(staged, 4 * (2 * size + 3 * others))
    plain, graph = staged / "plain", staged / "graph"
    _write_plain(result, plain, progress)
    _build(plain, graph)
    files.remove_tree(plain)
    _Swap(result, graph).write(staged)
    for path in sorted(graph.iterdir()):
        if path.is_file() and path.name not in (MODEL, DATA):
            files.atomic_write(staged / path.name, files.read_chunks(path))
    files.remove_tree(graph)
    return round(8 * sum(_nbytes(result, name) for name in result.layers) / size, 4)


def _nbytes(result: ResultReader, name: str) -> int:
    layout = nbits.layout(result.scheme, result.layers[name])
    return sum(math.prod(shape) * dtype.itemsize for dtype, shape in layout.values())


def refuse(result: ResultReader) -> None:
    """FormatError for a model without a language-model head, for the first layer that MatMulNBits cannot hold, for a
    missing package, and for an architecture or experts whose graph onnxruntime-genai does not build of MatMul."""
    if not result.has_lm_head:
        raise FormatError(
            "onnxruntime-genai builds decoders with a language-model head, and this model has none",
            result.directory,
            "Export to dense, or serve it as compressed-tensors",
        )
    for name, (rows, cols) in result.layers.items():
        if reason := nbits.refuse(result.scheme, name, rows, cols, result.kinds[name]):
            raise FormatError(reason)
    missing = [name for name in ("onnx", "onnx_ir", "onnxruntime_genai") if find_spec(name) is None]
    if missing:
        what = f"export to onnx needs the package {missing[0].replace('_', '-')}"
        raise FormatError(what, "--to onnx", "pip install 'leangrid[onnx]'")
    _refuse_architecture(result)


def _refuse_architecture(result: ResultReader) -> None:
    """Ask the text of the builder, which compares the architecture with names; importing it takes long. One that lies
    elsewhere is asked by running it."""
    (package,) = getattr(find_spec("onnxruntime_genai"), "submodule_search_locations", None) or [""]
    builder, name = Path(package) / "models" / "builder.py", (result.checkpoint.config.get("architectures") or [""])[0]
    known = set(re.findall(r'architectures\[0\] == "(\w+)"', builder.read_text("utf-8"))) if builder.is_file() else ()
    where, way_out = result.directory, f"{_OTHERS} It knows: {', '.join(sorted(known))}"
    if known and name not in known:
        raise FormatError(
            f"onnxruntime-genai builds no graph of {name or 'a model without architectures'}", where, way_out
        )
    experts = tuple(f"{path}." for path in result.expert_forms)
    inside = next((name for name in result.layers if result.path_of(name).startswith(experts)), None)
    if inside is not None:
        what = "onnxruntime-genai holds experts in an operator of their own, which takes no codes of ours"
        raise FormatError(what, inside, _OTHERS)


def _write_plain(result: ResultReader, directory: Path, progress: Progress | None) -> None:
    """Write the dequantized checkpoint for the builder, one file a layer."""
    files.make_dir(directory)
    others, weight_map = result.plain_tensors(), {}
    safetensors.save(directory / "others.safetensors", others, {"format": "pt"})
    weight_map.update(dict.fromkeys(others, "others.safetensors"))
    for number, name in enumerate(result.layers):
        file = f"layer-{number:05d}.safetensors"
        safetensors.save(directory / file, {f"{name}.weight": result.weight_in_model_dtype(name)}, {"format": "pt"})
        weight_map[f"{name}.weight"] = file
        if progress is not None:
            progress(Event("export", number, len(result.layers), layer=name))
    files.write_json(directory / "model.safetensors.index.json", {"metadata": {}, "weight_map": weight_map})
    for name, path in result.checkpoint.side_files().items():
        files.make_dir((directory / name).parent)
        files.atomic_write(directory / name, files.read_chunks(path))
    config = {key: value for key, value in result.checkpoint.config.items() if key not in (*CONFIG_KEYS, "auto_map")}
    files.write_json(directory / "config.json", config)


def _build(plain: Path, graph: Path) -> None:
    """Run onnxruntime-genai's builder, in float32 for the CPU, in a process of its own; FormatError with the last line
    of its error where it fails."""
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

    result: ResultReader
    by_weight: dict[tuple[int, str], list[str]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in self.result.layers:
            weight = self.result.weight_in_model_dtype(name).float()
            self.by_weight.setdefault((weight.shape[1], _digest(weight)), []).append(name)

    def find(self, weight: Tensor) -> list[str]:
        """The layers whose weights, one below the other, are ``weight``, float32 [rows, cols]; they will not be found
        again. An empty list where a row belongs to no layer."""
        found, start, cols = [], 0, weight.shape[1]
        heights = sorted({rows for name, (rows, width) in self.result.layers.items() if width == cols}, reverse=True)
        while start < len(weight):
            keys = ((cols, _digest(weight[start : start + rows])) for rows in heights if start + rows <= len(weight))
            key = next((key for key in keys if self.by_weight.get(key)), None)
            if key is None:
                for name in found:  # they are not this weight's: let them be found again
                    self.by_weight[cols, _digest(self.result.weight_in_model_dtype(name).float())].insert(0, name)
                return []
            found.append(self.by_weight[key].pop(0))
            start += self.result.layers[found[-1]][0]
        return found

    @property
    def left(self) -> list[str]:
        """The layers that were not found yet."""
        return [name for names in self.by_weight.values() for name in names]


class _Swap:
    """Replaces the MatMul of the builder's graph by MatMulNBits, and writes its data file anew."""

    def __init__(self, result: ResultReader, graph: Path) -> None:
        import onnx  # an extra: 'leangrid[onnx]'

        self.onnx, self.result, self.graph = onnx, result, graph
        self.model: Any = onnx.load(str(graph / MODEL), load_external_data=False)
        self.stored: list[
            tuple[Any, int, Callable[[], Iterator[Any]]]
        ] = []  # initializer, bytes, its bytes when they are asked for

    def write(self, staged: Path) -> None:
        """``staged``/model.onnx and its data."""
        layers, graph = _Layers(self.result), self.model.graph
        initializers = {tensor.name: tensor for tensor in graph.initializer}
        uses: dict[str, int] = {}
        for node in graph.node:
            for name in node.input:
                uses[name] = uses.get(name, 0) + 1
        for node in graph.node:
            stored = initializers.get(node.input[1]) if node.op_type == "MatMul" else None
            if stored is None or len(stored.dims) != 2 or uses[stored.name] != 1:
                continue
            if names := layers.find(self._values(stored).T.contiguous()):
                del initializers[stored.name]
                self._replace(node, names)
        if layers.left:
            raise FormatError(
                "the graph that onnxruntime-genai builds holds its weight otherwise",
                layers.left[0],
                "Use compressed-tensors",
            )
        for tensor in initializers.values():
            self.stored.append((tensor, *self._source(tensor)))
        del graph.initializer[:]
        if "com.microsoft" not in {used.domain for used in self.model.opset_import}:
            self.model.opset_import.append(self.onnx.helper.make_opsetid("com.microsoft", 1))
        files.atomic_write(staged / DATA, self._placed())
        graph.initializer.extend(tensor for tensor, _, _ in self.stored)
        files.atomic_write(staged / MODEL, self.model.SerializeToString(deterministic=True))

    def _replace(self, node: Any, names: list[str]) -> None:
        """``node`` becomes a MatMulNBits whose rows are those of ``names``."""
        scheme, cols = self.result.scheme, self.result.layers[names[0]][1]
        rows = sum(self.result.layers[name][0] for name in names)
        inputs = [node.input[0]]
        for suffix, (dtype, shape) in nbits.layout(scheme, (rows, cols)).items():
            kind = self.onnx.TensorProto.UINT8 if dtype == torch.uint8 else self.onnx.TensorProto.FLOAT
            tensor = self.onnx.TensorProto(name=f"{node.name}.{suffix}".lstrip("/"), data_type=kind, dims=shape)
            inputs.append(tensor.name)
            size = math.prod(shape) * dtype.itemsize
            self.stored.append(
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
        layers = [nbits.pack(*self.result.layer(name), self.result.scheme) for name in names]
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
        for tensor, size, pieces in self.stored:
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
