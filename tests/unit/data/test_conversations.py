"""Rows of conversations in every usual layout become the text of the model's own chat template, and nothing else of the
row does."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import tiny_models
from corpus_texts import read_texts
from transformers import PreTrainedTokenizerFast

from leangrid.data.calibration import make_windows
from leangrid.data.chat import PLAIN, Chat, TemplateRefusal
from leangrid.data.conversations import Conversation, find_text
from leangrid.data.corpora import read_documents, read_joined_text
from leangrid.data.documents import Reading
from leangrid.errors import CalibrationError
from leangrid.recipe import Recipe

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|more|>{% endif %}"
)
ASK, ANSWER = "how are you", "i am fine"
USER, ASSISTANT = {"role": "user", "content": ASK}, {"role": "assistant", "content": ANSWER}
PAIR = f"<bos><|user|>{ASK}\n<|assistant|>{ANSWER}\n"
SAID = PAIR.removeprefix("<bos>")


def tokenizer(template: Any = TEMPLATE) -> PreTrainedTokenizerFast:
    made = copy.deepcopy(tiny_models.tokenizer())
    made.chat_template = template
    return made


def written(folder: Path, rows: list[Any]) -> str:
    file = folder / "rows.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    return str(file)


LAYOUTS: dict[str, tuple[dict[str, Any] | list[Any], str]] = {
    "messages": ({"messages": [USER, ASSISTANT]}, PAIR),
    "a turn without content": ({"messages": [USER, {"role": "assistant", "content": None}, ASSISTANT]}, PAIR),
    "an id and a url beside": ({"id": "conversation-1", "url": "https://x.org", "messages": [USER, ASSISTANT]}, PAIR),
    "a text beside": ({"text": "### other", "messages": [USER, ASSISTANT]}, PAIR),
    "a prompt beside": ({"prompt": "p", "prompt_id": "q", "messages": [USER, ASSISTANT]}, PAIR),
    "parts": ({"messages": [{"role": "user", "content": [{"type": "text", "text": ASK}]}, ASSISTANT]}, PAIR),
    "Gemini's parts": (
        {"messages": [{"role": "user", "parts": [{"text": ASK}]}, {"role": "model", "parts": [{"text": ANSWER}]}]},
        PAIR,
    ),
    "ShareGPT": (
        {"id": "a", "conversations": [{"from": "human", "value": ASK}, {"from": "gpt", "value": ANSWER}]},
        PAIR,
    ),
    "roles in conversations": ({"conversations": [USER, ASSISTANT]}, PAIR),
    "a system column": ({"system": "be kind", "conversations": [USER, ASSISTANT]}, f"<bos><|system|>be kind\n{SAID}"),
    "a dict of lists": ({"messages": {"role": ["user", "assistant"], "content": [ASK, ANSWER]}}, PAIR),
    "JSON in a cell": ({"messages": json.dumps([USER, ASSISTANT])}, PAIR),
    "a list alone": ([USER, ASSISTANT], PAIR),
    "strings by turns": ({"dialog": [ASK, ANSWER]}, PAIR),
    "a pair a turn": ({"conversation": [{"human": ASK, "assistant": ANSWER}]}, PAIR),
    "XTuner": (
        {"conversation": [{"system": "be kind", "input": ASK, "output": ANSWER}]},
        f"<bos><|system|>be kind\n{SAID}",
    ),
    "prompt and completion": ({"prompt": ASK, "completion": ANSWER}, PAIR),
    "TRL's prompt and completion": ({"prompt": [USER], "completion": [ASSISTANT]}, PAIR),
    "preference": ({"prompt": ASK, "chosen": ANSWER, "rejected": "no"}, PAIR),
    "preference in messages": (
        {"chosen": [USER, ASSISTANT], "rejected": [USER, {"role": "assistant", "content": "no"}]},
        PAIR,
    ),
    "the prompt said twice": ({"prompt": ASK, "chosen": [USER, ASSISTANT], "rejected": []}, PAIR),
    "the prompt apart": ({"prompt": [USER], "chosen": [ASSISTANT], "rejected": []}, PAIR),
    "hh-rlhf": ({"chosen": f"\n\nHuman: {ASK}\n\nAssistant: {ANSWER}", "rejected": "x"}, PAIR),
    "Alpaca": ({"instruction": ASK, "input": "", "output": ANSWER}, PAIR),
    "Alpaca with its text": (
        {"instruction": ASK, "input": "", "output": ANSWER, "text": f"### Response: {ANSWER}"},
        PAIR,
    ),
    "Alpaca's input": ({"instruction": ASK, "input": "now", "output": ANSWER}, PAIR.replace(ASK, f"{ASK}\n\nnow")),
    "Dolly": (
        {"instruction": ASK, "context": "now", "response": ANSWER, "category": "c"},
        PAIR.replace(ASK, f"{ASK}\n\nnow"),
    ),
    "capitals": ({"Instruction": ASK, "Output": ANSWER}, PAIR),
    "question and answer": ({"question": ASK, "answer": ANSWER}, PAIR),
    "SQuAD": ({"id": "5", "question": ASK, "answers": {"text": [ANSWER, "x"], "answer_start": [1, 2]}}, PAIR),
    "query and response": ({"query": ASK, "response": ANSWER}, PAIR),
    "OpenOrca": (
        {"id": "a", "system_prompt": "be kind", "question": ASK, "response": ANSWER},
        f"<bos><|system|>be kind\n{SAID}",
    ),
    "input and output": ({"input": ASK, "output": ANSWER}, PAIR),
    "an answer that is JSON": ({"question": ASK, "answer": '["a", "b"]'}, PAIR.replace(ANSWER, '["a", "b"]')),
    "history": (
        {"instruction": ASK, "output": ANSWER, "history": [["a", "b"]]},
        f"<bos><|user|>a\n<|assistant|>b\n{SAID}",
    ),
    "a text of its own beside a pair": ({"text": "a document", "question": ASK, "answer": ANSWER}, "a document"),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_row_becomes_the_template_s_text(layout: str, tmp_path: Path) -> None:
    row, expected = LAYOUTS[layout]
    assert list(read_texts(written(tmp_path, [row]), tokenizer=tokenizer())) == [expected]


def test_what_was_used_is_said(tmp_path: Path) -> None:
    reading = Reading("rows")
    list(read_texts(written(tmp_path, [LAYOUTS["Alpaca's input"][0]]), tokenizer=tokenizer(), reading=reading))
    assert reading.columns == ["instruction", "input", "output"]
    assert reading.describe_source() == "columns 'instruction' + 'input' + 'output' in the chat template of the model"
    assert reading.template_sha256 == Chat(tokenizer()).sha256 != Chat(tokenizer(TEMPLATE + " ")).sha256


def test_a_named_column_is_used_and_no_other(tmp_path: Path) -> None:
    file = written(tmp_path, [{"text": "no", "messages": [ASSISTANT], "body": "yes", "talk": [USER, ASSISTANT]}])
    assert list(read_texts(file, tokenizer=tokenizer(), column="body")) == ["yes"]
    assert list(read_texts(file, tokenizer=tokenizer(), column="talk")) == [PAIR]


def test_pictures_are_left_out_and_counted(tmp_path: Path) -> None:
    reading = Reading("rows")
    parts = [{"type": "image", "url": "http://x"}, {"type": "text", "text": ASK}]
    file = written(tmp_path, [{"messages": [{"role": "user", "content": parts}, ASSISTANT]}])
    assert list(read_texts(file, tokenizer=tokenizer(), reading=reading)) == [PAIR]
    assert reading.media == 1 and "pictures" in reading.list_notices()[0]


def test_tools_reach_the_template() -> None:
    calls = [{"function": {"name": "look", "arguments": {"at": "x", "other": None}}}]
    row = {
        "messages": [USER, {"role": "assistant", "content": None, "tool_calls": calls}],
        "tools": [{"function": {"name": "look"}}],
    }
    chat = Chat(
        tokenizer(
            "{{ tools | tojson }}{% for m in messages %}{{ m.content }}"
            "{{ m.tool_calls | tojson if m.tool_calls }}{% endfor %}"
        )
    )
    found = find_text(row).conversation
    assert found is not None
    assert (
        chat.render(found)
        == '[{"function": {"name": "look"}}]how are you[{"function": {"name": "look", "arguments": {"at": "x"}}}]'
    )


def test_conversations_follow_each_other_as_the_template_ends_them(tmp_path: Path) -> None:
    rows = [{"messages": [USER, ASSISTANT]}] * 2
    assert read_joined_text(written(tmp_path, rows), tokenizer=tokenizer()) == PAIR * 2
    closed = "{% for m in messages %}{{ m.content }}{% endfor %}<eos>"
    assert read_joined_text(written(tmp_path, rows), tokenizer=tokenizer(closed)) == f"{ASK}{ANSWER}<eos>" * 2
    open_ended = closed.removesuffix("<eos>")
    assert (
        read_joined_text(written(tmp_path, rows), tokenizer=tokenizer(open_ended)) == f"{ASK}{ANSWER}\n\n{ASK}{ANSWER}"
    )


def test_the_opening_token_is_there_once(tmp_path: Path) -> None:
    own = tokenizer()
    own.add_bos_token = True
    dressed = tokenizer("{% for m in messages %}{{ m.content }}\n{% endfor %}")
    dressed.add_bos_token = True
    file = written(tmp_path, [{"messages": [USER, ASSISTANT]}] * 20)
    recipe = Recipe(calibration=file, samples=2, length=16)
    for each in (own, dressed):
        if each("word")["input_ids"][0] != each.bos_token_id:  # a tokenizer of before 5.18 does not hear of it
            pytest.skip("the tokenizer cannot be told to open its texts")
        start = make_windows(recipe, each)[0].tolist()
        assert start[0] == each.bos_token_id != start[1]


def test_without_a_template_lines_are_plain_and_it_is_said(tmp_path: Path) -> None:
    reading = Reading("rows")
    file = written(tmp_path, [{"messages": [USER, ASSISTANT]}])
    assert list(read_texts(file, tokenizer=tokenizer(None), reading=reading)) == [f"User: {ASK}\nAssistant: {ANSWER}"]
    assert (
        reading.template == PLAIN
        and "no chat template" in reading.describe_source()
        and reading.template_sha256 is None
    )


@pytest.mark.fault("N13")
@pytest.mark.parametrize(
    ("template", "told"),
    [
        ("{{ raise_exception('A system message is required') }}", "A system message is required"),
        ("{% for m in messages %}{{ m.content }}", "endfor"),
        ({"rag": TEMPLATE, "tool_use": TEMPLATE}, "templates named rag, tool_use"),
        ("nothing of it", "leaves out what the messages say"),
    ],
)
def test_a_template_that_takes_nothing_is_refused_with_its_complaint(template: Any, told: str, tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match="chat template") as caught:
        list(read_texts(written(tmp_path, [{"messages": [USER, ASSISTANT]}] * 3), tokenizer=tokenizer(template)))
    assert told in str(caught.value) and "\n" not in str(caught.value)


def test_what_a_template_needs_is_given_and_said(tmp_path: Path) -> None:
    parts = "{% for m in messages %}<{{ m.role }}>{% for p in m['content'] %}{{ p['text'] }}{% endfor %}{% endfor %}"
    system = {"role": "system", "content": "be kind"}
    assert Chat(tokenizer(parts)).render(Conversation([system, USER])) == f"<system>be kind<user>{ASK}"
    strict = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}" + TEMPLATE
    reading = Reading("rows")
    assert list(
        read_texts(
            written(tmp_path, [{"messages": [system, USER, ASSISTANT]}]), tokenizer=tokenizer(strict), reading=reading
        )
    ) == [PAIR.replace(ASK, f"be kind\n\n{ASK}")]
    assert "before the user's" in reading.list_notices()[0]
    named = Chat(tokenizer({"default": TEMPLATE, "rag": "x"}))
    assert named.render(Conversation([USER, ASSISTANT])) == PAIR


def test_single_conversations_that_a_template_refuses_are_left_out_and_said(tmp_path: Path) -> None:
    strict = "{% if messages[0].role != 'user' %}{{ raise_exception('roles must alternate') }}{% endif %}" + TEMPLATE
    reading = Reading("rows")
    rows = [{"messages": [ASSISTANT, USER]}, {"messages": [USER, ASSISTANT]}]
    assert list(read_texts(written(tmp_path, rows), tokenizer=tokenizer(strict), reading=reading)) == [PAIR]
    assert reading.list_notices() == ["rows: 1 of 2 rows left out (the chat template refuses: roles must alternate)"]
    with pytest.raises(TemplateRefusal):
        Chat(tokenizer(strict)).render(Conversation([ASSISTANT, USER]))


def test_a_template_that_writes_the_date_gives_the_same_text_every_day() -> None:
    dated = Chat(
        tokenizer(
            """{{ strftime_now("%Y-%m-%d") }} {{ strftime_now('%d %b %Y') }} """
            "{% for m in messages %}{{ m.content }}{% endfor %}"
        )
    )
    assert dated.render(Conversation([USER])) == f"2024-07-26 26 Jul 2024 {ASK}"


def test_halves_of_characters_do_not_reach_the_tokenizer(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text('{"text": "a \\ud83d\\ude00 \\ud800 b"}')
    assert [document.text for document in read_documents(str(file))] == ["a 😀 \ufffd b"]


def test_half_a_pair_is_named_and_blank_text_shows_the_columns(tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match=r"column 'prompt' is empty beside.*there are: prompt, completion"):
        read_joined_text(written(tmp_path, [{"prompt": None, "completion": "one"}] * 3), tokenizer=tokenizer())
    with pytest.raises(CalibrationError, match=r"all of its 3 rows are blank; there are: text, content"):
        read_joined_text(written(tmp_path, [{"text": "", "content": "one"}] * 3), tokenizer=tokenizer())
