"""MT-Bench (Zheng et al. 2023, arXiv 2306.05685), single-answer grading: 80 questions of two turns, each answer rated 1
to 10 by a judge.

Questions, reference answers and the judge's prompts are the published files of FastChat (Apache-2.0,
fastchat/llm_judge/data), read from --tasks-dir and not copied here. Temperatures by category, the categories judged
beside a reference, 1,024 new tokens an answer and the judge's 2,048 at temperature 0 are those of its scripts
(gen_model_answer.py, common.py); answers are put in the model's own chat template."""

import itertools
import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from leangrid.errors import TaskError
from leangrid.evaluation.opened import Opened
from leangrid.evaluation.reply import Reply, encode_chat, require_rows
from leangrid.evaluation.tasks.data_files import read_json_lines
from leangrid.evaluation.tasks.job import Job, Part, Results, Tasks
from leangrid.evaluation.tasks.judge import Judge, read_rating
from leangrid.storage.files import hash_file

ANSWER, JUDGEMENT = 1024, 2048  # tokens at most
_TEMPERATURES = {
    "writing": 0.7,
    "roleplay": 0.7,
    "extraction": 0.0,
    "math": 0.0,
    "coding": 0.0,
    "reasoning": 0.0,
    "stem": 0.1,
    "humanities": 0.1,
}
_OTHER_TEMPERATURE = 0.7
_WITH_REFERENCE = {"math", "reasoning", "coding"}
_PROMPTS = {
    (1, False): "single-v1",
    (1, True): "single-math-v1",
    (2, False): "single-v1-multi-turn",
    (2, True): "single-math-v1-multi-turn",
}
_SOURCE = "It is in github.com/lm-sys/FastChat, fastchat/llm_judge/data: give that directory as --tasks-dir"
_CHARACTERS_PER_TOKEN = 4  # of English text, for the estimate
# US dollars a million tokens, in and out, as OpenAI listed them in 2024.
_PRICES = {"gpt-4o-2024-05-13": (5.0, 15.0)}


@dataclass(frozen=True)
class Question:
    """One question of two turns; ``reference`` holds a right answer to each, None in categories that have none."""

    id: str
    category: str
    turns: tuple[str, str]
    reference: tuple[str, str] | None

    @property
    def temperature(self) -> float:
        """The temperature that its answers are sampled at."""
        return _TEMPERATURES.get(self.category, _OTHER_TEMPERATURE)


@dataclass(frozen=True)
class Bench:
    """The published files: questions, the judge's prompts by name (system prompt, template), and a sha256 of all."""

    questions: tuple[Question, ...]
    prompts: Mapping[str, tuple[str, str]]
    sha256: str

    def prompt(self, question: Question, answers: tuple[str, ...], turn: int) -> tuple[str, str]:
        """System prompt and prompt that ask for the rating of ``turn`` (1 or 2)."""
        system, template = self.prompts[_PROMPTS[turn, question.reference is not None]]
        first, second = question.turns
        values = {
            "question": first,
            "question_1": first,
            "question_2": second,
            "answer": answers[0],
            "answer_1": answers[0],
            "answer_2": answers[-1],
        }
        for number, text in enumerate(question.reference or (), 1):
            values[f"ref_answer_{number}"] = text
        return system, template.format(**values)


def make_job(tasks: Tasks) -> Job:
    """The task ``mt_bench``: for each question its answers, then two judgements."""
    bench = read(tasks.directory)
    judge = Judge.open(tasks.judge_url, tasks.judge_model)
    questions = bench.questions[: tasks.limit]
    parts = []
    for question in questions:
        name = f"mt_bench/{question.id}"
        parts.append(
            Part(f"{name}/answers", f"sha256 {bench.sha256}", lambda subject, _, q=question: answer(subject, q))
        )
        parts += [
            Part(
                f"{name}/turn {turn}",
                f"sha256 {bench.sha256}, judge {judge.model}",
                lambda _, found, q=question, of=f"{name}/answers", turn=turn: rate(
                    bench, judge, q, tuple(found[of]["turns"]), turn
                ),
            )
            for turn in (1, 2)
        ]
    return Job(
        "mt_bench",
        parts,
        lambda found: figures(questions, found, judge.model),
        lambda names: estimate_cost(bench, judge, questions, names),
    )


