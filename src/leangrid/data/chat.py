"""Conversations as the text that the model was trained on: through its tokenizer's own chat template."""

import datetime
import hashlib
import json
import re
from typing import Any

from leangrid.data.conversations import Conversation, has_text
from leangrid.errors import first_line

OWN, PLAIN = "the chat template of the model", "plain lines such as 'User: ...', for the tokenizer has no chat template"
_TODAY = datetime.date(
    2024, 7, 26
)  # Llama 3's own default: a template that writes today's date would give other bytes every day
_NOW = re.compile(r"""strftime_now\(\s*(["'])(.*?)\1\s*\)""")


class TemplateRefusal(Exception):
    """A conversation that the chat template does not take; the message is the template's own complaint."""


class Chat:
    """Turns conversations into text.

    Where the template refuses or drops contents that are strings, they are given as parts ([{"type": "text", ...}]);
    where it refuses a system message, that is put before the first user message, and counted in ``merged``.

    Args:
        tokenizer: of transformers, whose template it is; None, or one without a template: plain lines ("User: ...",
        "Assistant: ...").
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._template: Any = getattr(tokenizer, "chat_template", None) or None
        self._parts: bool | None = None
        self._closing = () if self._template is None else tuple(tokenizer.get_added_vocab())
        self.merged = 0

    @property
    def name(self) -> str:
        """Which template it is, in words."""
        return PLAIN if self._template is None else OWN

    @property
    def sha256(self) -> str | None:
        """Of the template's text (of its JSON where there are several by name); None for plain lines."""
        if self._template is None:
            return None
        text = self._template if isinstance(self._template, str) else json.dumps(self._template, sort_keys=True)
        return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()

    def closes(self, text: str) -> bool:
        """Whether a rendered conversation ends with a line end or a token of its own, so that the next one may follow
        at once."""
        return self._template is not None and (text[-1:].isspace() or text.endswith(self._closing))

    def render(self, conversation: Conversation) -> str:
        """The conversation as text, without a prompt for the next reply. TemplateRefusal: the template's complaint."""
        if self._template is None:
            said = (message for message in conversation.messages if has_text(message["content"]))
            return "\n".join(f"{message['role'].capitalize()}: {message['content']}" for message in said)
        if self._parts is None:
            self._parts = self._wants_parts()
        complaint = ""
        merged = _merged(conversation.messages)
        for parts in (self._parts, not self._parts):
            for messages in (conversation.messages, *merged):
                try:
                    text = self._applied(messages, conversation.tools, parts)
                except Exception as error:  # a template is a program: it may raise anything
                    complaint = complaint or first_line(error)
                    continue
                if not _says(text, messages):
                    complaint = complaint or "it leaves out what the messages say"
                    continue
                self._parts = parts
                self.merged += messages is not conversation.messages
                return text
        raise TemplateRefusal(complaint)

    def _applied(self, messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None, parts: bool) -> str:
        template = self._chosen(tools)
        if "developer" not in template:
            messages = [
                {**message, "role": "system"} if message["role"] == "developer" else message for message in messages
            ]
        if parts:
            messages = [{**message, "content": [{"type": "text", "text": message["content"]}]} for message in messages]
        fixed = _NOW.sub(lambda found: json.dumps(_TODAY.strftime(found[2])), template)
        return self._tokenizer.apply_chat_template(
            messages, tools=tools, chat_template=fixed, tokenize=False, add_generation_prompt=False
        )

    def _wants_parts(self) -> bool:
        """Whether the template writes contents out only where they are given as parts."""
        said = {role: f"{role} says quokka" for role in ("system", "user", "assistant")}
        for parts in (False, True):
            for roles in (("user", "assistant"), tuple(said)):
                try:
                    text = self._applied([{"role": role, "content": said[role]} for role in roles], None, parts)
                except Exception:
                    text = ""  # the conversations themselves will show what it refuses
                if all(said[role] in text for role in roles):
                    return parts
        return False

    def _chosen(self, tools: list[dict[str, Any]] | None) -> str:
        """The template's text, of several by name the one for tools or the default."""
        if isinstance(self._template, str):
            return self._template
        names = (["tool_use"] if tools else []) + ["default"]
        for name in names:
            if name in self._template:
                return self._template[name]
        raise TemplateRefusal(f"there are templates named {', '.join(sorted(self._template))}, and none is the default")


def _merged(messages: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """The messages with the system's put before the first user's, where there are both."""
    if len(messages) < 2 or (messages[0]["role"], messages[1]["role"]) not in (
        ("system", "user"),
        ("developer", "user"),
    ):
        return []
    return [[{**messages[1], "content": f"{messages[0]['content']}\n\n{messages[1]['content']}"}, *messages[2:]]]


def _says(text: str, messages: list[dict[str, Any]]) -> bool:
    """Whether any of the messages can be read in the text, the system's aside."""
    starts = [
        message["content"].strip()[:40]
        for message in messages
        if message["role"] != "system" and has_text(message["content"])
    ]
    return not starts or any(start in text for start in starts)
