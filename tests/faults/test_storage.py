"""Crashes, full and broken disks, directories of others: finished blocks stay, and OUT is absent or complete."""

import errno
import json
import os
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_run import BLOCKS, CONFIG, digest, identity, run, write_source

from leangrid.errors import Interrupted, OutputError, ResumeError, VerifyError
from leangrid.recipe import Recipe
from leangrid.run.quantize import quantize
from leangrid.storage import disk, failpoints, files, manifest, writer
from leangrid.storage.journal import Journal, partial_of
from leangrid.storage.manifest import amend_result, list_differences
from leangrid.storage.source import open_source
from leangrid.storage.writer import check_output_path

ROOT = Path(__file__).resolve().parents[2]
STORAGE = ROOT / "src" / "leangrid" / "storage"
FAILPOINTS = sorted(
    {name for path in STORAGE.glob("*.py") for name in re.findall(r'failpoint\("([\w.]+)"\)', path.read_text())}
    - {"name"}
)


@pytest.fixture
def fast(in_memory: Path) -> Path:
    """These tests sync thousands of files, and none of them cuts the power."""
    return in_memory


@pytest.fixture
def source(fast: Path) -> Path:
    return write_source(fast / "source")


@pytest.fixture
def expected(source: Path, fast: Path) -> dict[str, str]:
    """The bytes of an undisturbed run."""
    run(source, fast / "expected")
    return digest(fast / "expected")


def environment() -> dict[str, str]:
    return {
        **os.environ,
        "PYTHONPATH": f"{ROOT / 'src'}{os.pathsep}{ROOT / 'tests' / 'support'}",
        "OMP_NUM_THREADS": "1",
    }


def leftovers(out: Path) -> list[str]:
    """Temporaries and locks that a finished or stopped process must not leave."""
    return [p.name for p in partial_of(out).rglob("*") if p.name.endswith(".tmp") or p.name == "LOCK"]


