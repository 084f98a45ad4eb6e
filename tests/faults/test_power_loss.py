"""Power cuts: from every state that one may leave on the disk, the same command ends with the same bytes
(tests/support/power_loss.py)."""

import random
import shutil
from pathlib import Path
from typing import Any

import pytest
from power_loss import Recorder, Tree, materialise
from tiny_run import digest, run, write_source

from leangrid.errors import LeangridError
from leangrid.storage import files
from leangrid.storage.journal import partial_of
from leangrid.storage.manifest import amend_result, list_differences

SOME = 120  # states of the fast suite, drawn with a seed; `make test-slow` takes all


def crashes(source: Path, root: Path, monkeypatch: pytest.MonkeyPatch, **options: Any) -> list[Tree]:
    """Every state on the way of a run into ``root``/out."""
    recorder = Recorder(root)
    with monkeypatch.context() as patch:
        patch.setattr(files, "os", recorder)
        run(source, root / "out", **options)
    assert recorder.operations > 150
    return list(recorder.crashes.values())


def resumed(source: Path, root: Path, tree: Tree, expected: list[dict[str, str]], **options: Any) -> str | None:
    """What is wrong after the power comes back at ``tree`` and the same command runs again; None where all is well."""
    out = root / "out"
    materialise(tree, root)
    try:
        if out.exists() and digest(out) not in expected:
            return f"OUT is neither absent nor complete: {list_differences(out)}"
        if out.exists() and not (partial_of(out) / "sealed.json").exists() and not options:
            # nothing is left to say who made OUT, which is complete: the same command would refuse to touch it
            return None
        run(source, out, **options)
        if digest(out) != expected[0]:
            return "other bytes"
        return f"left behind: {partial_of(out)}" if partial_of(out).exists() else None
    except LeangridError as error:
        return str(error)
    finally:
        shutil.rmtree(root)


@pytest.mark.fault("C3")
@pytest.mark.parametrize(
    ("overwrite", "share"),
    [(True, "some"), *(pytest.param(overwrite, "all", marks=pytest.mark.slow) for overwrite in (False, True))],
)
def test_the_power_may_fail_after_any_operation(
    in_memory: Path, share: str, overwrite: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write_source(in_memory / "source")
    run(source, in_memory / "expected")
    expected = [digest(in_memory / "expected")]
    disk = in_memory / "disk"
    disk.mkdir()
    options = {"overwrite": True} if overwrite else {}
    if overwrite:
        shutil.copytree(in_memory / "expected", disk / "out")
        amend_result(disk / "out", {"older.txt": b"an older result"})
        expected.append(digest(disk / "out"))
    states = crashes(source, disk, monkeypatch, **options)
    assert len(states) > 500
    if share == "some":
        states = random.Random(overwrite).sample(states, SOME)
    problems = [problem for number, tree in enumerate(states)
                if (problem := resumed(source, in_memory / f"state{number}", tree, expected, **options))]  # fmt: skip
    assert problems == []
