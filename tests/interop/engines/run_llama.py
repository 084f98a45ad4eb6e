"""llama.cpp's own reader on a GGUF file: logits and greedy tokens of a prompt, and on request token ids and dequantized
weights.

    python run_llama.py < request.json

Request: {"model": model.gguf or the directory that holds it, "tokens": [ids], "new": n, "logits": path, "result": path,
"threads": n}; also "texts": [..] (their token ids go to the result) and "weights": path (every block-quantized tensor
as llama.cpp's C code dequantizes it, float32, by name).

xllamacpp's module exports the C library. Its parameter structs change with every release, so they are handed around as
the bytes that the library's own default functions fill, more bytes than they have; only the three oldest fields of the
context's are written."""

import ctypes
import importlib.metadata
import json
import sys
from pathlib import Path

import numpy as np
import xllamacpp
from safetensors.numpy import save_file

POINTER, INT = ctypes.c_void_p, ctypes.c_int32


class Blob(ctypes.Structure):
    """A struct of unknown layout, by value."""

    _fields_ = (("bytes", ctypes.c_uint32 * 256),)


class NoData(ctypes.Structure):
    """gguf_init_params: small enough to travel in registers, so its size matters. All zero: only the header is read."""

    _fields_ = (("no_alloc", ctypes.c_bool), ("context", POINTER))


class Batch(ctypes.Structure):
    """llama_batch, as llama_batch_init returns it."""

    _fields_ = (
        ("n_tokens", INT),
        ("token", ctypes.POINTER(INT)),
        ("embd", POINTER),
        ("pos", ctypes.POINTER(INT)),
        ("n_seq_id", ctypes.POINTER(INT)),
        ("seq_id", ctypes.POINTER(ctypes.POINTER(INT))),
        ("logits", ctypes.POINTER(ctypes.c_int8)),
    )


class Traits(ctypes.Structure):
    """The beginning of ggml_type_traits."""

    _fields_ = (
        ("name", ctypes.c_char_p),
        ("block", ctypes.c_int64),
        ("interleave", ctypes.c_int64),
        ("size", ctypes.c_size_t),
        ("quantized", ctypes.c_bool),
        ("to_float", ctypes.CFUNCTYPE(None, POINTER, POINTER, ctypes.c_int64)),
    )


LOG = ctypes.CFUNCTYPE(None, INT, ctypes.c_char_p, POINTER)
SIGNATURES = {
    "llama_model_default_params": (Blob, []),
    "llama_model_load_from_file": (POINTER, [ctypes.c_char_p, Blob]),
    "llama_model_get_vocab": (POINTER, [POINTER]),
    "llama_vocab_n_tokens": (INT, [POINTER]),
    "llama_context_default_params": (Blob, []),
    "llama_init_from_model": (POINTER, [POINTER, Blob]),
    "llama_set_n_threads": (None, [POINTER, INT, INT]),
    "llama_batch_init": (Batch, [INT, INT, INT]),
    "llama_decode": (INT, [POINTER, Batch]),
    "llama_get_logits_ith": (ctypes.POINTER(ctypes.c_float), [POINTER, INT]),
    "llama_tokenize": (INT, [POINTER, ctypes.c_char_p, INT, ctypes.POINTER(INT), INT, ctypes.c_bool, ctypes.c_bool]),
    "llama_log_set": (None, [LOG, POINTER]),
    "gguf_init_from_file": (POINTER, [ctypes.c_char_p, NoData]),
    "gguf_get_n_tensors": (ctypes.c_int64, [POINTER]),
    "gguf_get_data_offset": (ctypes.c_size_t, [POINTER]),
    "gguf_get_tensor_name": (ctypes.c_char_p, [POINTER, ctypes.c_int64]),
    "gguf_get_tensor_type": (INT, [POINTER, ctypes.c_int64]),
    "gguf_get_tensor_offset": (ctypes.c_size_t, [POINTER, ctypes.c_int64]),
    "gguf_get_tensor_size": (ctypes.c_size_t, [POINTER, ctypes.c_int64]),
    "ggml_get_type_traits": (ctypes.POINTER(Traits), [INT]),
}
LINES: list[str] = []


@LOG
def keep(level: int, text: bytes, _: object) -> None:
    """llama.cpp's log, for the message of a failure."""
    if level >= 3:
        LINES.append(text.decode(errors="replace").strip())


