"""Finds the text or the conversation in a row of a data set, in any of the usual layouts.

These are ``messages`` (OpenAI, TRL), ``conversations`` (ShareGPT), preference rows (the chosen answer is used) and
pairs such as ``instruction``/``input``/``output`` (Alpaca), ``prompt``/``completion`` and ``question``/``answer``.
Column names may have any letter case."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

CHATS = ("messages", "conversations", "conversation", "dialog", "dialogue", "chat", "turns")
_ASKED = ("instruction", "prompt", "question", "query", "problem", "input", "inputs", "user", "human")
_ANSWERED = ("output", "outputs", "completion", "response", "answer", "answers", "solution", "chosen", "target",
             "targets", "assistant", "gpt")  # fmt: skip
_MATERIAL = ("input", "context")  # the text that an instruction or question is about
_SYSTEM = ("system", "system_prompt", "system_message")
_WHO, _WHAT = ("role", "from", "speaker"), ("content", "value", "text", "parts")
_ROLES = {
    **dict.fromkeys(("user", "human", "prompter"), "user"),
    **dict.fromkeys(("assistant", "gpt", "chatgpt", "bot", "model", "ai", "bing", "bard", "claude"), "assistant"),
    **dict.fromkeys(("function_call", "tool_call"), "assistant"),
    **dict.fromkeys(("tool", "observation", "function_response", "tool_response"), "tool"),
    "system": "system",
}  # fmt: skip
_TRANSCRIPT = re.compile(r"(?:^|\n\n)(Human|Assistant): ?")  # Anthropic's hh-rlhf


@dataclass(frozen=True)
class Conversation:
    """A conversation in the form that chat templates take.

    ``messages``: dicts with ``role`` and ``content``, a string or parts (picture_rows.py). ``tools``: the tools that
    they may call; None for none.
    """

    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] | None = None

    @property
    def is_blank(self) -> bool:
        return not any(has_text(text) for message in self.messages for text in texts_in(message))


@dataclass(frozen=True)
class Found:
    """What was found in a row: a text or a conversation, or why there is neither.

    Attributes:
        columns: the columns it comes from.
        text: the text; None if there is a conversation or neither.
        conversation: the conversation; None if there is a text or neither.
        why: why there is neither; "" if there is one.
        media: how many parts of messages that are no text, such as pictures, were left out.
    """

    columns: tuple[str, ...] = ()
    text: str | None = None
    conversation: Conversation | None = None
    why: str = ""
    media: int = 0

    @property
    def is_blank(self) -> bool:
        return not has_text(self.text) if self.conversation is None else self.conversation.is_blank


@dataclass
class _Row:
    """A row with its columns by lower-case name; ``used`` lists the columns whose values have been used."""

    cells: Mapping[str, Any]
    names: dict[str, str] = field(init=False)
    used: list[str] = field(default_factory=list)
    media: int = 0

    def __post_init__(self) -> None:
        self.names = {str(name).strip().casefold(): name for name in reversed(list(self.cells))}

    def first(self, keys: tuple[str, ...], but: tuple[str, ...] = ()) -> tuple[str, Any]:
        """The first of ``keys`` (without ``but``) whose value is not empty, and the value; ("", None) if none is."""
        for key in keys:
            value = self.cells.get(self.names.get(key, ""))
            if (
                key in self.names
                and key not in but
                and value not in (None, [], {}, "")
                and (not isinstance(value, str) or has_text(value))
            ):
                return key, value
        return "", None

    def mark_used(self, key: str) -> None:
        if key and self.names[key] not in self.used:
            self.used.append(self.names[key])


def has_text(text: str | None) -> bool:
    """Whether ``text`` has a visible character; False for None."""
    return text is not None and any(character.isprintable() and not character.isspace() for character in text)


def texts_in(message: Mapping[str, Any]) -> list[str]:
    """The texts of a message, whose content is one or has several as parts."""
    content = message["content"]
    return [content] if isinstance(content, str) else [part["text"] for part in content if "text" in part]


def find_text(row: Any, column: str | None = None) -> Found:
    """Find the text or conversation in a row, which is a string, a list of messages, or a dict by column.

    Args:
        column: the only column to use; None: the first known layout of messages, text, prefix and gold_completion,
            pairs, chosen.
    """
    if isinstance(row, str):
        return Found(text=row) if column is None else Found(why=f"no column '{column}', for the text has none")
    if not isinstance(row, Mapping):
        messages, media = parse_messages(row)
        return (
            Found(conversation=Conversation(messages), media=media)
            if messages
            else Found(why=f"a row is {describe_value(row)}")
        )
    if column is not None:
        return _of_column(row, column)
    cells = _Row(row)
    for form in (_chat, _text, _prefixed, _pair, _chosen):
        cells.used, cells.media = [], 0
        found = form(cells)
        if found is not None:
            return found
    return _nothing(cells)


def _of_column(row: Mapping[str, Any], column: str) -> Found:
    if column not in row:
        return Found(why=f"no column '{column}'")
    value = row[column]
    messages, media = parse_messages(value)
    if messages:
        return Found((column,), conversation=_whole(_Row(row), messages), media=media)
    if value is None or isinstance(value, str):
        return Found((column,), text=value or "")
    return Found((column,), why=f"column '{column}' holds {describe_value(value)}, not text")


def _chat(row: _Row) -> Found | None:
    for key in CHATS:
        messages, media = parse_messages(row.cells.get(row.names.get(key, "")), by_turns=True)
        if messages:
            row.mark_used(key)
            conversation = _whole(row, messages)
            return Found(tuple(row.used), conversation=conversation, media=media)
    return None


def _text(row: _Row) -> Found | None:
    """The column ``text``; None if it only repeats a pair in other columns in another model's template (Alpaca)."""
    key, value = row.first(("text",))
    if not isinstance(value, str):
        return None
    pair = _paired(row)
    if pair and all(message["content"].strip() in value for message in pair if message["role"] == "assistant"):
        return None
    return Found((row.names[key],), text=value)


