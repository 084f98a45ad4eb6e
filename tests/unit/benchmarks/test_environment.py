"""The environments of other projects: when they are built, from what, and how a failure is shown."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest


def environment(bench: Any, tmp_path: Path, packages: str) -> Any:
    (tmp_path / "tool.txt").write_text(packages, encoding="utf-8")
    return bench("common.environment").Environment("tool", tmp_path / "envs", tmp_path)


def test_an_environment_is_built_as_its_list_says(bench: Any, tmp_path: Path) -> None:
    made = environment(
        bench, tmp_path, "# without: torchvision torchaudio\n# with: leangrid\nnumpy==2\ntorch==2.13.0\n"
    )
    words = [" ".join(step) for step in made._steps()]
    assert made.has_leangrid and len(words) == 5
    assert "venv" in words[0] and words[1].endswith("torch==2.13.0") and "--requirement" in words[2]
    assert words[3].endswith("uninstall --yes torchvision torchaudio") and "--no-deps" in words[4]
    plain = environment(bench, tmp_path, "torch==2.13.0\nnumpy==2\n")
    assert not plain.has_leangrid and len(plain._steps()) == 3


@pytest.mark.parametrize("listed", ["# with: leangrid\nnumpy==2\n", "numpy==2\n"])
def test_an_environment_is_built_again_where_its_list_or_leangrid_in_it_changed(
    listed: str, bench: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, module, ran, own = environment(bench, tmp_path, listed), bench("common.environment"), [], tmp_path / "own.py"
    own.write_text("1")
    monkeypatch.setattr(module, "_own_files", lambda: [own])

    def run(command: tuple[str, ...], **_: Any) -> Any:
        made.python.parent.mkdir(parents=True, exist_ok=True)
        ran.append(command)
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(module.subprocess, "run", run)
    made.build()
    everything = list(ran)
    made.build()
    assert ran == everything == made._steps()
    own.write_text("2")
    made.build()
    assert ran[len(everything) :] == ([made._leangrid] if made.has_leangrid else [])
    made.packages.write_text(listed + "torch==2\n")
    ran.clear()
    made.build()
    assert ran == made._steps()


def test_a_runner_that_fails_shows_its_last_words(bench: Any, tmp_path: Path) -> None:
    made = environment(bench, tmp_path, "torch==2.13.0\n")
    made.python.parent.mkdir(parents=True)
    made.python.symlink_to(sys.executable)
    (tmp_path / "run_tool.py").write_text(
        "import sys, json\nread = json.load(sys.stdin)\nraise SystemExit(read['word'])\n", encoding="utf-8"
    )
    with pytest.raises(bench("common.environment").EnvironmentFailed, match=r"(?s)tool ended with 1.*broken"):
        made.run({"word": "broken", "threads": 1}, tmp_path)
    good = (
        "import sys, json\nread = json.load(sys.stdin)\n"
        "open(read['result'], 'w').write(json.dumps({'tokens': [read['threads']]}))\n"
    )
    (tmp_path / "run_tool.py").write_text(good, encoding="utf-8")
    assert made.run({"threads": 1}, tmp_path) == {"tokens": [1]}
    assert json.loads((tmp_path / "tool.json").read_text(encoding="utf-8")) == {"tokens": [1]}
