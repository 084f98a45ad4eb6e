"""SQuAD 1.1: the official script's scores, spans by brute force, and the whole task on a model with a span head."""

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny_models
import torch
import transformers as hf

import leangrid
from leangrid.errors import TaskError
from leangrid.evaluation import Tasks, evaluate
from leangrid.evaluation.tasks import squad
from leangrid.evaluation.tasks.squad import ANSWER, Question, best_span, exact_match, f1, predict, read, scores
from leangrid.recipe import Recipe

Tiny = Callable[..., Path]
CONTEXT = (
    "A class is made of names. " * 60
    + "The yield statement makes a generator. "
    + "An exception has a traceback. " * 60
)


def asked(name: str, question: str, answer: str, start: int) -> dict[str, Any]:
    return {"id": name, "question": question, "answers": [{"text": answer, "answer_start": start}]}


def write(path: Path, *questions: dict[str, Any]) -> Path:
    qas = questions or (
        asked("a", "What makes a generator?", "yield", 4),
        asked("b", "What has a traceback?", "An exception", 9),
    )
    path.write_text(
        json.dumps({"version": "1.1", "data": [{"title": "t", "paragraphs": [{"context": CONTEXT, "qas": list(qas)}]}]})
    )
    return path


@pytest.mark.parametrize(
    ("prediction", "answers", "exact", "overlap"),
    [  # worked by hand from the official definition
        ("The Eiffel Tower!", ("eiffel tower",), 1, 1),
        ("an  Answer", ("answer", "other"), 1, 1),
        ("Eiffel Tower in Paris", ("Eiffel Tower",), 0, 2 * (2 / 4) * 1 / (2 / 4 + 1)),
        ("tower tower", ("tower",), 0, 2 / 3),
        ("U.S.", ("US",), 1, 1),
        ("twenty-one", ("twenty one",), 0, 0),
        ("nothing", ("a", "the"), 0, 0),
        ("the", ("a",), 1, 0),  # both are empty once normalized: equal, and no word in common
        ("a–b", ("b",), 0, 0),  # the dash is no punctuation there, but a boundary of words
    ],
)  # fmt: skip
def test_scores_by_hand(prediction: str, answers: tuple[str, ...], exact: float, overlap: float) -> None:
    assert exact_match(prediction, answers) == exact and f1(prediction, answers) == pytest.approx(overlap)


def test_the_best_span_is_that_of_brute_force() -> None:
    generator = torch.Generator().manual_seed(0)
    for length in (1, 5, 50):
        starts, ends = torch.randn(2, length, generator=generator)
        allowed = torch.rand(length, generator=generator) < 0.7
        allowed[length // 2] = True
        spans = [(float(starts[i] + ends[j]), i, j) for i in range(length) for j in range(i, min(length, i + ANSWER))
                 if allowed[i] and allowed[j]]  # fmt: skip
        assert best_span(starts, ends, allowed) == pytest.approx(max(spans))


def test_answers_are_found_wherever_they_stand_in_a_long_context() -> None:
    """A model that marks one word's tokens gets that word back, with its own letters, from whichever window holds
    it."""
    tokenizer = tiny_models.tokenizer()
    questions = [
        Question("a", "What makes a generator?", CONTEXT, ("yield",)),
        Question("b", "short", "one yield here", ("yield",)),
    ]
    wanted = set(tokenizer(" yield", add_special_tokens=False)["input_ids"])

    def model(input_ids: torch.Tensor, **_: torch.Tensor) -> SimpleNamespace:
        marked = torch.tensor([[float(int(token) in wanted) for token in row] for row in input_ids])
        before, after = (torch.roll(marked, shift, 1) for shift in (1, -1))
        return SimpleNamespace(start_logits=marked - before, end_logits=marked - after)

    model.device = torch.device("cpu")  # type: ignore[attr-defined]
    assert len(tokenizer(CONTEXT)["input_ids"]) > squad.WINDOW
    found = predict(model, tokenizer, questions, batch=2)
    assert {name: answer.strip() for name, answer in found.items()} == {"a": "yield", "b": "yield"}
    assert scores(found, questions)["f1"] == 100


@pytest.mark.filterwarnings("ignore:leangrid runs without its C")
@pytest.mark.parametrize(
    "scheme",
    [pytest.param("NU4_EXACT"), *(pytest.param(s, marks=pytest.mark.slow) for s in ("NU3_EXACT", "W4A16_EXACT"))],
)
def test_a_quantized_span_head_runs_the_task_end_to_end(scheme: str, tmp_path: Path) -> None:
    source, data = tmp_path / "source", tmp_path / "data"
    data.mkdir()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        hf.BertForQuestionAnswering(tiny_models.CONFIGS["bert"]()).save_pretrained(source)
    tiny_models.tokenizer().save_pretrained(source)
    write(data / "dev.json")
    plain = evaluate(source, tasks=Tasks(("squad",), data)).tasks["squad"]
    assert plain["n"] == 2 and 0 <= plain["exact_match"] <= plain["f1"] <= 100
    result = leangrid.quantize(source, tmp_path / "out", Recipe(scheme=scheme), windows=tiny_models.tokens(4, 32))
    assert result.quality["passed"] and result.quality["measure"] == "cosine"
    found = evaluate(tmp_path / "out", source, _text(tmp_path), length=24, windows=2, tasks=Tasks(("squad",), data))
    assert found.tasks["squad"]["n"] == 2 and 0 < found.embedding_cosine_mean < 0.2
    model, _ = leangrid.load(tmp_path / "out")
    assert (
        type(model).__name__ == "BertForQuestionAnswering"
        and torch.isfinite(model(tiny_models.tokens(1, 8)).start_logits).all()
    )


def test_a_model_without_a_span_head_is_refused(tiny: Tiny, tmp_path: Path) -> None:
    write(tmp_path / "dev.json")
    assert "marks no spans" in evaluate(tiny("bert"), tasks=Tasks(("squad",), tmp_path)).tasks["squad"]["error"]


def _text(folder: Path) -> str:
    file = folder / "prose.txt"
    file.write_text("Sentence after sentence of a text that is long enough. " * 20)
    return str(file)


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("[]", "no SQuAD 1.1 file"),
        ("{", "no SQuAD 1.1 file"),
        ('{"data": [{"paragraphs": [{"qas": []}]}]}', "there is no question"),
        (
            '{"data": [{"paragraphs": [{"qas": [{"id": "1"}]}]}]}',
            "no SQuAD 1.1 file: KeyError 'context'|KeyError 'question'",
        ),
    ],
)
def test_other_files_are_refused(content: str, sentence: str, tmp_path: Path) -> None:
    (tmp_path / "f.json").write_text(content)
    with pytest.raises(TaskError, match=sentence):
        read(tmp_path / "f.json")


def test_questions_without_answers_and_directories_without_a_file(tmp_path: Path) -> None:
    with pytest.raises(TaskError, match="a question has no answer"):
        read(write(tmp_path / "a.json", {"id": "1", "question": "?", "answers": []}))
    write(tmp_path / "b.json")
    with pytest.raises(TaskError, match="needs one file, 2 are here"):
        squad.make_job(Tasks(("squad",), tmp_path))
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(TaskError, match="the data of task squad are missing"):
        squad.make_job(Tasks(("squad",), empty))
    assert [q.starts for q in read(tmp_path / "b.json").questions] == [(4,), (9,)]