def _prefixed(row: _Row) -> Found | None:
    (one, prefix), (other, rest) = row.first(("prefix",)), row.first(("gold_completion",))
    if isinstance(prefix, str) and isinstance(rest, str):
        return Found((row.names[one], row.names[other]), text=prefix + rest)
    return None


def _pair(row: _Row) -> Found | None:
    messages = _paired(row)
    return Found(tuple(row.used), conversation=_whole(row, messages), media=row.media) if messages else None


def _paired(row: _Row) -> list[dict[str, Any]]:
    """The messages of a row with a question and an answer, each of them a text or messages; [] if one is missing."""
    asked, question = row.first(_ASKED)
    answered, answer = row.first(_ANSWERED, but=(asked,))
    turns, more = _turns(question, "user"), _turns(answer, "assistant")
    if not more or not answered:
        return []
    if any(message["role"] == "user" for message in more):  # a preference row: the answer is the whole conversation
        row.mark_used(answered)
        return more
    if not turns:
        return []
    row.mark_used(asked)
    about, material = row.first(_MATERIAL, but=(asked, answered))
    if isinstance(material, str) and isinstance(question, str):
        row.mark_used(about)
        turns[-1]["content"] += f"\n\n{material}"
    row.mark_used(answered)
    _, history = row.first(("history",))
    before: list[dict[str, Any]] = []
    if isinstance(history, list) and all(isinstance(pair, list | tuple) and len(pair) == 2 for pair in history):
        row.mark_used("history")
        before = [message for one, other in history for message in (*_turns(one, "user"), *_turns(other, "assistant"))]
    return [*before, *turns, *more]


def _chosen(row: _Row) -> Found | None:
    """The column ``chosen`` of a preference row without a prompt: a transcript as in hh-rlhf, or a plain text."""
    key, value = row.first(("chosen",))
    if not isinstance(value, str):
        return None
    row.mark_used(key)
    pieces = _TRANSCRIPT.split(value)
    if len(pieces) < 3 or has_text(pieces[0]):
        return Found(tuple(row.used), text=value)
    said = zip(pieces[1::2], pieces[2::2], strict=True)
    return Found(
        tuple(row.used),
        conversation=Conversation([{"role": _role(who), "content": what.strip()} for who, what in said]),
    )


def _nothing(row: _Row) -> Found:
    """Say why a row has no text: what its known columns hold instead, or that it has none."""
    for key in (*CHATS, "text"):
        if key in row.names:
            value = row.cells[row.names[key]]
            if isinstance(value, str) and has_text(value):
                return Found(
                    (row.names[key],), why=f"column '{row.names[key]}' holds plain text, not a list of messages"
                )
            if value not in (None, "", [], {}) and not isinstance(value, str):
                wanted = "text" if key == "text" else "messages with a role and a text"
                return Found(
                    (row.names[key],), why=f"column '{row.names[key]}' holds {describe_value(value)}, not {wanted}"
                )
            return Found((row.names[key],), text="")
    asked, answered = ([key for key in keys if key in row.names] for keys in (_ASKED, _ANSWERED))
    if asked and set(answered) - set(asked[:1]):
        names = row.names[asked[0]], row.names[answered[0]]
        strange = [f"column '{name}' holds {describe_value(row.cells[name])}, not text" for name in names
                   if not isinstance(row.cells[name], str | list | None)]  # fmt: skip
        if not strange and any(has_text(row.cells[name]) for name in names if isinstance(row.cells[name], str)):
            empty = next(name for name in names if not (isinstance(row.cells[name], str) and has_text(row.cells[name])))
            return Found(names, why=f"column '{empty}' is empty beside the other one")
        return Found(names, why=strange[0]) if strange else Found(names, text="")
    return Found(why="no column that is known")