def half_done(source: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Stop a run before it publishes; the journal then holds every block. Returns OUT.partial."""
    with monkeypatch.context() as patch:
        failpoints.reset()
        patch.setenv("LEANGRID_FAILPOINT", "publish.before_manifest:1:raise:SIGINT")
        with pytest.raises(KeyboardInterrupt):
            run(source, out)
    return partial_of(out)


class Disk:
    """Stands for the ``os`` module in storage/files.py: counts calls of one operation and fails the n-th, once or from
    then on."""

    def __init__(self, operation: str, number: int, code: int, always: bool = False) -> None:
        self.operation, self.number, self.code, self.always, self.calls = operation, number, code, always, 0

    def __getattr__(self, name: str) -> Any:
        return self._failing if name == self.operation else getattr(os, name)

    def _failing(self, *given: Any, **named: Any) -> Any:
        self.calls += 1
        if self.calls == self.number or (self.always and self.calls > self.number):
            raise OSError(self.code, os.strerror(self.code))
        return getattr(os, self.operation)(*given, **named)


# C1, C4: killed, interrupted
# -----------------------------------------------------------------------------------------------------------


@pytest.mark.fault("C1")
@pytest.mark.parametrize("options", [[], pytest.param(["--overwrite"], marks=pytest.mark.slow)])
def test_killed_at_every_failpoint(source: Path, fast: Path, options: list[str]) -> None:
    work = fast / "work"
    work.mkdir()
    command = [sys.executable, str(ROOT / "tests" / "support" / "tiny_run.py"), str(source), str(work), *options]
    done = subprocess.run(command, capture_output=True, text=True, env=environment(), timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    report = json.loads(done.stdout)
    assert report["problems"] == []
    assert report["failpoints"] > 150
    assert report["published_then_killed"] > 5  # the kills between the last rename and the end were among them


@pytest.mark.fault("C2")
@pytest.mark.fault("R2")
@pytest.mark.parametrize(
    ("kind", "kills", "seed"), [("storage", 30, 0), pytest.param("storage", 500, 1, marks=pytest.mark.slow),
                                pytest.param("quantize", 500, 2, marks=pytest.mark.slow)],
)  # fmt: skip
def test_killed_at_random_times(fast: Path, kind: str, kills: int, seed: int) -> None:
    command = [
        sys.executable,
        str(ROOT / "tests" / "support" / "random_kills.py"),
        kind,
        str(fast),
        str(kills),
        str(seed),
    ]
    done = subprocess.run(command, capture_output=True, text=True, env=environment(), timeout=3600)
    assert done.returncode == 0, done.stderr[-2000:]
    report = json.loads(done.stdout)
    assert report["problems"] == []
    assert report["kills"] >= kills


@pytest.mark.fault("C1")
@pytest.mark.parametrize("name", FAILPOINTS)
def test_every_failpoint_is_passed(source: Path, fast: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A failpoint that no run passes would make the crash test blind to what it guards."""
    failpoints.reset()
    monkeypatch.setenv("LEANGRID_FAILPOINT", f"{name}:1:raise:EIO")
    with pytest.raises((OutputError, OSError)) as caught:
        run(source, fast / "out")
    assert name in str(caught.value) or isinstance(caught.value.__cause__, OSError)


@pytest.mark.fault("C4")
@pytest.mark.parametrize("stride", [7, pytest.param(1, marks=pytest.mark.slow)])
def test_interrupted_at_every_failpoint(
    source: Path, fast: Path, expected: dict[str, str], stride: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C: no temporary and no lock stay, nothing half is committed, the same run ends with the same bytes."""
    for n in range(1, 1000, stride):
        out = fast / "out"
        failpoints.reset()
        with monkeypatch.context() as patch:
            patch.setenv("LEANGRID_FAILPOINT", f"*:{n}:raise:SIGINT")
            try:
                run(source, out)
                break
            except KeyboardInterrupt:
                assert leftovers(out) == []
        if not out.exists():
            run(source, out)
        assert digest(out) == expected
        shutil.rmtree(out)
        shutil.rmtree(partial_of(out), ignore_errors=True)
    assert n > 150


@pytest.mark.fault("C3")
def test_nothing_gets_its_name_before_it_is_durable(source: Path, fast: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The protocol, read off a run: write, fsync, rename, fsync of the directory; and a block's .json only after all of
    that."""
    log: list[tuple[str, str]] = []
    names: dict[int, str] = {}

    class Recorder:
        def __getattr__(self, name: str) -> Any:
            real = getattr(os, name)
            if name not in ("open", "write", "fsync", "replace"):
                return real

            def recorded(*given: Any, **named: Any) -> Any:
                result = real(*given, **named)
                if name == "open":
                    names[result] = str(given[0])
                elif name == "replace":
                    log.append(("replaced", str(given[0])))
                    log.append(("named", str(given[1])))
                else:
                    log.append((name, names[given[0]]))
                return result

            return recorded

    monkeypatch.setattr(files, "os", Recorder())
    run(source, fast / "out")
    renamed = [(i, path) for i, (step, path) in enumerate(log) if step == "replaced"]
    assert len(renamed) > 10
    for i, temporary in renamed:
        target = Path(log[i + 1][1])
        if temporary.endswith(".tmp"):
            steps = [step for step, path in log[:i] if path == temporary]
            assert steps and steps[-1] == "fsync" and "write" in steps
        assert log[i + 2] == ("fsync", str(target.parent))
    order = [Path(path).name for step, path in log if step == "named"]
    assert (
        order.index("0000.safetensors") < order.index("0000.json") < order.index("manifest.json") < order.index("out")
    )


# C5, C9, C10: the disk
# -----------------------------------------------------------------------------------------------------------------


@pytest.mark.fault("C5")
def test_disk_full_at_every_write(
    source: Path, fast: Path, expected: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for n in range(1, 1000):
        out, disk = fast / "out", Disk("write", n, errno.ENOSPC)
        with monkeypatch.context() as patch:
            patch.setattr(files, "os", disk)
            try:
                run(source, out)
                break
            except OutputError as error:
                assert error.exit_code == 3
                assert re.search(r"No space left on device; it needs \d+ bytes, .* free", str(error))
                assert str(partial_of(out)) in str(error)
                assert leftovers(out) == []
        assert not out.exists()
        run(source, out)
        assert digest(out) == expected
        shutil.rmtree(out)
    assert n > 15


@pytest.mark.fault("C5")
def test_a_file_size_limit_reads_like_a_full_disk(source: Path, fast: Path) -> None:
    program = """
import resource, sys
from pathlib import Path
from leangrid.errors import OutputError
from tiny_run import run
resource.setrlimit(resource.RLIMIT_FSIZE, (400, 400))
try:
    run(Path(sys.argv[1]), Path(sys.argv[2]))
except OutputError as error:
    print(error.exit_code, error)
"""
    done = subprocess.run(
        [sys.executable, "-c", program, str(source), str(fast / "out")],
        capture_output=True,
        text=True,
        env=environment(),
        timeout=60,
    )
    assert done.stdout.startswith("3 cannot write the file: File too large; it needs "), done.stderr
    assert leftovers(fast / "out") == []
    run(source, fast / "out")
    assert list_differences(fast / "out") == []


@pytest.mark.fault("C6")
def test_too_little_space_is_refused_before_work(fast: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disk.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 0, 10**9))
    disk.require_space(fast / "not" / "yet" / "there", 950_000_000)
    with pytest.raises(OutputError, match=r"1029000000 bytes .* needed, 1000000000 bytes .* free"):
        disk.require_space(fast, 980_000_000)


@pytest.mark.fault("C6")
def test_a_run_that_would_fill_the_disk_does_not_begin(
    tiny: Callable[..., Path], fast: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(disk.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9 - 10**5, 10**5))
    with pytest.raises(
        OutputError, match=r"not enough disk space: about \d+ bytes needed, 100000 bytes free"
    ) as caught:
        quantize(tiny("llama2"), fast / "out", Recipe(scheme="NU4"), windows=torch.ones(1, 16, dtype=torch.int64))
    assert caught.value.exit_code == 2 and list(fast.iterdir()) == []


@pytest.mark.fault("C9")
@pytest.mark.parametrize("always", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    ("operation", "code"),
    [("open", errno.EACCES), ("fsync", errno.EIO), ("replace", errno.EPERM), ("write", errno.EIO)],
)
def test_every_operation_may_fail(
    source: Path,
    fast: Path,
    expected: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
    operation: str,
    code: int,
    always: bool,
) -> None:
    """One of our errors naming the path each time, never a traceback's worth; afterwards the same run ends with the
    same bytes."""
    for n in range(1, 1000):
        out, disk = fast / "out", Disk(operation, n, code, always)
        with monkeypatch.context() as patch:
            patch.setattr(files, "os", disk)
            try:
                run(source, out)
                break
            except OutputError as error:
                assert os.strerror(code) in str(error) and str(out) in str(error)
        if not out.exists():
            run(source, out)
        assert digest(out) == expected
        shutil.rmtree(out)
        shutil.rmtree(partial_of(out), ignore_errors=True)
    assert n > 12


@pytest.mark.fault("C9")
@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_read_only_directory(source: Path, fast: Path) -> None:
    (fast / "closed").mkdir(mode=0o555)
    with pytest.raises(OutputError, match="cannot make the directory: Permission denied") as caught:
        run(source, fast / "closed" / "out")
    assert caught.value.exit_code == 2


@pytest.mark.fault("C9")
def test_unreadable_block_while_publishing(
    source: Path, fast: Path, expected: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(path: Path, start: int = 0, length: int | None = None) -> Iterator[memoryview]:
        raise files.SourceReadError(errno.EIO, "Input/output error", str(path))
        yield

    with monkeypatch.context() as patch:
        patch.setattr("leangrid.storage.safetensors.read_chunks", broken)
        with pytest.raises(Interrupted, match=r"cannot read: Input/output error .*safetensors"):
            run(source, fast / "out")
    run(source, fast / "out")
    assert digest(fast / "out") == expected


@pytest.mark.fault("C10")
def test_rename_across_file_systems(source: Path, fast: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "os", Disk("replace", 1, errno.EXDEV, always=True))
    with pytest.raises(OutputError, match="another file system"):
        run(source, fast / "out")


# C7, C8: other people's directories
# ----------------------------------------------------------------------------------------------------


def tree(directory: Path) -> dict[str, bytes]:
    return {str(p.relative_to(directory)): p.read_bytes() for p in sorted(directory.rglob("*")) if p.is_file()}


@pytest.mark.fault("C7")
@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize(
    "place",
    [
        "source",
        "source/",
        "source/inner",
        "source/a/../inner",
        "other/../source",
        "link",
        "link/inner",
        "dangling",
        "file",
        "file/inner",
        "full",
        "source_parent",
        "/",
        ".",
        "..",
        "source/..",
        "impostor",
        "upper/..",
    ],
)
def test_outputs_that_are_refused(fast: Path, place: str, overwrite: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write_source(fast / "source_parent" / "source")
    (fast / "other").mkdir()
    (fast / "source").symlink_to(source)
    (fast / "link").symlink_to(fast / "source")
    (fast / "dangling").symlink_to(fast / "nowhere")
    (fast / "file").write_text("mine")
    (fast / "full").mkdir()
    (fast / "full" / "thesis.tex").write_text("mine")
    (fast / "impostor").mkdir()
    (fast / "impostor" / "manifest.json").write_text('{"files": {}, "seal": "0"}')
    monkeypatch.chdir(fast)
    before = tree(fast)
    for start in (fast, Path(".")):
        with pytest.raises(OutputError) as caught:
            run(source, start / place, overwrite=overwrite)
        assert caught.value.exit_code == 2
    assert tree(fast) == before
    assert not list(fast.rglob("*.partial"))


@pytest.mark.fault("C7")
def test_outputs_that_are_accepted(source: Path, fast: Path, expected: dict[str, str]) -> None:
    run(source, fast / "new" / "deep" / "out")
    assert digest(fast / "new" / "deep" / "out") == expected
    (fast / "empty").mkdir()
    run(source, fast / "empty")
    (fast / "empty" / "extra").write_text("overwriting replaces the whole directory")
    with pytest.raises(OutputError, match="--overwrite"):
        run(source, fast / "empty")
    run(source, fast / "empty", overwrite=True)
    assert digest(fast / "empty") == expected


@pytest.mark.fault("C7")
def test_an_output_that_appears_during_the_run_is_not_touched(
    source: Path, fast: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = fast / "out"
    real = writer._replace

    def late(*given: Any) -> None:
        out.mkdir()
        (out / "thesis.tex").write_text("mine")
        real(*given)

    monkeypatch.setattr(writer, "_replace", late)
    with pytest.raises(OutputError) as caught:
        run(source, out)
    assert caught.value.exit_code == 3
    assert tree(out) == {"thesis.tex": b"mine"}


@pytest.mark.fault("C7")
def test_a_partial_directory_of_somebody_else(source: Path, fast: Path) -> None:
    (fast / "out.partial").mkdir()
    (fast / "out.partial" / "thesis.tex").write_text("mine")
    for restart in (False, True):
        with pytest.raises(OutputError, match=r"thesis\.tex"):
            run(source, fast / "out", restart=restart)
    assert tree(fast / "out.partial") == {"thesis.tex": b"mine"}


@pytest.mark.fault("C8")
def test_two_processes_and_a_killed_owner(source: Path, fast: Path, expected: dict[str, str]) -> None:
    out = fast / "out"
    program = (
        "import sys; from pathlib import Path; from tiny_run import run; run(Path(sys.argv[1]), Path(sys.argv[2]))"
    )
    owner = subprocess.Popen(
        [sys.executable, "-c", program, str(source), str(out)],
        env={**environment(), "LEANGRID_FAILPOINT": "journal.after_state:1:sleep:60"},
    )
    try:
        while not (partial_of(out) / "state" / "0001.json").exists():
            assert owner.poll() is None
            os.sched_yield()
        with pytest.raises(OutputError) as caught:
            run(source, out)
        assert f"process {owner.pid} on {socket.gethostname()}" in str(caught.value)
        assert caught.value.exit_code == 2
        with pytest.raises(OutputError, match="at work"):
            run(source, out, restart=True)
        assert (partial_of(out) / "blocks" / "0000.json").exists()
    finally:
        owner.kill()
        owner.wait()
    with (
        open_source(source) as checkpoint,
        Journal.for_output(out).start_or_resume(identity(checkpoint.identity)) as journal,
    ):
        assert any(f"process {owner.pid}" in notice and "gone" in notice for notice in journal.notices)
        assert journal.find_resume_point() == 1
    run(source, out)
    assert digest(out) == expected


# C11, C12: the journal itself
# ----------------------------------------------------------------------------------------------------------


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def append(path: Path) -> None:
    with path.open("ab") as file:
        file.write(b"\0")


DAMAGES = [flip, truncate, append, Path.unlink]
JOURNAL_FILES = [
    f"{name}.{kind}"
    for name in ("blocks/0000", "blocks/0001", "state/0002", "named/windows")
    for kind in ("json", "safetensors")
]


@pytest.mark.fault("C11")
@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", JOURNAL_FILES)
def test_a_damaged_journal_is_not_trusted(
    source: Path,
    fast: Path,
    expected: dict[str, str],
    name: str,
    damage: Callable[[Path], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    partial = half_done(source, fast / "out", monkeypatch)
    damage(partial / name)
    run(source, fast / "out")
    assert digest(fast / "out") == expected
    assert not partial.exists()


@pytest.mark.fault("C11")
def test_blocks_after_a_damaged_one_are_dropped(source: Path, fast: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    partial = half_done(source, fast / "out", monkeypatch)
    flip(partial / "blocks" / "0000.safetensors")
    with open_source(source) as checkpoint, Journal(partial).start_or_resume(identity(checkpoint.identity)) as journal:
        assert journal.count_committed() == 0 and journal.find_resume_point() == 0
        assert any("blocks/0000.safetensors" in notice for notice in journal.notices)
        assert list((partial / "blocks").iterdir()) == []


@pytest.mark.fault("C12")
@pytest.mark.parametrize("field", sorted(Recipe.model_fields))
def test_another_recipe_is_another_run(fast: Path, field: str) -> None:
    """One field at a time, over all fields of Recipe, so that a new one cannot be forgotten."""
    other: dict[str, Any] = {
        "scheme": "NU3",
        "format": "lut",
        "calibration": "self",
        "search": "lloyd",
        "products": "float32",
        "effort": "fast",
        "layers": {"fc1": "W8A16"},
        "text_field": "body",
        "ignore": ["lm_head"],
        "only": ["*.q_proj"],
    }
    recipe = Recipe()
    value = getattr(recipe, field)
    changed = other[field] if field in other else not value if isinstance(value, bool) else (value or 0) + 1
    now = Recipe(**{field: changed})
    Journal(fast / "out.partial").start_or_resume(identity({}, recipe=recipe.model_dump())).close()
    with pytest.raises(ResumeError) as caught:
        Journal(fast / "out.partial").start_or_resume(identity({}, recipe=now.model_dump()))
    message = str(caught.value)
    assert f"recipe.{field}" in message and "--restart" in message
    then, asked = recipe.model_dump().get(field, "absent"), now.model_dump()[field]
    if isinstance(asked, dict):  # the first entry that differs is named
        then, asked = "absent", asked["fc1"]
    assert json.dumps(then) in message and json.dumps(asked) in message
    Journal(fast / "out.partial").start_or_resume(identity({}, recipe=now.model_dump()), restart=True).close()


@pytest.mark.fault("C12")
@pytest.mark.parametrize(
    ("field", "value"), [("version", "9.9"), ("format_version", 99), ("windows", "other"), ("new_field", 1)]
)
def test_another_version_or_calibration_is_another_run(
    source: Path, fast: Path, field: str, value: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    partial = half_done(source, fast / "out", monkeypatch)
    before = tree(partial)
    with pytest.raises(ResumeError, match=rf"another {field}: .*{value}.*--restart") as caught:
        run(source, fast / "out", **{field: value})
    assert caught.value.exit_code == 2
    assert tree(partial) == before
    run(source, fast / "out", restart=True, **{field: value})
    assert list_differences(fast / "out") == []


@pytest.mark.fault("C12")
def test_another_model_is_another_run(source: Path, fast: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    half_done(source, fast / "out", monkeypatch)
    (source / "config.json").write_text(json.dumps({**CONFIG, "vocab_size": 17}))
    with pytest.raises(ResumeError, match=r"source\.config"):
        run(source, fast / "out")
    write_source(
        source,
        weights={f"blocks.{i}.weight": torch.ones(8, 8) for i in range(BLOCKS)} | {"embed.weight": torch.ones(16, 8)},
    )
    with pytest.raises(ResumeError, match=r"source\.files\.model\.safetensors\.bytes"):
        run(source, fast / "out")


# O4, O9: the finished directory
# --------------------------------------------------------------------------------------------------------


@pytest.mark.fault("O4")
@pytest.mark.parametrize("damage", DAMAGES)
def test_verify_finds_any_damage_to_any_file(
    source: Path, fast: Path, expected: dict[str, str], damage: Callable[[Path], None]
) -> None:
    assert list_differences(fast / "expected") == []
    assert {"config.json", "manifest.json", "records.jsonl", "tokenizer.json", "model.safetensors.index.json"} < set(
        expected
    )
    for name in expected:
        copy = fast / "copy"
        shutil.copytree(fast / "expected", copy)
        damage(copy / name)
        differences = list_differences(copy)
        assert differences and differences[0].startswith(f"{name}: "), differences
        assert len(differences) == 1 or name == "manifest.json"  # a changed manifest may accuse others besides itself
        shutil.rmtree(copy)


@pytest.mark.fault("O4")
def test_verify_finds_every_changed_bit_of_the_manifest(source: Path, fast: Path, expected: dict[str, str]) -> None:
    path = fast / "expected" / "manifest.json"
    good = path.read_bytes()
    for at in range(0, len(good), 7):
        path.write_bytes(good[:at] + bytes([good[at] ^ 1]) + good[at + 1 :])
        assert list_differences(fast / "expected")
    path.write_bytes(good)
    assert list_differences(fast / "expected") == []


@pytest.mark.fault("O4")
def test_verify_finds_what_does_not_belong(source: Path, fast: Path, expected: dict[str, str]) -> None:
    out = fast / "expected"
    (out / "evil.py").write_text("")
    (out / "link").symlink_to("/")
    assert list_differences(out) == ["evil.py: not in the manifest", "link: not in the manifest"]
    (out / "evil.py").unlink()
    (out / "link").unlink()
    (out / "tokenizer.json").rename(out.parent / "moved")
    (out / "tokenizer.json").symlink_to(out.parent / "moved")
    assert list_differences(out) == ["tokenizer.json: a link, not a file"]
    with pytest.raises(VerifyError, match="no such directory"):
        list_differences(fast / "nowhere")
    assert list_differences(source) == ["manifest.json: missing, so this is not a finished leangrid result"]


@pytest.mark.fault("O4")
def test_a_hostile_manifest_leads_nowhere(fast: Path) -> None:
    (fast / "secret").write_text("secret")
    out = fast / "out"
    out.mkdir()
    entry = {"bytes": 6, "sha256": files.hash_file(fast / "secret")}
    body = {"files": {"../secret": entry, str(fast / "secret"): entry, "a/b/c/d/e/f/g": entry, "x": 3}}
    (out / "manifest.json").write_bytes(files.json_bytes(manifest.seal(body)))
    differences = list_differences(out)
    assert len(differences) == 4 and all("not a plain file name" in difference for difference in differences)
    for text in ("[]", "3", '{"files": []}', '{"files": 3, "seal": 1}', "[" * 100_000, "\xff"):
        (out / "manifest.json").write_bytes(text.encode("latin-1"))
        assert list_differences(out)


@pytest.mark.fault("O4")
def test_amended_files_are_in_the_manifest(source: Path, fast: Path, expected: dict[str, str]) -> None:
    amend_result(fast / "expected", {"report.html": b"first"})
    amend_result(fast / "expected", {"report.html": b"second"})
    assert list_differences(fast / "expected") == []
    assert (fast / "expected" / "report.html").read_bytes() == b"second"
    check_output_path(fast / "expected", source, overwrite=True)
    with pytest.raises(VerifyError):
        amend_result(source, {"report.html": b"not ours"})


@pytest.mark.fault("O9")
def test_only_known_side_files_are_copied(source: Path, fast: Path) -> None:
    (fast / "secret").write_text("secret")
    (source / "LICENSE.md").symlink_to(fast / "secret")
    (source / "vocab.json").symlink_to("merges.txt")
    (source / "merges.txt").write_text("#version")
    (source / "chat_template.jinja").write_text("{{ x }}")
    (source / "LICENSE").write_text("free")
    (source / "modeling_evil.py").write_text("boom")
    (source / "tokenizer.py").write_text("boom")
    (source / "pytorch_model.bin").write_bytes(b"boom")
    (source / "tokenizer_config.json").write_text(
        json.dumps({"auto_map": {"AutoTokenizer": "tokenizer.Evil"}, "eos_token": "</s>"})
    )
    (source / "config.json").write_text(json.dumps({**CONFIG, "auto_map": {"AutoModel": "modeling_evil.Evil"}}))
    with open_source(source) as checkpoint:
        checkpoint.side_files()
        assert any("LICENSE.md" in notice for notice in checkpoint.notices)
    run(source, fast / "out")
    copied = {name for name in digest(fast / "out") if not name.startswith("model")}
    assert copied == {
        "config.json",
        "manifest.json",
        "records.jsonl",
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
        "LICENSE",
        "vocab.json",
        "merges.txt",
    }
    assert not any(p.is_symlink() for p in (fast / "out").iterdir())
    assert json.loads((fast / "out" / "tokenizer_config.json").read_text()) == {"eos_token": "</s>"}
    assert "auto_map" not in (fast / "out" / "config.json").read_text()
