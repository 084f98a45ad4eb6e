"""SQuAD 1.1 (Rajpurkar et al. 2016): exact match and F1 of the spans that an extractive model marks.

Scores are those of the official script: answers in lower case, without punctuation and the articles a, an, the, spaces
joined; the best of a question's reference answers counts. Spans are found as BERT does (Devlin et al. 2019): contexts
longer than a window are cut into windows that overlap, and the span with the largest start + end logit over all windows
wins."""

import collections
import hashlib
import json
import re
import string
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from leangrid.errors import TaskError
from leangrid.evaluation.opened import Opened
from leangrid.evaluation.tasks.data_files import find_file, read_hub_rows, read_text
from leangrid.evaluation.tasks.job import Job, Part, Results, Tasks

WINDOW, STRIDE, ANSWER = 384, 128, 30  # tokens of a window, of its overlap with the next, of the longest answer
_ARTICLES = re.compile(r"\b(a|an|the)\b")


@dataclass(frozen=True)
class Question:
    """One question on one paragraph, and where its answers begin there (characters)."""

    id: str
    question: str
    context: str
    answers: tuple[str, ...]
    starts: tuple[int, ...] = ()


@dataclass(frozen=True)
class Articles:
    """The questions of a file by article, in the order of the file; ``sha256`` is of its text."""

    articles: tuple[tuple[Question, ...], ...]
    sha256: str

    @property
    def questions(self) -> list[Question]:
        """The questions of all articles."""
        return [question for article in self.articles for question in article]


def make_job(tasks: Tasks) -> Job:
    """The task ``squad``: the one *.json of the directory, or the development set from the hub."""
    found = read_hub() if tasks.directory is None else read(find_file("squad", tasks.directory, "*.json"))
    questions = found.questions[: tasks.limit]

    def run(subject: Opened, _: Results) -> dict[str, Any]:
        if not type(subject.model).__name__.endswith("ForQuestionAnswering") or subject.tokenizer is None:
            what = "the model marks no spans" if subject.tokenizer is not None else "the model has no tokenizer"
            way_out = "Give a ...ForQuestionAnswering with its tokenizer"
            raise TaskError(what, f"squad: {type(subject.model).__name__}", way_out)
        return scores(predict(subject.model, subject.tokenizer, questions, tasks.batch_size), questions)

    part = Part("squad", f"sha256 {found.sha256}, limit {tasks.limit}", run)
    return Job("squad", [part], lambda results: results["squad"])


def read(path: Path) -> Articles:
    """A file in the SQuAD 1.1 format; TaskError where it is none, or holds no question with an answer."""
    text = read_text(path)
    try:
        articles = tuple(_article(article) for article in json.loads(text)["data"])
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        way_out = "It is one JSON object: data, paragraphs, qas, answers"
        raise TaskError(f"this is no SQuAD 1.1 file: {type(error).__name__} {error}", path, way_out) from error
    found = Articles(articles, hashlib.sha256(text.encode()).hexdigest())
    if not found.questions or not all(question.answers for question in found.questions):
        what = "a question has no answer" if found.questions else "there is no question"
        raise TaskError(what, path, "Give a SQuAD 1.1 file")
    return found


def _article(article: dict[str, Any]) -> tuple[Question, ...]:
    return tuple(
        Question(str(qa["id"]), qa["question"], paragraph["context"], tuple(answer["text"] for answer in qa["answers"]),
                 tuple(int(answer["answer_start"]) for answer in qa["answers"]))
        for paragraph in article["paragraphs"] for qa in paragraph["qas"]
    )  # fmt: skip


def read_hub() -> Articles:
    """SQuAD 1.1's development set from the hub; TaskError where it cannot be reached."""
    by_title: dict[str, list[Question]] = {}
    for row in read_hub_rows("squad", "rajpurkar/squad", "validation"):
        question = Question(
            row["id"],
            row["question"],
            row["context"],
            tuple(row["answers"]["text"]),
            tuple(row["answers"]["answer_start"]),
        )
        by_title.setdefault(row["title"], []).append(question)
    articles = tuple(tuple(questions) for questions in by_title.values())
    return Articles(articles, hashlib.sha256(repr(articles).encode()).hexdigest())