def library() -> ctypes.CDLL:
    found = ctypes.CDLL(xllamacpp.xllamacpp.__file__)
    for name, (result, arguments) in SIGNATURES.items():
        function = getattr(found, name)
        function.restype, function.argtypes = result, arguments
    found.llama_log_set(keep, None)
    return found


class Model:
    """A model and a context for ``length`` tokens."""

    def __init__(self, lib: ctypes.CDLL, path: str, length: int, threads: int) -> None:
        self.lib = lib
        self.model = lib.llama_model_load_from_file(path.encode(), lib.llama_model_default_params())
        if not self.model:
            raise SystemExit(f"llama.cpp does not load {path}: {' '.join(LINES[-3:])}")
        settings = lib.llama_context_default_params()
        settings.bytes[0] = settings.bytes[1] = settings.bytes[2] = max(length, 64)  # n_ctx, n_batch, n_ubatch
        self.context = lib.llama_init_from_model(self.model, settings)
        if not self.context:
            raise SystemExit(f"llama.cpp makes no context: {' '.join(LINES[-3:])}")
        lib.llama_set_n_threads(self.context, threads, threads)
        self.vocab = lib.llama_model_get_vocab(self.model)
        self.batch = lib.llama_batch_init(max(length, 64), 0, 1)
        self.past = 0

    def forward(self, tokens: list[int]) -> np.ndarray:
        """Logits behind each of ``tokens``, which follow what was given before."""
        batch = self.batch
        batch.n_tokens = len(tokens)
        for i, token in enumerate(tokens):
            batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.seq_id[i][0], batch.logits[i] = (
                token,
                self.past + i,
                1,
                0,
                1,
            )
        if self.lib.llama_decode(self.context, batch):
            raise SystemExit(f"llama_decode failed: {' '.join(LINES[-3:])}")
        self.past += len(tokens)
        size = self.lib.llama_vocab_n_tokens(self.vocab)
        return np.stack(
            [
                np.ctypeslib.as_array(self.lib.llama_get_logits_ith(self.context, i), (size,)).copy()
                for i in range(len(tokens))
            ]
        )

    def ids(self, text: str) -> list[int]:
        """The token ids of ``text``, with what the file says belongs around it, special tokens read as such."""
        raw = text.encode()
        buffer = (INT * (len(raw) + 16))()
        count = self.lib.llama_tokenize(self.vocab, raw, len(raw), buffer, len(buffer), True, True)
        return list(buffer[:count])


def weights(lib: ctypes.CDLL, path: str) -> dict[str, np.ndarray]:
    """Every block-quantized tensor, dequantized by the C code that a backend without a faster way falls back to."""
    header = lib.gguf_init_from_file(path.encode(), NoData())
    data, start, found = np.memmap(path, dtype=np.uint8, mode="r"), lib.gguf_get_data_offset(header), {}
    for index in range(lib.gguf_get_n_tensors(header)):
        traits = lib.ggml_get_type_traits(lib.gguf_get_tensor_type(header, index)).contents
        if traits.quantized:
            at, size = start + lib.gguf_get_tensor_offset(header, index), lib.gguf_get_tensor_size(header, index)
            stored = np.ascontiguousarray(data[at : at + size])
            out = np.empty(size // traits.size * traits.block, dtype=np.float32)
            traits.to_float(stored.ctypes.data, out.ctypes.data, out.size)
            found[lib.gguf_get_tensor_name(header, index).decode()] = out
    return found


def main() -> None:
    asked = json.loads(sys.stdin.read())
    path = Path(asked["model"])
    path, lib = str(path / "model.gguf" if path.is_dir() else path), library()
    prompt, new = asked["tokens"], asked["new"]
    model = Model(lib, path, len(prompt) + new, asked.get("threads", 1))
    logits = model.forward(prompt)
    if asked.get("logits"):
        save_file({"logits": logits.astype(np.float32)}, asked["logits"])
    tokens = [int(logits[-1].argmax())]
    while len(tokens) < new:
        tokens.append(int(model.forward(tokens[-1:])[-1].argmax()))
    if asked.get("weights"):
        save_file(weights(lib, path), asked["weights"])
    version = importlib.metadata.version("xllamacpp")
    note = "activations rounded to 8 bits for each product, keys and values to float16"
    result = {"tokens": tokens, "dtype": "float32", "versions": {"engine": version, "xllamacpp": version}, "note": note}
    if "texts" in asked:
        result["ids"] = [model.ids(text) for text in asked["texts"]]
    Path(asked["result"]).write_text(json.dumps(result))


if __name__ == "__main__":
    main()
