"""The interop driver's pure parts: what counts as the same answer, and what an engine's list asks of its
environment."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

LOGITS = torch.tensor([[0.0, 1.0, 2.0, 3.0], [3.0, 2.0, 1.0, 0.0]])


@pytest.fixture
def interop(bench: Any) -> Any:
    return bench("interop")


def ours(interop: Any, tokens: list[int], ends: tuple[int, ...] = ()) -> Any:
    steps = torch.zeros(len(tokens), 4)
    for place, token in enumerate(tokens):
        steps[place, token] = 1.0
    return interop.Ours(LOGITS, tokens, steps, ends)


def test_the_same_answer_has_no_distance(interop: Any) -> None:
    padded = torch.cat([LOGITS, torch.full((2, 3), 99.0)], dim=1)  # engines pad the vocabulary
    found = interop.compared(ours(interop, [3, 1]), {"tokens": [3, 1]}, padded)
    assert found == {"max_logit_difference": 0.0, "kl": 0.0, "greedy_equal": True, "greedy_tokens": 2}
    assert interop.verdict(found | {"dtype": "float32"}, interop.KNOWN["onnx"]) == "ok"


def test_another_token_is_shown_with_its_margin(interop: Any) -> None:
    found = interop.compared(ours(interop, [3, 1, 2]), {"tokens": [3, 0, 2]}, None)
    assert found["greedy_equal"] is False and found["first_difference"] == 1 and found["margin"] == 1.0
    found["dtype"] = "float32"
    assert interop.verdict(found, interop.KNOWN["onnx"]) == "differs"
    assert interop.verdict(found | {"margin": 0.001, "kl": 0.0}, interop.KNOWN["onnx"]) == "ok"
    assert (
        interop.verdict(found | {"margin": 0.001, "kl": 0.0, "weights_equal": False}, interop.KNOWN["onnx"])
        == "differs"
    )
    same = {"greedy_equal": True, "kl": 1e-4}
    assert interop.verdict(same | {"dtype": "float32"}, interop.KNOWN["onnx"]) == "differs"
    assert interop.verdict(same | {"dtype": "bfloat16"}, interop.KNOWN["onnx"]) == "ok"


def test_what_follows_the_end_of_a_text_does_not_count(interop: Any) -> None:
    assert interop.compared(ours(interop, [3, 2, 1], ends=(2,)), {"tokens": [3, 2]}, None)["greedy_equal"]
    found = interop.compared(ours(interop, [3, 2, 1], ends=(2,)), {"tokens": [3]}, None)
    assert found["greedy_equal"] and found["greedy_tokens"] == 1
    short = interop.compared(ours(interop, [3, 2, 1]), {"tokens": [3]}, None)
    assert not short["greedy_equal"] and "margin" not in short
    assert interop.verdict(short | {"dtype": "float32"}, interop.KNOWN["vllm"]) == "differs"


def test_a_text_that_ends_in_one_of_them_has_a_margin_too(interop: Any) -> None:
    goes_on = interop.compared(ours(interop, [3, 1, 1], ends=(2,)), {"tokens": [3, 2]}, None)
    assert goes_on["first_difference"] == 1 and goes_on["margin"] == 1.0
    stopped = interop.compared(ours(interop, [3, 2, 1], ends=(2,)), {"tokens": [3, 0, 1]}, None)
    assert stopped["first_difference"] == 1 and stopped["margin"] == 1.0


def test_every_engine_has_its_packages_and_its_runner(interop: Any) -> None:
    from leangrid.exporters.export import targets
    from leangrid.recipe import Scheme

    for name, engine in interop.KNOWN.items():
        packages = interop.ENGINES / f"{name}.txt"
        assert packages.is_file(), packages
        compile((interop.ENGINES / f"run_{name}.py").read_text(encoding="utf-8"), name, "exec")
        for scheme, container, _ in engine.cases:
            Scheme.parse(scheme)
            assert container in targets()


def environment(bench: Any, tmp_path: Path, packages: str) -> Any:
    (tmp_path / "tool.txt").write_text(packages, encoding="utf-8")
    return bench("environment").Environment("tool", tmp_path / "envs", tmp_path)


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
    made, module, ran, own = environment(bench, tmp_path, listed), bench("environment"), [], tmp_path / "own.py"
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
    with pytest.raises(bench("environment").EnvironmentFailed, match=r"(?s)tool ended with 1.*broken"):
        made.run({"word": "broken", "threads": 1}, tmp_path)
    good = "import sys, json\nread = json.load(sys.stdin)\nopen(read['result'], 'w').write(json.dumps({'tokens': [read['threads']]}))\n"
    (tmp_path / "run_tool.py").write_text(good, encoding="utf-8")
    assert made.run({"threads": 1}, tmp_path) == {"tokens": [1]}
    assert json.loads((tmp_path / "tool.json").read_text(encoding="utf-8")) == {"tokens": [1]}
