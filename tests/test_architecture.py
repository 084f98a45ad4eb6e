"""The house rules of ARCHITECTURE.md, read from its own tree and held by ast: floors, arrows, fences, lengths."""

import ast
import re
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SRC = ROOT / "src" / "leangrid"
TREES = {
    path.relative_to(SRC).as_posix(): ast.parse(path.read_text(encoding="utf-8")) for path in sorted(SRC.rglob("*.py"))
}
FILES = list(TREES)

# Longer than the rule, each with its reason.
LONG_FILES: dict[str, str] = {}
LONG_FUNCTIONS: dict[str, str] = {}

ONLY_IN = {
    "triton": ("kernels/triton/",),
    "transformers": ("models/", "data/", "load.py", "hf_quantizer.py"),
    "tokenizers": ("models/", "data/", "load.py", "hf_quantizer.py"),
    "matplotlib": ("report/",),
    "jinja2": ("report/",),
    "vllm": ("vllm_plugin.py", "vllm_linear.py"),
    "onnx": ("onnx_export.py",),
    "lm_eval": ("evaluate/harness.py",),
    "pickle": (),
    "marshal": (),
    "shelve": (),
    "dill": (),
    "joblib": (),
}
MATH_IMPORTS = {
    "torch",
    "jaxtyping",
    "numpy",
    "math",
    "abc",
    "collections",
    "contextlib",
    "dataclasses",
    "enum",
    "functools",
    "itertools",
}
MATH_IMPORTS |= {"time", "types", "typing"}
KERNEL_IMPORTS = MATH_IMPORTS | {"os", "warnings", "importlib"}  # which build runs is chosen by the environment
FORBIDDEN_CALLS = {"eval", "exec", "torch.load", "pickle.load", "pickle.loads", "os.system", "os.popen"}
WRITING_CALLS = {
    "os.replace",
    "os.rename",
    "os.open",
    "os.write",
    "os.remove",
    "os.unlink",
    "os.truncate",
    "torch.save",
    "save_file",
}
WRITING_METHODS = {"write_text", "write_bytes", "touch", "unlink", "rmdir", "mkdir", "symlink_to", "hardlink_to"}


