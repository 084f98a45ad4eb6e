"""How fast do quantized models generate on a CPU? One JSON line for each layer shape, or for each model.

    python benchmarks/decode_cpu.py layers [--threads 1] [--shapes 576x576 4096x4096]
    python benchmarks/decode_cpu.py models --packed out/NU4 out/W4A16_G64 --source MODEL.gguf [--llama-python PYTHON]

``layers`` measures the microseconds of one product at 1, 4 and 16 tokens, packed at 4, 3 and 2 bits, beside torch's
dense one in float32 and bfloat16. The calls go round copies of each layer (256 MB of them as float32), so that weights
come from memory or the last cache as in a model. The rate counts the bytes of the packed weight, and ``of_memory`` is
its share of the rate at which torch sums half a gigabyte.

``models`` measures tokens a second after the prompt. All answer the same prompt greedily with the same threads, one
after the other, --repeats times; the median counts. Dense bfloat16 is the forward pass of transformers. llama.cpp is
the released build in the package xllamacpp, on the source file as it is and as Q4_K_M (common/llama_worker.py). Its
Python is made where --llama-python names none; --llama-python no leaves llama.cpp out.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional

from common.llama_python import WORKER, llama_python
from common.machine import ROOT, provenance
from leangrid import kernels
from leangrid.data.sampling import stream_tokens
from leangrid.evaluation.opened import load_model
from leangrid.inference.native_step import native_step
from leangrid.kernels import packed

SHAPES = ("576x576", "192x576", "1536x576", "576x1536", "4096x4096", "14336x4096", "4096x14336")
TOKENS = (1, 4, 16)
PROMPT = "The capital of France is"


def best_of(repeats: int, work: Callable[[], object]) -> float:
    """Seconds of the fastest of ``repeats`` calls, after one to warm up."""
    work()
    times = []
    for _ in range(repeats):
        begin = time.perf_counter()
        work()
        times.append(time.perf_counter() - begin)
    return min(times)


def memory_rate() -> float:
    """The rate, in bytes a second, at which torch sums half a gigabyte."""
    big = torch.ones(1 << 27)
    return big.numel() * 4 / best_of(5, big.sum)


def products(rows: int, cols: int) -> dict[str, tuple[int, Callable[[int, torch.Tensor], object]]]:
    """Name -> (bytes of the weight, a function of i and the inputs: the product with copy i of the layer)."""
    copies = max(2, (1 << 28) // (rows * cols * 4))
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(rows, cols, generator=generator)
    found: dict[str, tuple[int, Callable[[int, torch.Tensor], object]]] = {}

    def dense(values: list[torch.Tensor]) -> Callable[[int, torch.Tensor], object]:
        return lambda i, x: functional.linear(x.to(values[0].dtype), values[i % copies])

    for dtype in (torch.float32, torch.bfloat16):
        many = [weight.to(dtype).clone() for _ in range(copies)]
        found[str(dtype).removeprefix("torch.")] = many[0].nbytes, dense(many)
    for bits in (4, 3, 2):
        codes = torch.randint(2**bits, (rows, cols), generator=generator, dtype=torch.uint8)
        tiles = packed.tile(packed.pack(codes, bits), bits, cols)
        many = [tiles.clone() for _ in range(copies)]
        lut = torch.randn(rows, 2**bits, generator=generator).bfloat16().float()
        scale = torch.rand(rows, cols // 64, generator=generator).bfloat16().float()
        zeros = torch.full(scale.shape, 2 ** (bits - 1), dtype=torch.uint8)

        def nonuniform(i: int, x: torch.Tensor, many: list = many, lut: torch.Tensor = lut, bits: int = bits) -> object:
            return packed.lut_linear(x, many[i % copies], lut, None, bits)

        def affine(
            i: int, x: torch.Tensor, many: list = many, grid: tuple = (scale, zeros), bits: int = bits
        ) -> object:
            return packed.affine_linear(x, many[i % copies], *grid, None, bits, 64, torch.bfloat16)

        found[f"NU{bits}"] = tiles.nbytes + lut.nbytes, nonuniform
        found[f"W{bits}A16_G64"] = tiles.nbytes + scale.nbytes + zeros.nbytes, affine
    return found


def measure_layer(rows: int, cols: int, repeats: int, memory: float) -> dict[str, Any]:
    """For each kind of weight the microseconds of a product at each of TOKENS, GB/s at one token, and the share of
    ``memory``."""
    table: dict[str, Any] = {}
    for name, (size, product) in products(rows, cols).items():
        line: dict[str, Any] = {}
        calls = max(2, min(64, (1 << 28) // (rows * cols * 4)))
        for tokens in TOKENS:
            x = torch.randn(tokens, cols)
            seconds = best_of(repeats, lambda p=product, x=x, n=calls: [p(i, x) for i in range(n)])
            line[f"us_{tokens}"] = round(seconds / calls * 1e6, 1)
        rate = size / line["us_1"] * 1e6
        table[name] = line | {"gb_per_s": round(rate / 1e9, 2), "of_memory": round(rate / memory, 3)}
    return table


class Ours:
    """A model of transformers. ``native``: it generates with the extension's step, else with the model's own forward
    pass."""

    def __init__(self, path: str, native: bool, dtype: torch.dtype = torch.float32, kernels_: str = "") -> None:
        opened = load_model(path, dense=False)
        self.model, self.native, self.kernels = opened.model.to(dtype), native, kernels_
        self.prompt = opened.tokenizer(PROMPT)["input_ids"]

    def rate(self, tokens: int) -> float:
        """Tokens a second of ``tokens`` tokens after the prompt."""
        before = os.environ.get("LEANGRID_KERNELS", "")
        os.environ["LEANGRID_KERNELS"] = self.kernels
        answer = stream_tokens(self.model, self.prompt, tokens + 1, native_step=native_step if self.native else None)
        next(answer)  # the prompt's pass, and what is prepared once
        begin = time.perf_counter()
        count = sum(1 for _ in answer)
        os.environ["LEANGRID_KERNELS"] = before
        return count / (time.perf_counter() - begin)


class Llama:
    """llama.cpp in a process of its own."""

    def __init__(self, python: Path, model: Path, threads: int) -> None:
        command = [python, WORKER, "serve", model, str(threads)]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )

    def rate(self, tokens: int) -> float:
        """Tokens a second of ``tokens`` tokens after the prompt, as llama.cpp itself measures them."""
        if self.process.stdin is None or self.process.stdout is None:
            raise SystemExit("llama.cpp's worker has no pipes")
        print(json.dumps({"prompt": PROMPT, "tokens": tokens}), file=self.process.stdin, flush=True)
        while not (line := self.process.stdout.readline()).startswith('{"'):
            if not line:
                raise SystemExit(f"llama.cpp stopped: run {WORKER.name} serve by hand")
        return json.loads(line)["predicted_per_second"]

    def close(self) -> None:
        self.process.terminate()
        self.process.wait()


def subjects(args: argparse.Namespace, stack: ExitStack) -> dict[str, Ours | Llama]:
    """Name -> model, of all that are compared."""
    found: dict[str, Ours | Llama] = {}
    for path in args.packed:
        found[Path(path).name] = Ours(path, native=True)
        if kernels.backend() == "cpu-avx512":  # the released llama.cpp is built for AVX2
            found[f"{Path(path).name} avx2"] = Ours(path, native=True, kernels_="avx2")
    found["dense bfloat16, transformers"] = Ours(args.source, native=False, dtype=torch.bfloat16)
    found["dense, our step"] = Ours(args.source, native=True)
    if args.llama_python == "no":
        return found
    python, source = llama_python(args.llama_python), Path(args.source)
    q4km = args.work / (source.stem + ".Q4_K_M.gguf")
    if not q4km.exists():
        args.work.mkdir(parents=True, exist_ok=True)
        subprocess.run([python, WORKER, "quantize", source, q4km], check=True, stdout=sys.stderr)
    for name, model in {"llama.cpp Q4_K_M": q4km, f"llama.cpp {source.name.split('.')[-2]}": source}.items():
        worker = Llama(python, model, args.threads)
        stack.callback(worker.close)
        found[name] = worker
    return found


def compare_models(args: argparse.Namespace) -> None:
    """Measure all in turn, --repeats times, and print one line each."""
    with ExitStack() as stack, torch.no_grad():
        rates: dict[str, list[float]] = {}
        everyone = subjects(args, stack)
        for subject in everyone.values():
            subject.rate(4)
        for _ in range(args.repeats):
            for name, subject in everyone.items():
                rates.setdefault(name, []).append(subject.rate(args.tokens))
    median = {name: statistics.median(found) for name, found in rates.items()}
    base = median.get("llama.cpp Q4_K_M")
    for name, found in rates.items():
        line = {
            "benchmark": "decode_cpu",
            "model": Path(args.source).name,
            "variant": name,
            "threads": args.threads,
            "tokens": args.tokens,
            "tokens_per_second": round(median[name], 2),
            "spread": [round(min(found), 2), round(max(found), 2)],
        }
        ratio = {} if base is None else {"of_llama_cpp_q4_k_m": round(median[name] / base, 3)}
        print(json.dumps(line | ratio | {"kernels": kernels.backend()} | provenance()), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("layers", "models"))
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--shapes", nargs="+", default=SHAPES, metavar="ROWSxCOLS")
    parser.add_argument("--packed", nargs="+", default=[], metavar="DIR", help="results of leangrid quantize")
    parser.add_argument("--source", help="the .gguf file that they were made from")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument(
        "--llama-python", help="has xllamacpp and gguf; made in build/ without it; no: without llama.cpp"
    )
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "decode", help="where the Q4_K_M file goes")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.part == "models":
        if not args.source:
            parser.error("models needs --source")
        compare_models(args)
        return
    memory = memory_rate()
    for shape in args.shapes:
        rows, cols = map(int, shape.split("x"))
        line = {
            "benchmark": "decode_layers_cpu",
            "model": shape,
            "threads": args.threads,
            "kernels": kernels.backend(),
            "unit": "microseconds a product of 1, 4, 16 tokens",
            "memory_gb_per_s": round(memory / 1e9, 2),
        }
        print(
            json.dumps(line | {"results": measure_layer(rows, cols, args.repeats, memory)} | provenance()), flush=True
        )


if __name__ == "__main__":
    main()