def _whole(row: _Row, messages: list[dict[str, Any]]) -> Conversation:
    """A conversation of ``messages``, with the system message and tools that the row has in other columns."""
    key, system = row.first(_SYSTEM)
    if isinstance(system, str) and messages[0]["role"] != "system":
        row.mark_used(key)
        messages = [{"role": "system", "content": system}, *messages]
    _, tools = row.first(("tools",))
    tools = load_cell(tools)
    listed = isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)
    return Conversation(messages, _without_none(tools) if listed and tools else None)


def _turns(value: Any, role: str) -> list[dict[str, Any]]:
    """A question or answer as messages: its own messages, or one of ``role`` with its text (the first of several)."""
    messages = [] if isinstance(value, str) else parse_messages(value)[0]
    if messages:
        return messages
    if isinstance(value, Mapping):
        value = value.get("text")  # SQuAD's answers
    if isinstance(value, list):
        value = next((entry for entry in value if isinstance(entry, str)), None)
    return [{"role": role, "content": value}] if isinstance(value, str) and has_text(value) else []


def parse_messages(value: Any, by_turns: bool = False) -> tuple[list[dict[str, Any]], int]:
    """Convert ``value`` to messages with role and content; also returns how many parts that are no text were left out.

    ``value`` may be a list of messages or of pairs, a dict of lists, or JSON of these; with ``by_turns`` also a list of
    strings by user and assistant in turn. The list of messages is empty if it is none of these."""
    value = load_cell(value)
    if isinstance(value, Mapping) and all(isinstance(column, list) for column in value.values()):
        longest = min((len(column) for column in value.values()), default=0)
        value = [{name: column[index] for name, column in value.items()} for index in range(longest)]
    if not isinstance(value, list) or not value:
        return [], 0
    if by_turns and len(value) > 1 and all(isinstance(turn, str) for turn in value):
        return [{"role": ("user", "assistant")[index % 2], "content": turn} for index, turn in enumerate(value)], 0
    messages: list[dict[str, Any]] = []
    media = 0
    for entry in value:
        found, left_out = _message(entry)
        if found is None:
            return [], 0
        messages += found
        media += left_out
    return messages, media


def _message(entry: Any) -> tuple[list[dict[str, Any]] | None, int]:
    """One turn as messages: two for a pair, none for an empty one, None if it is no turn; and its parts left out."""
    if not isinstance(entry, Mapping):
        return None, 0
    who = next((key for key in _WHO if isinstance(entry.get(key), str)), None)
    what = next((key for key in _WHAT if key in entry), None)
    if who is None:
        row = _Row(entry)  # a turn as a pair of its own
        pair = _paired(row)
        return (_whole(row, pair).messages, 0) if pair else (None, 0)
    content, media = _content(entry[what] if what else None)
    calls = "tool_calls" in entry and bool(entry["tool_calls"])
    if content is None and not (calls or "reasoning_content" in entry):
        return ([] if what is not None and entry[what] is None else None), 0
    others = {key: _without_none(value) for key, value in entry.items() if key not in (who, what) and value is not None}
    message = {"role": _role(entry[who]), "content": content or ""}
    return [message | others if who == "role" else message], media


def _content(value: Any) -> tuple[str | None, int]:
    """The text of a message's content, with its text parts joined by line ends, and the number of its other parts.

    The text is None if the content has another form."""
    if isinstance(value, str) or value is None:
        return value, 0
    if isinstance(value, Mapping):
        value = [value]
    if not isinstance(value, list):
        return None, 0
    texts = [part if isinstance(part, str) else part.get("text") for part in value if isinstance(part, str | Mapping)]
    said = [text for text in texts if isinstance(text, str)]
    return "\n".join(said), len(value) - len(said)


def _role(name: str) -> str:
    return _ROLES.get(name.strip().casefold(), name)


def load_cell(value: Any) -> Any:
    """The list or object that a cell holds as JSON text; any other value as it is."""
    if isinstance(value, str) and value.lstrip()[:1] in ("[", "{"):
        try:
            return json.loads(value)
        except (ValueError, RecursionError):
            return value
    return value


def _without_none(value: Any) -> Any:
    """A copy without the keys whose value is None, which Parquet adds if other rows have them."""
    if isinstance(value, Mapping):
        return {key: _without_none(entry) for key, entry in value.items() if entry is not None}
    return [_without_none(entry) for entry in value] if isinstance(value, list) else value


def describe_value(value: Any) -> str:
    """What kind of value a cell holds, in words."""
    words = {
        type(None): "nothing",
        bool: "a truth value",
        int: "a number",
        float: "a number",
        str: "text",
        bytes: "bytes",
        list: "a list",
    }
    return words.get(type(value), "an object" if isinstance(value, Mapping) else type(value).__name__)
