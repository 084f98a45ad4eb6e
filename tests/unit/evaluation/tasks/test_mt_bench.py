"""MT-Bench against a local stand-in for the judge, which also misbehaves in every way that an endpoint may."""

import json
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import tiny_models
from typer.testing import CliRunner

from leangrid.cli.app import app
from leangrid.errors import TaskError
from leangrid.evaluation import Tasks, evaluate
from leangrid.evaluation.tasks import judge, mt_bench
from leangrid.evaluation.tasks.judge import Judge, Unrated, read_rating
from leangrid.progress import Event

KEY = "sk-a-secret-that-must-stay-one"
Reply = tuple[int, str] | str | float  # a status and body, the judge's words, or seconds of silence
pytestmark = pytest.mark.filterwarnings("ignore:leangrid runs without its C")


class StandIn:
    """Answers each request with the next of ``script``, then rates 7."""

    def __init__(self) -> None:
        self.script: list[Reply] = []
        self.requests: list[dict[str, Any]] = []
        self.keys: list[str | None] = []
        self.headers: dict[str, str] = {}
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()
        self.url = f"http://127.0.0.1:{self._server.server_port}/v1"

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        stand_in = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                stand_in.requests.append(body | {"path": self.path})
                stand_in.keys.append(self.headers.get("Authorization"))
                reply = stand_in.script.pop(0) if stand_in.script else "Fine. Rating: [[7]]"
                if isinstance(reply, float):
                    time.sleep(reply)
                    reply = (200, "")
                status, text = (
                    (200, json.dumps({"choices": [{"message": {"content": reply}}]}))
                    if isinstance(reply, str)
                    else reply
                )
                self.send_response(status)
                for name, value in stand_in.headers.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(text.encode())

            def log_message(self, *_: object) -> None:
                return

        return Handler


@pytest.fixture
def server() -> Iterator[StandIn]:
    stand_in = StandIn()
    yield stand_in
    stand_in.close()


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Waits are noted, not waited; the key is in the environment."""
    waits: list[float] = []
    real = Judge.open.__func__  # type: ignore[attr-defined]

    def open_(cls: type[Judge], url: str | None, model: str) -> Judge:
        found = real(cls, url, model)
        return Judge(found.url, found.model, found.key, timeout=0.3, sleep=waits.append)

    monkeypatch.setattr(Judge, "open", classmethod(open_))
    monkeypatch.setenv("LEANGRID_JUDGE_KEY", KEY)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    return waits


@pytest.fixture(scope="module")
def chatty(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with a chat template, and too short for 1,024 tokens an answer."""
    directory = tiny_models.save("llama3", tmp_path_factory.mktemp("chatty"))
    turns = "{% for m in messages %}<bos>{{ m['role'] }}: {{ m['content'] }}<eos>{% endfor %}"
    (directory / "chat_template.jinja").write_text(turns + "{% if add_generation_prompt %}<bos>{% endif %}")
    return directory


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """The three published files in miniature, laid out as FastChat does."""
    data = tmp_path / "data"
    (data / "mt_bench" / "reference_answer").mkdir(parents=True)

    def write(name: str, *rows: dict[str, Any]) -> None:
        (data / name).write_text("".join(json.dumps(row) + "\n" for row in rows))

    write(
        "mt_bench/question.jsonl",
        {"question_id": 81, "category": "writing", "turns": ["Write a line.", "Now shorter."]},
        {"question_id": 111, "category": "math", "turns": ["1 + 1?", "And {x} more?"], "reference": ["2", ""]},
    )
    write("mt_bench/reference_answer/gpt-4.jsonl", {"question_id": 111, "choices": [{"turns": ["two", "three"]}]})
    write(
        "judge_prompts.jsonl",
        {"name": "single-v1", "system_prompt": "S1", "prompt_template": "Q {question} A {answer}"},
        {
            "name": "single-math-v1",
            "system_prompt": "S2",
            "prompt_template": "Q {question} R {ref_answer_1} A {answer}",
        },
        {
            "name": "single-v1-multi-turn",
            "system_prompt": "S3",
            "prompt_template": "{question_1}|{answer_1}|{question_2}|{answer_2}",
        },
        {
            "name": "single-math-v1-multi-turn",
            "system_prompt": "S4",
            "prompt_template": "{ref_answer_1}|{ref_answer_2}|{question_2}|{answer_1}|{answer_2}",
        },
    )
    return data


@pytest.fixture(autouse=True)
def short_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mt_bench, "ANSWER", 6)


def tasks(server: StandIn, files: Path, **more: Any) -> Tasks:
    return Tasks(("mt_bench",), files, judge_url=server.url, judge_model="gpt-4o-2024-05-13", **more)


