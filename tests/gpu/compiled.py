"""Compiles every Triton kernel of the package ahead of time, for a GPU that need not be here; prints what each one uses
as JSON.

    python tests/gpu/compiled.py 80 90

A kernel that the interpreter runs may still be refused by the compiler; this finds out without a device.
TRITON_INTERPRET must not be set."""

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from leangrid.kernels.triton import affine, kmeans

POINTERS = {
    "value": "*fp32",
    "order": "*i64",
    "weight": "*fp32",
    "share": "*fp64",
    "tails": "*fp64",
    "energy": "*fp64",
    "zero_out": "*u8",
    "scale_out": "*fp32",
    "objective_out": "*fp64",
    "p0": "*fp64",
    "p1": "*fp64",
    "p2": "*fp64",
    "costs": "*fp64",
    "splits": "*i32",
    "bounds": "*i32",
    "current": "*fp64",
    "out": "*fp64",
    "smallest": "fp32",
    "largest": "fp32",
}


def search(levels: int, symmetric: bool, dtype: int) -> tuple:
    more = {
        "LEVELS": levels,
        "BLOCK": affine.scales_at_once(levels),
        "SCAN": 512,
        "SYMMETRIC": symmetric,
        "DTYPE": dtype,
    }
    return affine._search, {}, more, 4 if levels <= 16 else 8


# The kernel, types that differ from the table, its constants as the ops give them, warps.
KERNELS = {
    "affine_tails_row": (affine._tails, {}, {"ROWS": 1, "BLOCK": 512}, 4),
    "affine_tails_group": (affine._tails, {}, {"ROWS": 4, "BLOCK": 128}, 4),
    "affine_search_4": search(16, False, 0),
    "affine_search_4_symmetric_f16": search(16, True, 1),
    "affine_search_2_bf16": search(4, False, 2),
    "affine_search_8": search(256, False, 0),
    "kmeans_dp": (kmeans._dp, {}, {"WIDE": kmeans.WIDE, "COARSE": kmeans.COARSE, "FINE": kmeans.FINE}, 4),
    "kmeans_lloyd_16": (kmeans._lloyd, {"value": "*fp64"}, {"K": 16}, 1),
    "kmeans_lloyd_256": (kmeans._lloyd, {"value": "*fp64"}, {"K": 256}, 1),
}


def usage(cubin: bytes) -> dict[str, int]:
    """Registers a thread and bytes of stack a thread (where spilled registers go), as the disassembler of Triton's
    wheel tells."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        done = subprocess.run([tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=False)
    return {name.lower(): int(size) for name, size in re.findall(r"\b(REG|STACK):(\d+)", done.stdout)}


def compiled(name: str, arch: int) -> dict[str, object]:
    kernel, types, constants, warps = KERNELS[name]
    signature = {
        arg: "constexpr" if arg in constants else {**POINTERS, **types}.get(arg, "i32") for arg in kernel.arg_names
    }
    options = {"num_warps": warps, "enable_fp_fusion": False}
    built = triton.compile(ASTSource(kernel, signature, constants), target=GPUTarget("cuda", arch, 32), options=options)
    ptx = built.asm["ptx"]
    return {"kernel": name, "arch": arch, "shared": built.metadata.shared, "cubin": len(built.asm["cubin"]),
            "ftz": ".ftz" in ptx, "fused": "fma.rn.f64" in ptx} | usage(built.asm["cubin"])  # fmt: skip


if __name__ == "__main__":
    print(json.dumps([compiled(name, int(arch)) for arch in sys.argv[1:] for name in KERNELS]))
