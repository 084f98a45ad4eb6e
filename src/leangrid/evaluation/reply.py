"""A model answers a prompt, streamed: the check that needs no figure."""

import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from leangrid.data.calibration import affixes
from leangrid.data.sampling import end_tokens, stream
from leangrid.errors import CalibrationError, CheckpointError, first_line
from leangrid.evaluation.opened import open_model
from leangrid.inference.native_step import native_step

_RAW = "continue the prompt as it is, without the chat template: --raw"


@dataclass
class Reply:
    """A prompt ready to be answered; ``text``, ``tokens`` and ``seconds`` grow as ``pieces`` is read."""

    name: str
    prompt: str
    model: torch.nn.Module
    tokenizer: Any
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
                CalibrationError: no tokenizer, an empty prompt, or a token of it that the model has no row for.
        """
        subject = open_model(name, device, dense=False)
        if not subject.causal:
            what = "a model without a language-model head (an encoder, a base model, a classifier) cannot answer"
            raise CheckpointError(what, name, "Compare its hidden states: leangrid eval MODEL --reference SOURCE")
        if subject.tokenizer is None:
            raise CalibrationError("the model has no tokenizer", name, "Add its tokenizer files to the directory")
        templated = not raw and bool(getattr(subject.tokenizer, "chat_template", None))
        said = [{"role": "user", "content": prompt}]
        ids = chat_ids(subject.tokenizer, said, f"Try to {_RAW}") if templated else _raw_ids(subject.tokenizer, prompt)
        instead = f", or {_RAW}" if templated else ""
        if not ids:
            raise CalibrationError("the prompt is empty", name, f"Say something{instead}")
        require_rows(subject.model, subject.tokenizer, ids, name, f"Leave it out{instead}")
        return cls(name, prompt, subject.model, subject.tokenizer, ids)

    def pieces(self, new_tokens: int, temperature: float = 0.0, seed: int = 0) -> Iterator[str]:
        """The reply as it grows; a character whose bytes are not all there yet waits for them.

        CalibrationError where prompt and reply may be longer than the model's positions.
        """
        limit, length = getattr(_text_config(self.model), "max_position_embeddings", None), len(self.ids)
        if isinstance(limit, int) and length + new_tokens > limit:
            way_out = f"Use --max-new-tokens {limit - length}" if length < limit else "Shorten the prompt"
            what = f"the prompt has {length} tokens and the reply up to {new_tokens}, but the model takes {limit}"
            raise CalibrationError(what, self.name, way_out)
        started = time.perf_counter()
        stop = end_tokens(self.model, self.tokenizer)
        for token in stream(
            self.model, self.ids, new_tokens, temperature=temperature, seed=seed, stop=stop, native_step=native_step
        ):
            self.new_ids.append(token)
            self.tokens, self.seconds = len(self.new_ids), time.perf_counter() - started
            text = str(self.tokenizer.decode(self.new_ids, skip_special_tokens=True))
            if text.endswith("\ufffd"):
                continue
            piece, self.text = text[len(self.text) :], text
            yield piece

    @property
    def tokens_per_second(self) -> float:
        """New tokens a second, the prompt's pass included."""
        return self.tokens / self.seconds if self.seconds > 0 else 0.0

    def to_json(self) -> dict[str, Any]:
        return {
            "model": self.name,
            "prompt": self.prompt,
            "text": self.text,
            "tokens": self.tokens,
            "seconds": round(self.seconds, 3),
            "tokens_per_second": round(self.tokens_per_second, 2),
        }


def _raw_ids(tokenizer: Any, prompt: str) -> list[int]:
    return [*affixes(tokenizer).prefix, *tokenizer(prompt, add_special_tokens=False)["input_ids"]]


def chat_ids(tokenizer: Any, messages: list[dict[str, str]], way_out: str = "Mend the chat template") -> list[int]:
    """A conversation in the model's own chat template, ready for the next reply.

    A template that takes no strings, or leaves them out, gets the contents as lists of parts, as multimodal ones want
    them. Raises CheckpointError, with ``way_out``, where it can be applied neither way."""
    parts = [{**message, "content": [{"type": "text", "text": message["content"]}]} for message in messages]
    fault = "it leaves out what is said"
    for conversation in (messages, parts):
        try:
            if _heard(tokenizer, conversation):
                encoded = tokenizer.apply_chat_template(
                    conversation, add_generation_prompt=True, tokenize=True, return_dict=True
                )
                return list(encoded["input_ids"])
        except MemoryError:
            raise
        except Exception as error:  # a template is a program of a stranger: nobody can list what it raises
            fault = first_line(error).rstrip(".") if conversation is messages else fault
    templates = tokenizer.chat_template
    if isinstance(templates, dict) and "default" not in templates:
        fault = f"there are several and none is called default: {', '.join(sorted(map(str, templates)))[:200]}"
    raise CheckpointError(
        f"the chat template cannot be applied: {fault}", getattr(tokenizer, "name_or_path", None) or None, way_out
    )


def _heard(tokenizer: Any, conversation: list[dict[str, Any]]) -> bool:
    """Whether the template's text depends on what is said last: some render a content of another type as nothing."""
    last = conversation[-1]["content"]
    other = last + "x" if isinstance(last, str) else [{**last[0], "text": last[0]["text"] + "x"}]
    both = (conversation, [*conversation[:-1], {**conversation[-1], "content": other}])
    one, two = (tokenizer.apply_chat_template(said, add_generation_prompt=True, tokenize=False) for said in both)
    return one != two


def require_rows(model: torch.nn.Module, tokenizer: Any, ids: list[int], name: str, way_out: str) -> None:
    """CalibrationError for the first token that the model has no row of its embedding for."""
    embedding: Any = model.get_input_embeddings()  # type: ignore[operator]
    rows = int(embedding.weight.shape[0])
    beyond = next((token for token in ids if token >= rows), None)
    if beyond is not None:
        what = f"token {beyond} ({tokenizer.convert_ids_to_tokens(beyond)!r}) of the prompt has no row in the model's embedding of {rows}"
        raise CalibrationError(f"{what}: the tokenizer is larger than the model", name, way_out)


def _text_config(model: torch.nn.Module) -> Any:
    config: Any = model.config
    return config.get_text_config()