def test_two_turns_are_answered_and_rated_by_the_published_protocol(server: StandIn, chatty: Path, files: Path) -> None:
    server.script = ["It is good. Rating: [[8]]", "Rating: [[6.5]]", "wrong [3]", "Rating: [[1]] and later [[9]]"]
    seen: list[Event] = []
    found = evaluate(chatty, tasks=tasks(server, files), progress=seen.append).tasks["mt_bench"]
    assert (found["score"], found["turn_1"], found["turn_2"]) == pytest.approx(((8 + 6.5 + 3 + 1) / 4, 5.5, 3.75))
    assert (
        found["n"] == 2
        and found["categories"] == {"writing": 7.25, "math": 2.0}
        and found["stderr"] == pytest.approx(5.25 / 2)
    )
    systems = [request["messages"][0]["content"] for request in server.requests]
    prompts = [request["messages"][1]["content"] for request in server.requests]
    assert systems == ["S1", "S3", "S2", "S4"]
    assert {
        (request["model"], request["temperature"], request["max_tokens"], request["path"])
        for request in server.requests
    } == {("gpt-4o-2024-05-13", 0, 2048, "/v1/chat/completions")}
    first, second = prompts[0].removeprefix("Q Write a line. A "), prompts[1].split("|")
    assert second[:3] == ["Write a line.", first, "Now shorter."] and first
    assert prompts[2].startswith("Q 1 + 1? R two A ") and prompts[3].startswith("two|three|And {x} more?|")
    assert set(server.keys) == {f"Bearer {KEY}"}
    notice = next(event.message for event in seen if event.stage == "notice")
    assert "will be asked 4 times" in notice and "8,192 out" in notice and "US dollars" in notice
    assert seen.index(next(event for event in seen if event.stage == "notice")) == 0


def test_the_second_answer_follows_the_first_and_both_are_greedy_where_the_protocol_says(
    chatty: Path, files: Path
) -> None:
    from leangrid.evaluation.opened import load_model
    from leangrid.evaluation.reply import Reply

    subject = load_model(chatty)
    question = mt_bench.read(files).questions[1]
    assert question.temperature == 0 and question.reference == ("two", "three")
    turns = mt_bench.answer(subject, question)["turns"]
    reply = Reply.open(str(chatty), question.turns[0])
    list(reply.stream_text(6))
    assert turns[0] == reply.text.strip() and len(turns) == 2
    assert turns == mt_bench.answer(subject, question)["turns"]


def test_what_passes_is_asked_again_with_longer_waits(
    server: StandIn, chatty: Path, files: Path, impatient: list[float]
) -> None:
    server.script = [
        (429, "slow down"),
        (500, "oops"),
        0.5,
        (200, "{not json"),
        (200, '{"choices": []}'),
        "Rating: [[4]]",
        (200, json.dumps({"choices": [{"message": {"content": None}}]})),
        (503, ""),
        "Rating: [[4]]",
    ]
    found = evaluate(chatty, tasks=tasks(server, files, limit=1)).tasks["mt_bench"]
    assert found["score"] == 4 and len(server.requests) == 9
    assert [2**k <= wait <= 1.5 * 2**k for k, wait in zip((0, 1, 2, 3, 4, 0, 1), impatient, strict=True)] == [True] * 7


def test_the_endpoint_s_own_wait_is_kept(server: StandIn, chatty: Path, files: Path, impatient: list[float]) -> None:
    server.headers = {"Retry-After": "17"}
    server.script = [(429, "")]
    evaluate(chatty, tasks=tasks(server, files, limit=1))
    assert impatient == [17]


def test_a_judge_that_stays_silent_is_one_sentence_and_the_same_call_goes_on(server: StandIn, chatty: Path, files: Path,
                                                                            tmp_path: Path) -> None:  # fmt: skip
    server.script = ["[[9]]", "[[9]]", *[(502, f"bad gateway {KEY}")] * judge.ATTEMPTS]
    chosen = tasks(server, files, out=tmp_path / "r.json")
    found = evaluate(chatty, tasks=chosen).tasks["mt_bench"]
    assert (
        f"no answer in {judge.ATTEMPTS} attempts: HTTP 502 bad gateway ***" in found["error"]
        and "goes on" in found["error"]
    )
    kept = json.loads((tmp_path / "r.json").read_text())["identity"]["tasks"]
    assert sorted(kept) == ["mt_bench/111/answers", "mt_bench/81/answers", "mt_bench/81/turn 1", "mt_bench/81/turn 2"]
    asked = len(server.requests)
    again = evaluate(chatty, tasks=chosen).tasks["mt_bench"]
    assert again["score"] == (9 + 9 + 7 + 7) / 4 and len(server.requests) == asked + 2
    assert KEY not in (tmp_path / "r.json").read_text()


