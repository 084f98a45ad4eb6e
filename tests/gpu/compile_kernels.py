"""Compiles Triton kernels for NVIDIA GPUs without one, down to machine code: `python compile_kernels.py sweep|linear`
prints, one JSON line a kernel, its registers, the bytes a thread keeps in local memory (spills), and its shared memory.

The interpreter accepts Python that the compiler does not, and knows no limits; this is the other half of testing
without a GPU."""

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

SIXTEENS = {"rows", "cols", "n", "width"}  # multiples of 16 in real models, and compiled apart for it
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


def compiled(kernel: Any, arguments: dict[str, Any], arch: int, **options: object) -> dict[str, object]:
    """``arguments``: a type such as "*fp32" or "i32" for what is passed at run time, values for the rest."""
    names = kernel.arg_names
    signature = {name: arguments[name] if isinstance(arguments[name], str) else "constexpr" for name in names}
    constants = {name: value for name, value in arguments.items() if not isinstance(value, str)}
    whole = [
        p.num for p in kernel.params if not p.do_not_specialize and (signature[p.name][0] == "*" or p.name in SIXTEENS)
    ]
    aligned = {(i,): [["tt.divisibility", 16]] for i in whole}
    done = triton.compile(
        ASTSource(kernel, signature, constants, aligned), target=GPUTarget("cuda", arch, 32), options=options
    )
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(done.asm["cubin"])
        file.flush()
        told = subprocess.run(
            [TOOLS / "cuobjdump", "--dump-resource-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", told)
    assert found, told
    return {"registers": int(found[1]), "spills": int(found[2]), "shared": done.metadata.shared}


def sweep_cases() -> Iterator[tuple[str, Any, dict[str, Any], dict[str, Any]]]:
    from leangrid.kernels.triton.descend import descend_kernel
    from leangrid.kernels.triton.level_gram import LAUNCH as GRAM_LAUNCH
    from leangrid.kernels.triton.level_gram import J, M, N, level_gram_kernel
    from leangrid.kernels.triton.nearest import COLUMNS, LAUNCH, ROWS
    from leangrid.kernels.triton.sweep import sweep_kernel

    common = {
        "levels": "*fp32",
        "scale": "*fp32",
        "zero": "*u8",
        "group": "*i32",
        "codes": "*u8",
        "rows": "i32",
        "cols": "i32",
        "groups": "i32",
        "R": ROWS,
        "C": COLUMNS,
    }
    own = {
        "sweep": {"weight": "*fp32", "upper": "*fp32", "errors": "*fp32"},
        "descend": {"gradient": "*fp32", "hessian": "*fp32", "old": "*u8", "deltas": "*fp32", "NEARER": 0.999999},
    }
    for name, kernel, kind, levels in (
        ("sweep", sweep_kernel, 0, 16),
        ("descend", descend_kernel, 2, 16),
        ("sweep", sweep_kernel, 3, 256),
    ):
        grid = common | {"KIND": kind, "K": levels, "WIDTH": levels}
        yield f"{name} {levels} levels, kind {kind}", kernel, grid | own[name], LAUNCH
    sizes = dict.fromkeys(("rows", "n", "begin", "width", "levels"), "i32")
    arguments = {
        "panel": "*bf16",
        "codes": "*u8",
        "out": "*fp64",
        **sizes,
        "TERMS": 3,
        "WIDE": 16,
        "M": M,
        "N": N,
        "J": J,
    }
    yield "level_gram", level_gram_kernel, arguments, GRAM_LAUNCH


def linear_cases() -> Iterator[tuple[str, Any, dict[str, Any], dict[str, Any]]]:
    from leangrid.kernels.triton import packed_kernels

    types = {"bf16": tl.bfloat16, "fp16": tl.float16, "fp32": tl.float32}
    options = {"num_warps": 4, "num_stages": 3, "enable_fp_fusion": True}
    whole = 1 << 30  # columns of a group that is the row
    cases = (
        ("lut", 4, 0, whole, "bf16"),
        ("lut", 3, 0, whole, "fp16"),
        ("affine", 4, 1, 128, "bf16"),
        ("affine", 3, 1, 24, "fp16"),
        ("affine", 2, 1, whole, "bf16"),
        ("affine", 4, 1, 12, "fp32"),
    )
    for name, bits, kind, group, dtype in cases:
        lanes = packed_kernels.PACKET[bits]
        grid = {
            "words": "*i32",
            "lut": f"*{dtype}",
            "scale": f"*{dtype}" if kind else "*u8",
            "zero": "*u8",
            "rows": "i32",
            "cols": "i32",
            "width": "i32",
            "groups": "i32",
            "BITS": bits,
            "P": lanes,
            "GROUP": group,
            "KIND": kind,
            "STORED": types[dtype],
        }
        label = f"{name} {bits} bits {dtype}, " + (f"groups of {group}" if group < 1 << 30 else "whole rows")
        both = {"x": f"*{dtype}", "y": f"*{dtype}"}
        yield f"gemv {label}", packed_kernels.gemv_kernel, grid | both | {"R": 4, "T": min(512, 4096 // lanes)}, options
        batched = grid | both | {"m": "i32", "span": "i32", "DTYPE": types[dtype]}
        step = 32 if dtype == "fp32" else 256
        yield f"gemm 16 {label}", packed_kernels.gemm_kernel, batched | {"R": 32, "T": step // lanes, "M": 16}, options
        step = 32 if dtype == "fp32" else 128  # as packed._gemm chooses
        yield f"gemm 64 {label}", packed_kernels.gemm_kernel, batched | {"R": 64, "T": step // lanes, "M": 64}, options
        yield (
            f"dequantize {label}",
            packed_kernels.dequantize_kernel,
            grid | {"out": f"*{dtype}", "DTYPE": types[dtype], "R": 16, "T": 256 // lanes},
            options,
        )


def main() -> None:
    cases = {"sweep": sweep_cases, "linear": linear_cases}[sys.argv[1]]
    for arch in map(int, sys.argv[2:] or ["80", "90"]):
        for name, kernel, arguments, options in cases():
            print(json.dumps({"kernel": name, "arch": arch} | compiled(kernel, arguments, arch, **options)), flush=True)


if __name__ == "__main__":
    main()