def read(directory: Path | None) -> Bench:
    """question.jsonl, gpt-4.jsonl (reference answers) and judge_prompts.jsonl, side by side or as FastChat keeps them;
    TaskError else."""
    if directory is None or not directory.is_dir():
        raise TaskError("MT-Bench needs its published files", directory or "mt_bench", _SOURCE)
    paths = [
        _found(directory, *places)
        for places in (
            ("question.jsonl", "mt_bench/question.jsonl"),
            ("judge_prompts.jsonl",),
            ("gpt-4.jsonl", "reference_answer/gpt-4.jsonl", "mt_bench/reference_answer/gpt-4.jsonl"),
        )
    ]
    questions, prompts, references = (read_json_lines(path) for path in paths)
    digest = hash_file(*paths)
    try:
        answered = {row["question_id"]: _pair(row["choices"][0]["turns"]) for row in references}
        known = {row["name"]: (str(row["system_prompt"]), str(row["prompt_template"])) for row in prompts}
        asked = tuple(_question(row, answered) for row in questions)
    except (KeyError, IndexError, TypeError, ValueError) as error:
        raise TaskError(f"a line lacks what MT-Bench's files hold: {error}", directory, _SOURCE) from error
    missing = sorted(set(_PROMPTS.values()) - set(known))
    if missing:
        raise TaskError(f"the judge's prompts lack {', '.join(missing)}", paths[1], _SOURCE)
    bench = Bench(asked, known, digest)
    try:
        for question, turn in itertools.product(asked, (1, 2)):
            bench.prompt(question, ("", ""), turn)
    except (KeyError, IndexError, ValueError, AttributeError) as error:
        raise TaskError(f"a judge's prompt asks for what MT-Bench does not have: {error}", paths[1], _SOURCE) from error
    return bench


def _question(row: dict[str, Any], references: dict[Any, tuple[str, str]]) -> Question:
    reference = references[row["question_id"]] if row["category"] in _WITH_REFERENCE else None
    return Question(str(row["question_id"]), str(row["category"]), _pair(row["turns"]), reference)


def _pair(turns: list[str]) -> tuple[str, str]:
    first, second = turns
    return str(first), str(second)


def _found(directory: Path, *places: str) -> Path:
    for place in places:
        if (directory / place).is_file():
            return directory / place
    raise TaskError(f"MT-Bench needs {places[0]}", directory, _SOURCE)


def answer(subject: Opened, question: Question) -> dict[str, Any]:
    """{"turns": both answers of the model}; the second question is asked with the first and its answer before it.
    TaskError for a model without a chat template."""
    if not subject.has_lm_head or not getattr(subject.tokenizer, "chat_template", None):
        what = "the model has no chat template, so it cannot answer MT-Bench"
        raise TaskError(what, subject.name, "Give a chat model")
    limit = subject.positions
    messages: list[dict[str, str]] = []
    turns = []
    for turn in question.turns:
        messages.append({"role": "user", "content": turn})
        ids = encode_chat(subject.tokenizer, messages)
        require_rows(subject, ids, "MT-Bench needs a model with all of its tokens")
        tokens = ANSWER if limit is None else min(ANSWER, limit - len(ids))
        reply = Reply(subject, turn, ids)
        turns.append("".join(reply.stream_text(tokens, question.temperature, seed=0)).strip() if tokens > 0 else "")
        messages.append({"role": "assistant", "content": turns[-1]})
    return {"turns": turns}


def rate(bench: Bench, judge: Judge, question: Question, given: tuple[str, ...], turn: int) -> dict[str, Any]:
    """{"rating": of one turn, 1 to 10, "judgement": the text of the judge}."""
    judgement = judge.ask(*bench.prompt(question, given, turn), max_tokens=JUDGEMENT)
    return {"rating": read_rating(judgement), "judgement": judgement}


def figures(questions: tuple[Question, ...], found: Results, judge: str) -> dict[str, Any]:
    """{"score", "stderr" (over questions), "turn_1", "turn_2", "n", "categories", "judge", "seconds"}."""
    turns = {
        turn: [found[f"mt_bench/{question.id}/turn {turn}"]["rating"] for question in questions] for turn in (1, 2)
    }
    means = [(one + two) / 2 for one, two in zip(turns[1], turns[2], strict=True)]
    by_category: dict[str, list[float]] = {}
    for question, mean in zip(questions, means, strict=True):
        by_category.setdefault(question.category, []).append(mean)
    return {
        "score": statistics.fmean(means),
        "stderr": statistics.stdev(means) / len(means) ** 0.5 if len(means) > 1 else None,
        "turn_1": statistics.fmean(turns[1]),
        "turn_2": statistics.fmean(turns[2]),
        "n": len(questions),
        "categories": {name: round(statistics.fmean(values), 3) for name, values in by_category.items()},
        "judge": judge,
        "seconds": round(sum(part["seconds"] for part in found.values()), 1),
    }


def estimate_cost(bench: Bench, judge: Judge, questions: tuple[Question, ...], parts: set[str]) -> str:
    """A sentence that says what the judgements among ``parts``, names of parts to run, will cost at most."""
    characters = calls = 0
    longest = "x" * (ANSWER * _CHARACTERS_PER_TOKEN)
    for question in questions:
        for turn in (1, 2):
            if f"mt_bench/{question.id}/turn {turn}" in parts:
                calls += 1
                characters += sum(map(len, bench.prompt(question, (longest, longest), turn)))
    read_tokens, written = characters // _CHARACTERS_PER_TOKEN, calls * JUDGEMENT
    said = f"{judge.model} will be asked {calls} times: at most about {read_tokens:,} tokens in and {written:,} out"
    price = _PRICES.get(judge.model)
    if price is None:
        return f"{said}; leangrid does not know its price"
    dollars = (read_tokens * price[0] + written * price[1]) / 1e6
    return f"{said}, {dollars:.2f} US dollars at the price of 2024; answers are mostly shorter"