def test_a_judgement_without_a_rating_fails_by_name_and_the_others_are_still_made(
    server: StandIn, chatty: Path, files: Path, tmp_path: Path
) -> None:
    server.script = ["I would rather not say.", "[[5]]", "[[5]]", "Rating: [[11]]"]
    chosen = tasks(server, files, out=tmp_path / "r.json")
    found = evaluate(chatty, tasks=chosen).tasks["mt_bench"]["error"]
    assert (
        "2 of 6 parts failed, first mt_bench/81/turn 1" in found
        and "holds no [[rating]]: 'I would rather not say.'" in found
    )
    assert len(server.requests) == 4
    assert (
        evaluate(chatty, tasks=chosen).tasks["mt_bench"]["score"] == (7 + 5 + 5 + 7) / 4 and len(server.requests) == 6
    )


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("[[10]]", 10),
        ("Rating: [[7.5]] of 10", 7.5),
        ("so [4] it is", 4),
        ("[1][[2]]", 2),
        ("[[0]]", None),
        ("8/10", None),
    ],
)
def test_ratings(text: str, value: float | None) -> None:
    if value is None:
        with pytest.raises(Unrated):
            read_rating(text)
    else:
        assert read_rating(text) == value


@pytest.mark.parametrize(
    ("reply", "sentence"),
    [
        ((401, f"wrong key {KEY}"), r"refuses the key \(HTTP 401\) .*LEANGRID_JUDGE_KEY"),
        ((404, f"no such model; you sent {KEY}"), r"refuses the request \(HTTP 404\): no such model; you sent \*\*\*"),
        ((307, ""), r"HTTP 307"),
    ],
)
def test_what_cannot_pass_is_asked_once_and_never_shows_the_key(
    server: StandIn, reply: Reply, sentence: str, files: Path
) -> None:
    server.headers = {"Location": "http://127.0.0.1:9/elsewhere"} if reply[0] == 307 else {}  # type: ignore[index]
    server.script = [reply]
    with pytest.raises(TaskError, match=sentence) as raised:
        Judge.open(server.url, "m").ask("s", "p")
    assert KEY not in str(raised.value) and len(server.requests) == 1


def test_the_key_stays_out_of_everything_that_is_shown_or_written(
    server: StandIn, chatty: Path, files: Path, tmp_path: Path
) -> None:
    server.script = [f"You sent {KEY}. Rating: [[6]]"]
    assert KEY not in repr(Judge.open(server.url, "m"))
    done = CliRunner().invoke(
        app,
        [
            "eval",
            str(chatty),
            "--tasks",
            "mt_bench",
            "--tasks-dir",
            str(files),
            "--judge-url",
            server.url,
            "--limit",
            "1",
            "--out",
            str(tmp_path / "r.json"),
            "--json",
        ],
    )
    assert done.exit_code == 0 and json.loads(done.stdout)["tasks"]["mt_bench"]["score"] == 6.5
    assert (
        KEY not in done.stdout + done.stderr + (tmp_path / "r.json").read_text()
        and "You sent ***" in (tmp_path / "r.json").read_text()
    )
    assert "will be asked 2 times" in done.stderr


def test_useless_judges_are_refused_before_the_model_is_opened(server: StandIn, files: Path, tmp_path: Path,
                                                              monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    def refused(url: str | None, sentence: str) -> None:
        with pytest.raises(TaskError, match=sentence):
            evaluate(tmp_path / "no model", tasks=Tasks(("mt_bench",), files, judge_url=url))

    refused(None, "needs a judge.*--judge-url")
    refused("ftp://x", "no address of an API")
    refused("https://user:word@host/v1", "no address of an API")
    refused("http://judge.example/v1", "travel unencrypted")
    refused("http://127.0.0.1:1/v1", "cannot be reached")
    monkeypatch.delenv("LEANGRID_JUDGE_KEY")
    refused("https://judge.example/v1", "no key for the judge.*LEANGRID_JUDGE_KEY or OPENAI_API_KEY")
    Judge.open(server.url, "m").ask("s", "p")  # on this machine without a key
    assert server.keys == [None]


def test_files_and_models_that_cannot_serve(
    server: StandIn, files: Path, tiny: Callable[..., Path], tmp_path: Path
) -> None:
    with pytest.raises(TaskError, match=r"needs its published files.*FastChat"):
        mt_bench.read(None)
    with pytest.raises(TaskError, match=r"needs question.jsonl"):
        mt_bench.read(tmp_path)
    prompts = (files / "judge_prompts.jsonl").read_text()
    (files / "judge_prompts.jsonl").write_text(prompts.replace("{answer}", "{answer_b}"))
    with pytest.raises(TaskError, match="asks for what MT-Bench does not have: 'answer_b'"):
        mt_bench.read(files)
    (files / "judge_prompts.jsonl").write_text('{"name": "pair-v2", "system_prompt": "", "prompt_template": ""}\n')
    with pytest.raises(TaskError, match="lack single-math-v1, "):
        mt_bench.read(files)
    (files / "mt_bench" / "reference_answer" / "gpt-4.jsonl").write_text(
        '{"question_id": 1, "choices": [{"turns": ["a", "b"]}]}\n'
    )
    with pytest.raises(TaskError, match="a line lacks"):
        mt_bench.read(files)


def test_a_model_without_a_chat_template_is_refused(server: StandIn, files: Path, tiny: Callable[..., Path]) -> None:
    found = evaluate(tiny("llama3"), tasks=tasks(server, files)).tasks["mt_bench"]
    assert "has no chat template" in found["error"] and not server.requests
