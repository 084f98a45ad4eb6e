"""Turns conversations into the text that the model was trained on, with its tokenizer's chat template."""

import datetime
import hashlib
import json
import re
from typing import Any

from leangrid.data.conversations import Conversation, has_text, texts_in
from leangrid.errors import first_line

OWN, PLAIN = "the chat template of the model", "plain lines such as 'User: ...', for the tokenizer has no chat template"
# Instead of today's date, with which a template would give other bytes every day. It is Llama 3's own default.
_TODAY = datetime.date(2024, 7, 26)
_NOW = re.compile(r"""strftime_now\(\s*(["'])(.*?)\1\s*\)""")


class TemplateRefusal(Exception):
    """The chat template rejects a conversation; the message is what the template says."""


class Chat:
    """Turns conversations into text.

    If the template rejects or drops contents that are strings, they are given as parts ([{"type": "text", ...}]). If it
    rejects a system message, that is put before the first user message, and counted in ``merged``.

    Args:
        tokenizer: a tokenizer or processor of transformers. With None, or one without a template, the text is plain
            lines such as "User: ..." and "Assistant: ...".
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._template: Any = getattr(tokenizer, "chat_template", None) or None
        self._parts: bool | None = None
        self._closing = (
            () if self._template is None else tuple(getattr(tokenizer, "tokenizer", tokenizer).get_added_vocab())
        )
        self.merged = 0

    @property
    def name(self) -> str:
        """Which template is used, in words."""
        return PLAIN if self._template is None else OWN

    @property
    def sha256(self) -> str | None:
        """The sha256, in hex, of the template's text, or of the JSON of several named ones; None for plain lines."""
        if self._template is None:
            return None
        text = self._template if isinstance(self._template, str) else json.dumps(self._template, sort_keys=True)
        return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()

    def ends_itself(self, text: str) -> bool:
        """Whether a rendered conversation ends with white space or a special token, so that the next one can follow
        without a blank line."""
        return self._template is not None and (text[-1:].isspace() or text.endswith(self._closing))

    def render(self, conversation: Conversation) -> str:
        """The conversation as text, without the prompt for a next reply. TemplateRefusal if the template rejects it."""
        if self._template is None:
            said = (message for message in conversation.messages if has_text(message["content"]))
            return "\n".join(f"{message['role'].capitalize()}: {message['content']}" for message in said)
        if self._parts is None:
            self._parts = self._wants_parts()
        complaint = ""
        merged = _merge_system_message(conversation.messages)
        for parts in (self._parts, not self._parts):
            for messages in (conversation.messages, *merged):
                try:
                    text = self._apply_template(messages, conversation.tools, parts)
                except Exception as error:  # a template is a program: it may raise anything
                    complaint = complaint or first_line(error)
                    continue
                if not _contains_a_message(text, messages):
                    complaint = complaint or "it leaves out what the messages say"
                    continue
                self._parts = parts
                self.merged += messages is not conversation.messages
                return text
        raise TemplateRefusal(complaint)

    def _apply_template(self, messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None, parts: bool) -> str:
        template = self._choose_template(tools)
        if "developer" not in template:
            messages = [
                {**message, "role": "system"} if message["role"] == "developer" else message for message in messages
            ]
        if parts:
            messages = [{**message, "content": _as_parts(message["content"])} for message in messages]
        fixed = _NOW.sub(lambda found: json.dumps(_TODAY.strftime(found[2])), template)
        return self._tokenizer.apply_chat_template(
            messages, tools=tools, chat_template=fixed, tokenize=False, add_generation_prompt=False
        )

    def _wants_parts(self) -> bool:
        """Whether the template writes the contents of messages only if they are given as parts."""
        said = {role: f"{role} says quokka" for role in ("system", "user", "assistant")}
        for parts in (False, True):
            for roles in (("user", "assistant"), tuple(said)):
                try:
                    text = self._apply_template([{"role": role, "content": said[role]} for role in roles], None, parts)
                except Exception:
                    text = ""  # the conversations themselves will show what it refuses
                if all(said[role] in text for role in roles):
                    return parts
        return False

    def _choose_template(self, tools: list[dict[str, Any]] | None) -> str:
        """The text of the template; of several named ones, the one for tools or the default."""
        if isinstance(self._template, str):
            return self._template
        names = (["tool_use"] if tools else []) + ["default"]
        for name in names:
            if name in self._template:
                return self._template[name]
        raise TemplateRefusal(f"there are templates named {', '.join(sorted(self._template))}, and none is the default")


def _merge_system_message(messages: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """The messages with the system message put into the first user message, as the only entry of a list.

    Empty if the conversation does not begin with a system and a user message."""
    if len(messages) < 2 or (messages[0]["role"], messages[1]["role"]) not in (
        ("system", "user"),
        ("developer", "user"),
    ):
        return []
    system, content = "\n".join(texts_in(messages[0])), messages[1]["content"]
    if isinstance(content, str):
        content = f"{system}\n\n{content}"
    else:
        content = [{"type": "text", "text": f"{system}\n\n"}, *content]
    return [[{**messages[1], "content": content}, *messages[2:]]]


def _as_parts(content: Any) -> list[dict[str, Any]]:
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


def _contains_a_message(text: str, messages: list[dict[str, Any]]) -> bool:
    """Whether the text contains the start of at least one message other than the system's."""
    said = (text for message in messages if message["role"] != "system" for text in texts_in(message))
    starts = [text.strip()[:40] for text in said if has_text(text)]
    return not starts or any(start in text for start in starts)