def floors() -> dict[str, int]:
    """``file -> floor`` from the tree in ARCHITECTURE.md; braces name several files."""
    found: dict[str, int] = {}
    text = (ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8").split("```")[1]
    for name, floor in re.findall(r"^  (\S+)\s+(\d)  \S", text, re.MULTILINE):
        head, _, rest = name.partition("{")
        names, _, tail = rest.partition("}")
        found |= {head + part + tail: int(floor) for part in names.split(",")}
    return found


FLOORS = floors()


def dotted(node: ast.AST) -> str:
    """``os.path.join`` of a call's function, or "" where it is no plain name."""
    if isinstance(node, ast.Attribute):
        base = dotted(node.value)
        return f"{base}.{node.attr}" if base else ""
    return node.id if isinstance(node, ast.Name) else ""


def imports(file: str) -> set[str]:
    """Every module a file imports, anywhere in it, as full dotted names (``from a import b`` gives a and a.b)."""
    found: set[str] = set()
    for node in ast.walk(TREES[file]):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}:{node.lineno}: imports are absolute here"
            found |= {node.module or ""} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def ours(file: str) -> set[str]:
    """The files of this package that ``file`` imports."""
    paths = {name.removeprefix("leangrid.").replace(".", "/") for name in imports(file) if name.startswith("leangrid.")}
    return {path + tail for path in paths for tail in (".py", "/__init__.py")} & set(FILES) - {file}


def test_the_tree_names_every_file() -> None:
    assert sorted(FLOORS) == sorted(FILES)


@pytest.mark.parametrize("file", FILES)
def test_arrows_point_down(file: str) -> None:
    above = [other for other in ours(file) if FLOORS.get(other, 0) > FLOORS.get(file, 9)]
    assert not above, f"{file} imports from a higher floor"


def test_no_circles() -> None:
    # A package's __init__ may gather its own files, which may name it; a circle between folders or modules is a fault.
    graph = {
        file: {o for o in ours(file) if not (o.endswith("__init__.py") and Path(o).parent == Path(file).parent)}
        for file in FILES
    }
    TopologicalSorter(graph).prepare()


@pytest.mark.parametrize("file", FILES)
def test_imports_stay_behind_their_fences(file: str) -> None:
    tops = {name.split(".")[0] for name in imports(file)} - {"leangrid"}
    for module, homes in ONLY_IN.items():
        assert module not in tops or file.startswith(homes), f"{module} belongs in {homes or 'no file'}"
    if FLOORS.get(file) in (1, 2):
        assert tops - {"triton"} <= (KERNEL_IMPORTS if FLOORS[file] == 1 else MATH_IMPORTS), (
            "mathematics: tensors in, tensors out"
        )


@pytest.mark.parametrize("file", FILES)
def test_calls_stay_behind_their_fences(file: str) -> None:
    for node in ast.walk(TREES[file]):
        where = f"{file}:{getattr(node, 'lineno', 0)}"
        if isinstance(node, ast.Call):
            name = dotted(node.func)
            assert name not in FORBIDDEN_CALLS, where
            for keyword in node.keywords:
                unsafe = keyword.arg in ("shell", "trust_remote_code") and not (
                    isinstance(keyword.value, ast.Constant) and keyword.value.value is False
                )
                assert not unsafe, f"{where}: {keyword.arg}"
            if file != "storage/files.py":
                method = node.func.attr if isinstance(node.func, ast.Attribute) else ""
                assert not name.startswith("shutil.") or method in ("disk_usage", "get_terminal_size", "which"), (
                    f"{where}: {name}"
                )
                assert name not in WRITING_CALLS and method not in WRITING_METHODS, (
                    f"{where}: only storage/files.py writes"
                )
                assert not opens_for_writing(node), f"{where}: only storage/files.py writes"
        elif isinstance(node, ast.ExceptHandler):
            assert node.type is not None, f"{where}: a bare except"
            signal = dotted(node.type).startswith("_")  # a module's own private signal, raised and caught in one file
            silent = all(isinstance(step, ast.Pass | ast.Continue) for step in node.body) and not signal
            assert not silent, (
                f"{where}: an except that only passes hides a failure; contextlib.suppress says so openly"
            )
        else:
            assert not isinstance(node, ast.Assert), f"{where}: python -O removes asserts; raise an error"


def opens_for_writing(node: ast.Call) -> bool:
    """``open(path, mode)`` with a mode that is not plainly reading, or ``path.open(mode)`` with one that writes."""
    method = isinstance(node.func, ast.Attribute) and node.func.attr == "open"
    if not (method or dotted(node.func) == "open"):
        return False
    given = node.args[0 if method else 1 :][:1] + [k.value for k in node.keywords if k.arg == "mode"]
    modes = [mode.value if isinstance(mode, ast.Constant) else None for mode in given]
    writes = [
        bool(re.fullmatch("[rwaxbt+]*[wax+][rwaxbt+]*", mode)) if isinstance(mode, str) else not method
        for mode in modes
    ]
    return any(writes)


def test_files_and_functions_are_short() -> None:
    for file, tree in TREES.items():
        lines = len((SRC / file).read_text(encoding="utf-8").splitlines())
        assert lines <= 400 or file in LONG_FILES, f"{file}: {lines} lines"
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                length = (node.end_lineno or 0) - node.lineno + 1
                assert length <= 60 or f"{file}:{node.name}" in LONG_FUNCTIONS, f"{file}:{node.name}: {length} lines"


def test_import_leangrid_stays_light() -> None:
    heavy = {"triton", "transformers", "matplotlib", "datasets"}
    program = (
        f"import sys; before = set(sys.modules); import leangrid; print(*sorted((set(sys.modules) - before) & {heavy}))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, env=environment()
    )
    assert done.stdout.split() == []


def environment() -> dict[str, str]:
    import os

    return {**os.environ, "PYTHONPATH": str(ROOT / "src")}
