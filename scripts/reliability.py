"""Writes the table of docs/reliability.md: each fault, and the tests that cover it.

    python scripts/reliability.py

A test names the faults it covers by ``@pytest.mark.fault("C1")``, or by ``pytestmark`` for its whole file.
tests/test_reliability.py compares the page with the markers.
"""

import argparse
import ast
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "reliability.md"

FAULTS: dict[str, str] = {
    "C1": "killed at any write, fsync, rename, commit or publish",
    "C2": "killed at random times",
    "C3": "power loss: unsynced bytes and names are gone, torn, or kept",
    "C4": "SIGTERM, Ctrl-C, preemption",
    "C5": "disk full in the middle",
    "C6": "too little disk, known up front",
    "C7": "the output exists, is the source, or lies in it",
    "C8": "two processes on one output",
    "C9": "read-only directory, I/O errors",
    "C10": "rename across file systems",
    "C11": "journal damaged between two runs",
    "C12": "resumed with another recipe, model, calibration, version",
    "C13": "resumed with other threads or another device",
    "C14": "clock jumps, no terminal, closed output, locale",
    "S1": "truncated shard, trailing bytes, holes, overlaps",
    "S2": "hostile header: size, nesting, duplicate keys",
    "S3": "index that leads elsewhere",
    "S4": "index and shards that disagree",
    "S5": "pickled weights",
    "S6": "custom code in the config",
    "S7": "config that does not belong to the tensors",
    "S8": "absurd config",
    "S9": "unknown architecture",
    "S10": "NaN, infinite, zero, constant and huge weights",
    "S11": "already quantized input",
    "S12": "tokenizer missing, or another model's",
    "S13": "source changed during the run",
    "S14": "odd shapes, groups that do not divide, biases, Conv1D",
    "S15": "a GGUF file whose meaning a reader could lose",
    "S16": "no checkpoint but something like it: Git LFS pointers, adapters, quantized weights, prefixes",
    "S17": "a tied flag and the heads that are stored",
    "S18": "tensors beyond the model: further heads, layers that predict more tokens",
    "S19": "mixed, wide, 8-bit and integer dtypes",
    "N1": "a layer that saw no tokens",
    "N2": "an expert with few tokens or none",
    "N3": "one token, an empty batch, inputs of any rank",
    "N4": "dead input channels",
    "N5": "rank-deficient, indefinite, ill-conditioned Hessian",
    "N6": "NaN and infinite activations",
    "N7": "overflow of 16-bit floats in late blocks",
    "N8": "degenerate k-means: ties, fewer values than levels",
    "N9": "a layer worse than rounding",
    "N10": "blocked solver against the exact one",
    "N11": "range of codes, scales, zero points",
    "N12": "order of batches, merged sums",
    "N13": "too little text, rows without text, columns or templates that are not known, padding, encodings",
    "N14": "same recipe, same bytes",
    "R1": "out of memory in a block",
    "R2": "the kernel's OOM killer",
    "R3": "peak memory known before the start",
    "R4": "a worker or rank dies or hangs",
    "R5": "ranks that disagree",
    "R6": "leak over blocks",
    "O1": "packing at any bits and shape",
    "O2": "foreign readers see the same weights",
    "O3": "a grid that the container cannot hold",
    "O4": "published directory changed later",
    "O5": "damaged result is loaded",
    "O6": "edges of the kernels' shapes",
    "O7": "no compiler, no Triton, old processor",
    "O8": "a result that is simply wrong",
    "O9": "side files that lead elsewhere, code",
    "O10": "plots or model card fail",
    "O11": "a fault of our own reader",
}

# No test yet, and why.
OPEN: dict[str, str] = {}


def read_markers() -> dict[str, list[tuple[str, str]]]:
    """Fault id -> (file under tests/, test name), in the order of files and lines."""
    found: dict[str, list[tuple[str, str]]] = {}
    for path in sorted((ROOT / "tests").rglob("test_*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        everywhere = [
            i
            for node in tree.body
            if isinstance(node, ast.Assign) and _named(node, "pytestmark")
            for i in _ids(node.value)
        ]
        for node in tree.body:
            if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
                for fault in dict.fromkeys(
                    [*(i for decorator in node.decorator_list for i in _ids(decorator)), *everywhere]
                ):
                    found.setdefault(fault, []).append((path.relative_to(ROOT / "tests").as_posix(), node.name))
    return found


def _named(node: ast.Assign, name: str) -> bool:
    return any(isinstance(target, ast.Name) and target.id == name for target in node.targets)


def _ids(node: ast.AST) -> list[str]:
    calls = (
        n
        for n in ast.walk(node)
        if isinstance(n, ast.Call) and isinstance(n.func, ast.Attribute) and n.func.attr == "fault"
    )
    return [argument.value for call in calls for argument in call.args if isinstance(argument, ast.Constant)]


def render_table() -> str:
    """The rows of the page."""
    tests = read_markers()
    lines = ["| | fault | tests |", "| --- | --- | --- |"]
    for fault, name in FAULTS.items():
        by_file: dict[str, list[str]] = {}
        for file, test in tests.get(fault, []):
            by_file.setdefault(file, []).append(test.removeprefix("test_"))
        cells = [f"[{Path(file).stem}](../tests/{file}): {', '.join(names)}" for file, names in by_file.items()]
        reason = f"open: {OPEN.get(fault, 'nobody has said why')}"
        lines.append(f"| {fault} | {name} | {'<br>'.join(cells) or reason} |")
    return "\n".join(lines)


def render_page() -> str:
    """docs/reliability.md with today's table."""
    text = PAGE.read_text(encoding="utf-8")
    return re.sub(r"(?s)(<!-- faults -->\n).*?(\n<!-- end -->)", lambda m: m[1] + render_table() + m[2], text, count=1)


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    PAGE.write_text(render_page(), encoding="utf-8")
    print(f"{PAGE.relative_to(ROOT)}: {len(FAULTS) - len(OPEN)} of {len(FAULTS)} faults have tests")
