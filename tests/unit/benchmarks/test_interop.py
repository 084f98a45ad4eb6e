"""What counts as the same answer of an engine, and that every engine has its list and its runner."""

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
    found = interop.compare_answers(ours(interop, [3, 1]), {"tokens": [3, 1]}, padded)
    assert found == {"max_logit_difference": 0.0, "kl": 0.0, "greedy_equal": True, "greedy_tokens": 2}
    assert interop.verdict(found | {"dtype": "float32"}, interop.KNOWN["onnx"]) == "ok"


def test_another_token_is_shown_with_its_margin(interop: Any) -> None:
    found = interop.compare_answers(ours(interop, [3, 1, 2]), {"tokens": [3, 0, 2]}, None)
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
    assert interop.compare_answers(ours(interop, [3, 2, 1], ends=(2,)), {"tokens": [3, 2]}, None)["greedy_equal"]
    found = interop.compare_answers(ours(interop, [3, 2, 1], ends=(2,)), {"tokens": [3]}, None)
    assert found["greedy_equal"] and found["greedy_tokens"] == 1
    short = interop.compare_answers(ours(interop, [3, 2, 1]), {"tokens": [3]}, None)
    assert not short["greedy_equal"] and "margin" not in short
    assert interop.verdict(short | {"dtype": "float32"}, interop.KNOWN["vllm"]) == "differs"


def test_a_text_that_ends_in_one_of_them_has_a_margin_too(interop: Any) -> None:
    goes_on = interop.compare_answers(ours(interop, [3, 1, 1], ends=(2,)), {"tokens": [3, 2]}, None)
    assert goes_on["first_difference"] == 1 and goes_on["margin"] == 1.0
    stopped = interop.compare_answers(ours(interop, [3, 2, 1], ends=(2,)), {"tokens": [3, 0, 1]}, None)
    assert stopped["first_difference"] == 1 and stopped["margin"] == 1.0


def test_every_engine_has_its_packages_and_its_runner(interop: Any) -> None:
    from leangrid.exporters.export import targets
    from leangrid.schemes import Scheme

    for name, engine in interop.KNOWN.items():
        packages = interop.ENGINES / f"{name}.txt"
        assert packages.is_file(), packages
        compile((interop.ENGINES / f"run_{name}.py").read_text(encoding="utf-8"), name, "exec")
        for scheme, container, _ in engine.cases:
            Scheme.parse(scheme)
            assert container in targets()
