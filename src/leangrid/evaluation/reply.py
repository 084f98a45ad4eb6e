"""A model answers a prompt, token by token: what ``leangrid generate`` prints."""

import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from leangrid.data.calibration import find_affixes
from leangrid.data.sampling import find_end_tokens, stream_tokens
from leangrid.errors import CalibrationError, CheckpointError, first_line
from leangrid.evaluation.opened import Opened, load_model
from leangrid.inference.native_step import native_step

_RAW = "continue the prompt as it is, without the chat template: --raw"


@dataclass
class Reply:
    """A prompt and the reply to it.

    Attributes:
        subject: the model that answers.
        prompt: as it was given.
        ids: token ids of the prompt, in the chat template where there is one.
        text, tokens, seconds, new_ids: of the reply so far; they grow as ``stream_text`` is read.
    """

    subject: Opened
    prompt: str
    ids: list[int]
    text: str = ""
    tokens: int = 0
    seconds: float = 0.0
    new_ids: list[int] = field(default_factory=list)

    @classmethod
    def open(cls, name: str, prompt: str, device: str = "cpu", raw: bool = False) -> "Reply":
        """Load ``name`` and put ``prompt`` in its chat template, if it has one and ``raw`` does not forbid it.

        Raises:
            CheckpointError: an encoder, which cannot answer, or a chat template that cannot be applied.
            CalibrationError: no tokenizer, an empty prompt, or a token of it that the model has no embedding for.
        """
        subject = load_model(name, device, dense=False)
        if not subject.has_lm_head:
            what = "a model without a language-model head (an encoder, a base model, a classifier) cannot answer"
            raise CheckpointError(what, name, "Compare its hidden states: leangrid eval MODEL --reference SOURCE")
        if subject.tokenizer is None:
            raise CalibrationError("the model has no tokenizer", name, "Add its tokenizer files to the directory")
        templated = not raw and bool(getattr(subject.tokenizer, "chat_template", None))
        said = [{"role": "user", "content": prompt}]
        ids = (
            encode_chat(subject.tokenizer, said, f"Try to {_RAW}") if templated else _raw_ids(subject.tokenizer, prompt)
        )
        instead = f", or {_RAW}" if templated else ""
        if not ids:
            raise CalibrationError("the prompt is empty", name, f"Say something{instead}")
        require_rows(subject, ids, f"Leave it out{instead}")
        return cls(subject, prompt, ids)

    def stream_text(self, new_tokens: int, temperature: float = 0.0, seed: int = 0) -> Iterator[str]:
        """The reply piece by piece; a character whose bytes are spread over tokens comes with the last of them.

        Args:
            new_tokens: at most so many tokens.
            temperature: 0 takes the most likely token.
            seed: of the draws.

        Raises:
            CalibrationError: prompt and reply may be longer than the model takes.
        """
        limit, length = self.subject.positions, len(self.ids)
        if limit is not None and length + new_tokens > limit:
            way_out = f"Use --max-new-tokens {limit - length}" if length < limit else "Shorten the prompt"
            what = f"the prompt has {length} tokens and the reply up to {new_tokens}, but the model takes {limit}"
            raise CalibrationError(what, self.subject.name, way_out)
        started = time.perf_counter()
        model, tokenizer = self.subject.model, self.subject.tokenizer
        stop = find_end_tokens(model, tokenizer)
        for token in stream_tokens(
            model, self.ids, new_tokens, temperature=temperature, seed=seed, stop=stop, native_step=native_step
        ):
            self.new_ids.append(token)
            self.tokens, self.seconds = len(self.new_ids), time.perf_counter() - started
            text = str(tokenizer.decode(self.new_ids, skip_special_tokens=True))
            if text.endswith("\ufffd"):
                continue
            piece, self.text = text[len(self.text) :], text
            yield piece

    @property
    def tokens_per_second(self) -> float:
        """New tokens in a second; the time includes the pass over the prompt."""
        return self.tokens / self.seconds if self.seconds > 0 else 0.0

    def to_dict(self) -> dict[str, Any]:
        """The object that ``leangrid generate --json`` prints."""
        return {
            "model": self.subject.name,
            "prompt": self.prompt,
            "text": self.text,
            "tokens": self.tokens,
            "seconds": round(self.seconds, 3),
            "tokens_per_second": round(self.tokens_per_second, 2),
        }


def _raw_ids(tokenizer: Any, prompt: str) -> list[int]:
    return [*find_affixes(tokenizer).prefix, *tokenizer(prompt, add_special_tokens=False)["input_ids"]]


def encode_chat(tokenizer: Any, messages: list[dict[str, str]], way_out: str = "Mend the chat template") -> list[int]:
    """Token ids of a conversation in the model's own chat template, up to where the next reply begins.

    A template that does not take the contents as strings, or leaves them out, gets them as lists of parts, which
    multimodal templates expect. Raises CheckpointError, with ``way_out``, where neither works."""
    parts = [{**message, "content": [{"type": "text", "text": message["content"]}]} for message in messages]
    fault = "it leaves out what is said"
    for conversation in (messages, parts):
        try:
            if _renders_contents(tokenizer, conversation):
                encoded = tokenizer.apply_chat_template(
                    conversation, add_generation_prompt=True, tokenize=True, return_dict=True
                )
                return list(encoded["input_ids"])
        except MemoryError:
            raise
        except Exception as error:  # a template is a program of its author and can raise anything
            fault = first_line(error).rstrip(".") if conversation is messages else fault
    templates = tokenizer.chat_template
    if isinstance(templates, dict) and "default" not in templates:
        fault = f"there are several and none is called default: {', '.join(sorted(map(str, templates)))[:200]}"
    raise CheckpointError(
        f"the chat template cannot be applied: {fault}", getattr(tokenizer, "name_or_path", None) or None, way_out
    )


def _renders_contents(tokenizer: Any, conversation: list[dict[str, Any]]) -> bool:
    """Whether the template's text depends on the last content: some templates leave out a content of another type."""
    last = conversation[-1]["content"]
    other = last + "x" if isinstance(last, str) else [{**last[0], "text": last[0]["text"] + "x"}]
    both = (conversation, [*conversation[:-1], {**conversation[-1], "content": other}])
    one, two = (tokenizer.apply_chat_template(said, add_generation_prompt=True, tokenize=False) for said in both)
    return one != two


def require_rows(subject: Opened, ids: list[int], way_out: str) -> None:
    """CalibrationError, with ``way_out``, for the first token that the model's embedding has no row for."""
    rows = subject.embedding_rows
    token = None if rows is None else next((token for token in ids if token >= rows), None)
    if token is not None:
        named = f"token {token} ({subject.tokenizer.convert_ids_to_tokens(token)!r}) of the prompt"
        what = f"{named} has no row in the model's embedding of {rows}: the tokenizer is larger than the model"
        raise CalibrationError(what, subject.name, way_out)
