"""Runs the tests of the kernels with the C++ extension built under AddressSanitizer and UBSan.

    python scripts/sanitize.py

The extension is built with GCC's sanitizers in a temporary folder and put into a copy of the package; the tests run
with libasan loaded first. Any report ends the run with an error. About five minutes.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TESTS = (
    "tests/unit/kernels/test_native.py",
    "tests/unit/kernels/test_sums.py",
    "tests/unit/kernels/test_checks.py",
    "tests/unit/kernels/test_packed.py",
    "tests/oracles/test_exact.py",
    "tests/unit/inference/test_layers.py",
    "tests/unit/inference/test_load.py",
    "tests/faults/test_shapes.py",
    "tests/interop/test_transformers.py",
)
FLAGS = "-fsanitize=address,undefined -fno-sanitize-recover=undefined -fno-omit-frame-pointer -g1"
# Reports of uninstrumented libraries below us (torch, Python) are not ours: leaks at exit, and checks of their own
# allocators.
ASAN = "detect_leaks=0:alloc_dealloc_mismatch=0:detect_odr_violation=0:abort_on_error=0:allocator_may_return_null=1"


def run(*command: object, **environment: str) -> None:
    subprocess.run([str(part) for part in command], check=True, env={**os.environ, **environment})


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    compiler = os.environ.get("CXX", "g++")
    asan = subprocess.run(
        [compiler, "-print-file-name=libasan.so"], capture_output=True, text=True, check=True
    ).stdout.strip()
    ubsan = subprocess.run(
        [compiler, "-print-file-name=libubsan.so"], capture_output=True, text=True, check=True
    ).stdout.strip()
    cxx = subprocess.run(
        [compiler, "-print-file-name=libstdc++.so"], capture_output=True, text=True, check=True
    ).stdout.strip()
    with tempfile.TemporaryDirectory() as folder:
        build, copied = Path(folder) / "build", Path(folder) / "tree"
        run(
            "cmake",
            "-S",
            ROOT,
            "-B",
            build,
            f"-DPython_EXECUTABLE={sys.executable}",
            "-DCMAKE_BUILD_TYPE=RelWithDebInfo",
            f"-DCMAKE_CXX_FLAGS={FLAGS}",
            f"-DCMAKE_SHARED_LINKER_FLAGS={FLAGS}",
            f"-DCMAKE_MODULE_LINKER_FLAGS={FLAGS}",
        )
        run("cmake", "--build", build)
        for name in ("src", "tests"):
            shutil.copytree(ROOT / name, copied / name)
        shutil.copy2(ROOT / "pyproject.toml", copied)
        if (ROOT / ".models").exists():
            (copied / ".models").symlink_to((ROOT / ".models").resolve())
        for old in (copied / "src" / "leangrid" / "kernels").glob("_cpu*.so"):
            old.unlink()
        (extension,) = build.glob("_cpu*.so")
        shutil.copy2(extension, copied / "src" / "leangrid" / "kernels")
        os.chdir(copied)
        sanitizers = {"LD_PRELOAD": f"{asan} {ubsan} {cxx}", "ASAN_OPTIONS": ASAN, "PYTHONMALLOC": "malloc",
                      "UBSAN_OPTIONS": "print_stacktrace=1:halt_on_error=1"}  # fmt: skip
        run(
            sys.executable, "-m", "pytest", "-q", "-x", "-m", "not slow", "-p", "no:cacheprovider", *TESTS, **sanitizers
        )


if __name__ == "__main__":
    main()
