"""The rules of ARCHITECTURE.md, read from its own table and held by ast: folders, arrows, fences, lengths.

``python tests/test_architecture.py [SRC]`` counts: files at the top, folders, arrows between files, arrows between
folders."""

import ast
import json
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
    "transformers": (
        *("models/", "data/"),
        *("inference/load.py", "inference/transformers_quantizer.py", "inference/result_renaming.py"),
    ),
    "tokenizers": ("models/", "data/"),
    "matplotlib": (),
    "jinja2": ("report/",),
    "typer": ("cli/",),
    "vllm": ("inference/vllm_linear.py",),
    "onnx": ("exporters/onnx_model.py",),
    "mlx_lm": ("planning/mlx_lm.py",),
    "lm_eval": ("evaluation/tasks/harness.py",),
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
MATH_IMPORTS |= {"types", "typing"}
MATHEMATICS = ("kernels", "grids", "solve")
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


def folders() -> dict[str, list[str]]:
    """``folder -> its files`` from the table in ARCHITECTURE.md, lowest first; "" is the top."""
    text = (ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(?:leangrid/)?([a-z/]*?)/?` \|[^|]*\| ([^|]*) \|$", text, re.MULTILINE)
    return {folder: re.findall(r"[\w.]+", names) for folder, names in rows}


FOLDERS = folders()
ORDER = {folder: position for position, folder in enumerate(dict.fromkeys(name.partition("/")[0] for name in FOLDERS))}
ENTRANCES = ("__init__.py", "__main__.py")  # of the package: they lead to everything


def folder_of(file: str) -> str:
    """The first folder that ``file`` lies in; "" at the top."""
    return file.partition("/")[0] if "/" in file else ""


def dotted(node: ast.AST) -> str:
    """``os.path.join`` of a call's function, or "" where it is no plain name."""
    if isinstance(node, ast.Attribute):
        base = dotted(node.value)
        return f"{base}.{node.attr}" if base else ""
    return node.id if isinstance(node, ast.Name) else ""


def imported(tree: ast.AST) -> set[str]:
    """Every module that is imported anywhere in a file, as full dotted names (``from a import b`` gives a and a.b)."""
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: imports are absolute here"
            found |= {node.module or ""} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def targets(tree: ast.AST, files: set[str]) -> set[str]:
    """Of the package's ``files`` those that a file imports."""
    names = {name.removeprefix("leangrid.") for name in imported(tree) if name.startswith("leangrid.")}
    paths = {name.replace(".", "/") for name in names}
    return {path + tail for path in paths for tail in (".py", "/__init__.py")} & files


def ours(file: str) -> set[str]:
    """The files of this package that ``file`` imports."""
    return targets(TREES[file], set(FILES)) - {file}


def test_the_table_names_every_file_and_no_other() -> None:
    there: dict[str, set[str]] = {}
    for file in FILES:
        there.setdefault(Path(file).parent.as_posix().removeprefix("."), set()).add(Path(file).stem)
    for folder, files in there.items():
        named = set(FOLDERS.get(folder, [])) | ({"__init__"} if folder else set())
        assert named == files, f"{folder or 'the top'}: {sorted(named ^ files)}"
    assert FOLDERS.keys() == there.keys()


def test_what_lies_at_the_top_is_for_everybody() -> None:
    tops = [file for file in FILES if "/" not in file and file not in ENTRANCES]
    users = {file: [other for other in FILES if file in ours(other)] for file in tops}
    for file in tops:
        through = [user for top in users[file] if top in tops for user in users[top]]  # recipe.py's own helper, say
        served = {folder_of(user) for user in (*users[file], *through)} - {""}
        assert len(served) > 2, f"{file} is for {sorted(served)}: it belongs there"


@pytest.mark.parametrize("file", FILES)
def test_arrows_point_down(file: str) -> None:
    if file in ENTRANCES:
        return
    above = [other for other in ours(file) if other in ENTRANCES or ORDER[folder_of(other)] > ORDER[folder_of(file)]]
    assert not above, f"{file} imports from a higher folder"


def test_no_circles() -> None:
    # A package's __init__ may gather its own files, which may name it; a circle between folders or modules is a fault.
    graph = {
        file: {o for o in ours(file) if not (o.endswith("__init__.py") and Path(o).parent == Path(file).parent)}
        for file in FILES
    }
    TopologicalSorter(graph).prepare()


@pytest.mark.parametrize("file", FILES)
def test_imports_stay_behind_their_fences(file: str) -> None:
    tops = {name.split(".")[0] for name in imported(TREES[file])} - {"leangrid"}
    for module, homes in ONLY_IN.items():
        assert module not in tops or file.startswith(homes), f"{module} belongs in {homes or 'no file'}"
    if folder_of(file) in MATHEMATICS:
        allowed = KERNEL_IMPORTS if folder_of(file) == "kernels" else MATH_IMPORTS
        assert tops - {"triton"} <= allowed, "mathematics: tensors in, tensors out"


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


def counts(source: Path) -> dict[str, int]:
    """What the folders of a package ``leangrid`` in ``source`` look like, in numbers."""
    trees = {path.relative_to(source).as_posix(): ast.parse(path.read_text()) for path in source.rglob("*.py")}
    inside = set(trees) - set(ENTRANCES)
    arrows = {(file, other) for file in inside for other in targets(trees[file], inside) if other != file}
    between = {(folder_of(a), folder_of(b)) for a, b in arrows if folder_of(a) != folder_of(b)}
    return {
        "files": len(trees),
        "files at the top": sum("/" not in file for file in trees),
        "folders": len({folder_of(file) for file in trees} - {""}),
        "arrows between files": len(arrows),
        "arrows between folders": len(between),
        "pairs of folders that import each other": sum((b, a) in between for a, b in between) // 2,
    }


if __name__ == "__main__":
    print(json.dumps(counts(Path(sys.argv[1]) if sys.argv[1:] else SRC)))
