"""generate: a chat template or a prompt that does not fit the model is one sentence, with --raw as the way out."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from leangrid.cli.app import app
from leangrid.errors import CalibrationError, CheckpointError
from leangrid.evaluation import reply
from leangrid.evaluation.opened import Opened
from leangrid.evaluation.reply import Reply, encode_chat, require_rows

Tiny = Callable[..., Path]
SAID = [{"role": "user", "content": "hello there"}]
GOOD = "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}{% endfor %}"
RAISES = "{% if messages[0]['role'] != 'system' %}{{ raise_exception('A system message\nis required.') }}{% endif %}"
PARTS = "{% for m in messages %}{% for p in m['content'] %}{{ p['text'] }}{% endfor %}{% endfor %}"
STRICT_PARTS = "{% for m in messages %}{% for p in m['content'] %}{{ p['text'] + '' }}{% endfor %}{% endfor %}"


@pytest.fixture
def chatty(tiny: Tiny, tmp_path: Path) -> Callable[[Any], Path]:
    def make(template: Any) -> Path:
        source = Path(shutil.copytree(tiny("llama3"), tmp_path / "m"))
        config = json.loads((source / "tokenizer_config.json").read_text()) | {"chat_template": template}
        (source / "tokenizer_config.json").write_text(json.dumps(config))
        return source

    return make


@pytest.mark.parametrize(
    ("template", "said"),
    [
        (RAISES, "A system message"),
        ("{% for m in messages %}{{ m.content }}", "Unexpected end of template"),
        ("always the same", "leaves out what is said"),
        ("{{ messages[0].content.nothing.at_all }}", "no attribute"),
        ("{{ messages | no_such_filter }}", "no_such_filter"),
        (
            [{"name": "rag", "template": GOOD}, {"name": "tool_use", "template": GOOD}],
            "none is called default: rag, tool_use",
        ),
    ],
)
def test_a_template_that_cannot_be_applied_is_one_sentence_and_raw_the_way_out(
    chatty: Callable[[Any], Path], template: Any, said: str
) -> None:
    source = str(chatty(template))
    done = CliRunner().invoke(app, ["generate", source, "hello", "--max-new-tokens", "2"], prog_name="leangrid")
    assert (
        done.exit_code == 2
        and said in done.stderr
        and done.stderr.startswith("error: the chat template cannot be applied")
    )
    assert done.stderr.count("\n") == 1 and done.stderr.strip().endswith("--raw") and not done.stdout
    assert Reply.open(source, "hello", raw=True).ids


@pytest.mark.parametrize("template", [PARTS, STRICT_PARTS])
def test_a_template_that_wants_parts_gets_them(chatty: Callable[[Any], Path], template: str) -> None:
    opened = Reply.open(str(chatty(template)), "hello there")
    assert "hello there" in opened.subject.tokenizer.decode(opened.ids)


def test_a_sound_template_is_given_strings() -> None:
    seen: list[Any] = []

    def apply(conversation: Any, tokenize: bool, **_: Any) -> Any:
        seen.append(conversation[-1]["content"])
        return {"input_ids": [1, 2]} if tokenize else str(conversation)

    assert encode_chat(SimpleNamespace(apply_chat_template=apply, chat_template=GOOD), SAID) == [1, 2]
    assert all(isinstance(content, str) for content in seen)


def test_memory_that_runs_out_is_not_the_templates_fault() -> None:
    def apply(*_: Any, **__: Any) -> Any:
        raise MemoryError

    with pytest.raises(MemoryError):
        encode_chat(SimpleNamespace(apply_chat_template=apply, chat_template=GOOD), SAID)


def test_a_token_without_a_row_is_named() -> None:
    model = torch.nn.Module()
    model.get_input_embeddings = lambda: torch.nn.Embedding(4, 2)  # type: ignore[assignment]
    tokenizer = SimpleNamespace(convert_ids_to_tokens=lambda token: f"<{token}>")
    subject = Opened("m", Path("m"), model, tokenizer, has_lm_head=True)
    require_rows(subject, [0, 3], "")
    with pytest.raises(
        CalibrationError,
        match=r"token 4 \('<4>'\) of the prompt has no row in the model's embedding of 4.*Leave it out",
    ):
        require_rows(subject, [0, 4, 9], "Leave it out")


def test_prompts_that_leave_no_room_say_what_would_fit(tiny: Tiny) -> None:
    opened = Reply.open(str(tiny("llama3")), "hello there", raw=True)
    limit = opened.subject.positions or 0
    with pytest.raises(CalibrationError, match=f"Use --max-new-tokens {limit - len(opened.ids)}"):
        next(opened.stream_text(limit))
    opened.ids = opened.ids * limit
    with pytest.raises(CalibrationError, match="Shorten the prompt"):
        next(opened.stream_text(1))


def test_an_empty_reply_is_said(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reply, "stream_tokens", lambda *_, **__: iter(()))
    done = CliRunner().invoke(
        app, ["generate", str(tiny("llama3")), "hello", "--max-new-tokens", "2"], prog_name="leangrid"
    )
    assert done.exit_code == 0 and "ended its reply at once" in done.stderr and "--raw" in done.stderr
    with pytest.raises(CheckpointError):
        encode_chat(SimpleNamespace(chat_template=GOOD), SAID)