def normalize(answer: str) -> str:
    """Lower case, no punctuation, no articles, single spaces."""
    plain = "".join(character for character in answer.lower() if character not in string.punctuation)
    return " ".join(_ARTICLES.sub(" ", plain).split())


def exact_match(prediction: str, answers: tuple[str, ...]) -> float:
    """1 where the prediction equals one of the answers once both are normalized, else 0."""
    return float(any(normalize(prediction) == normalize(answer) for answer in answers))


def f1(prediction: str, answers: tuple[str, ...]) -> float:
    """Harmonic mean of the shares of shared words (with multiplicity) in prediction and answer; the best over the
    answers."""
    return max(_f1(normalize(prediction).split(), normalize(answer).split()) for answer in answers)


def _f1(found: list[str], wanted: list[str]) -> float:
    shared = sum((collections.Counter(found) & collections.Counter(wanted)).values())
    return 2 * shared / (len(found) + len(wanted)) if shared else 0.0


def scores(predictions: dict[str, str], questions: list[Question]) -> dict[str, Any]:
    """{"f1", "exact_match"}: means over the questions in points of 100, with "stderr" (of F1), "exact_match_stderr" and
    "n"."""
    f1s = torch.tensor([f1(predictions[question.id], question.answers) for question in questions], dtype=torch.float64)
    exact = torch.tensor(
        [exact_match(predictions[question.id], question.answers) for question in questions], dtype=torch.float64
    )
    root = max(len(questions) - 1, 1) ** 0.5
    return {"f1": 100 * float(f1s.mean()), "stderr": 100 * float(f1s.std(correction=0)) / root,
            "exact_match": 100 * float(exact.mean()), "exact_match_stderr": 100 * float(exact.std(correction=0)) / root,
            "n": len(questions)}  # fmt: skip


@torch.no_grad()
def predict(model: Any, tokenizer: Any, questions: list[Question], batch: int = 16) -> dict[str, str]:
    """The best span of each question's context, by question id.

    Args:
        model: has start_logits and end_logits. tokenizer: a fast one, whose tokens know their characters.
        batch: windows of one forward pass.
    """
    windows = windows_of(tokenizer, questions)
    best = {question.id: (-float("inf"), "") for question in questions}
    owners = windows.pop("overflow_to_sample_mapping").tolist()
    offsets = windows.pop("offset_mapping")
    order = sorted(range(len(owners)), key=lambda row: int(windows["attention_mask"][row].sum()))
    for start in range(0, len(order), batch):
        rows = order[start : start + batch]
        length = int(windows["attention_mask"][rows].sum(1).max())
        output = model(**{name: windows[name][rows, :length].to(model.device) for name in tokenizer.model_input_names})
        for row, starts, ends in zip(
            rows, output.start_logits.float().cpu(), output.end_logits.float().cpu(), strict=True
        ):
            question = questions[owners[row]]
            allowed = torch.tensor([owner == 1 for owner in windows.sequence_ids(row)[:length]])
            score, first, last = best_span(starts, ends, allowed)
            if score > best[question.id][0]:
                best[question.id] = score, question.context[int(offsets[row, first, 0]) : int(offsets[row, last, 1])]
    return {name: answer for name, (_, answer) in best.items()}


def windows_of(tokenizer: Any, questions: list[Question]) -> Any:
    """Question and context as padded windows: what the tokenizer gives, with its overflow and offset mappings."""
    return tokenizer(
        [question.question.strip() for question in questions],
        [question.context for question in questions],
        truncation="only_second",
        max_length=WINDOW,
        stride=STRIDE,
        return_overflowing_tokens=True,
        return_offsets_mapping=True,
        padding="longest",
        return_tensors="pt",
    )


def best_span(
    starts: Float[Tensor, " tokens"], ends: Float[Tensor, " tokens"], allowed: Tensor
) -> tuple[float, int, int]:
    """The score of the best span of at most ANSWER tokens, all allowed, its first and its last token."""
    outside = float("-inf")
    total = starts.masked_fill(~allowed, outside)[:, None] + ends.masked_fill(~allowed, outside)[None]
    total = total.where(torch.ones_like(total, dtype=torch.bool).triu().tril(ANSWER - 1), total.new_tensor(outside))
    place = int(total.argmax())
    return float(total.flatten()[place]), place // len(ends), place % len(ends)
