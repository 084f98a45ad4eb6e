"""llama.cpp on the same model. Runs in a Python of its own that has xllamacpp and gguf (llama_python.py makes it).

    llama_worker.py quantize SOURCE.gguf OUT.gguf    prints one JSON line: how many tensors got which type
    llama_worker.py serve MODEL.gguf THREADS         reads JSON lines {"prompt", "tokens"}, prints the timings of each
    llama_worker.py blocks                           reads JSON lines {"type", "weight", "importance", "out"} with the
                                                     paths of .npy files, writes "out", prints its size in bytes

``quantize`` writes the mix of types that llama.cpp calls Q4_K_M, with llama.cpp's own ``ggml_quantize_chunk``: the
package exports that function, but not the quantizer of whole files. Rows whose length is no multiple of 256 get the
types that llama.cpp gives them: Q5_0 instead of Q4_K, Q8_0 instead of Q6_K.
"""

import collections
import ctypes
import json
import sys
from typing import Any

import gguf
import numpy as np
import xllamacpp
from gguf import GGMLQuantizationType as Type

_FALLBACK = {Type.Q4_K: Type.Q5_0, Type.Q6_K: Type.Q8_0}


def type_of(name: str, cols: int, block: int, blocks: int) -> Type:
    """The type in which Q4_K_M stores a matrix: six bits for the output and for half of the value and down projections,
    four for the rest."""
    more = block < blocks // 8 or block >= 7 * blocks // 8 or (block - blocks // 8) % 3 == 2
    six = name in ("token_embd.weight", "output.weight") or (more and (".attn_v." in name or ".ffn_down." in name))
    wanted = Type.Q6_K if six else Type.Q4_K
    return wanted if cols % 256 == 0 else _FALLBACK[wanted]


def packed(weight: np.ndarray, kind: Type, importance: np.ndarray | None = None) -> np.ndarray:
    """The bytes of ``weight`` float32 [rows, cols] by ``ggml_quantize_chunk``. ``importance`` float32 [cols] holds the
    mean squared inputs; None: no importance matrix."""
    chunk = ctypes.CDLL(xllamacpp.xllamacpp.__file__).ggml_quantize_chunk
    chunk.restype = ctypes.c_size_t
    chunk.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, *[ctypes.c_int64] * 3, ctypes.c_void_p]
    (rows, cols), (size, width) = weight.shape, gguf.GGML_QUANT_SIZES[kind]
    out = np.empty((rows, cols // size * width), dtype=np.uint8)
    share = None if importance is None else importance.ctypes.data
    if chunk(kind.value, weight.ctypes.data, out.ctypes.data, 0, rows, cols, share) != out.nbytes:
        raise SystemExit(f"ggml_quantize_chunk wrote another size than {out.nbytes} for {kind.name}")
    return out


def blocks() -> None:
    """Read one job a line; write the matrix after rounding to the type as .npy."""
    for line in sys.stdin:
        asked = json.loads(line)
        kind = Type[asked["type"]]
        weight = np.ascontiguousarray(np.load(asked["weight"]), dtype=np.float32)
        importance = (
            None
            if asked["importance"] is None
            else np.ascontiguousarray(np.load(asked["importance"]), dtype=np.float32)
        )
        stored = packed(weight, kind, importance)
        np.save(asked["out"], gguf.dequantize(stored, kind))
        print(json.dumps({"bytes": stored.nbytes}), flush=True)


def quantize(source: str, out: str) -> dict[str, int]:
    """Write ``out`` and return type -> number of matrices."""
    reader = gguf.GGUFReader(source)
    fields: dict[str, Any] = {name: field for name, field in reader.fields.items() if not name.startswith("GGUF.")}
    architecture = fields["general.architecture"].contents()
    blocks = int(fields[f"{architecture}.block_count"].contents())
    writer, count = gguf.GGUFWriter(out, architecture), collections.Counter()
    for name, field in fields.items():
        if name not in ("general.architecture", "general.file_type"):
            sub = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(name, field.contents(), field.types[0], sub_type=sub)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q4_K_M)
    for tensor in reader.tensors:
        weight = np.ascontiguousarray(gguf.dequantize(tensor.data, tensor.tensor_type), dtype=np.float32)
        if weight.ndim < 2:
            writer.add_tensor(tensor.name, weight)
            continue
        cols = weight.shape[1]
        block = int(tensor.name.split(".")[1]) if tensor.name.startswith("blk.") else 0
        kind = type_of(tensor.name, cols, block, blocks)
        writer.add_tensor(tensor.name, packed(weight, kind), raw_dtype=kind)
        count[kind.name] += 1
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return dict(count)


def serve(model: str, threads: int) -> None:
    """Print the timings of one answer for each line, until the input ends."""
    settings = xllamacpp.CommonParams()
    settings.model.path, settings.n_ctx, settings.n_parallel, settings.verbosity = model, 2048, 1, 0
    settings.cpuparams.n_threads = settings.cpuparams_batch.n_threads = threads
    server = xllamacpp.Server(settings)
    for line in sys.stdin:
        asked = json.loads(line)
        answer = server.handle_completions(
            {
                "prompt": asked["prompt"],
                "n_predict": asked["tokens"],
                "ignore_eos": True,
                "temperature": 0.0,
                "cache_prompt": False,
            }
        )
        answer = json.loads(answer) if isinstance(answer, str | bytes) else answer
        print(json.dumps(answer["timings"]), flush=True)


if __name__ == "__main__":
    if sys.argv[1] == "quantize":
        print(json.dumps(quantize(*sys.argv[2:4])))
    elif sys.argv[1] == "blocks":
        blocks()
    else:
        serve(sys.argv[2], int(sys.argv[3]))
