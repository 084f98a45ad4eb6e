"""A model answers a prompt, streamed: the check that needs no figure."""

import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from leangrid.data.calibration import affixes
from leangrid.data.sampling import end_tokens, stream
from leangrid.errors import CalibrationError, CheckpointError
from leangrid.evaluate.opened import open_model
from leangrid.models.decoder import native_step


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
            CheckpointError: an encoder, which cannot answer. CalibrationError: no tokenizer, or an empty prompt.
        """
        subject = open_model(name, device, dense=False)
        if not subject.causal:
            raise CheckpointError("an encoder cannot answer", name, "Compare its embeddings: leangrid eval MODEL --reference SOURCE")
        if subject.tokenizer is None:
            raise CalibrationError("the model has no tokenizer", name, "Add its tokenizer files to the directory")
        ids = _prompt_ids(subject.tokenizer, prompt, raw)
        if not ids:
            raise CalibrationError("the prompt is empty", name, "Say something")
        return cls(name, prompt, subject.model, subject.tokenizer, ids)

    def pieces(self, new_tokens: int, temperature: float = 0.0, seed: int = 0) -> Iterator[str]:
        """The reply as it grows; a character whose bytes are not all there yet waits for them."""
        started = time.perf_counter()
        stop = end_tokens(self.model, self.tokenizer)
        for token in stream(self.model, self.ids, new_tokens, temperature=temperature, seed=seed, stop=stop, native_step=native_step):
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
        return {"model": self.name, "prompt": self.prompt, "text": self.text, "tokens": self.tokens, "seconds": round(self.seconds, 3),
                "tokens_per_second": round(self.tokens_per_second, 2)}  # fmt: skip


def _prompt_ids(tokenizer: Any, prompt: str, raw: bool) -> list[int]:
    if not raw and getattr(tokenizer, "chat_template", None):
        return chat_ids(tokenizer, [{"role": "user", "content": prompt}])
    return [*affixes(tokenizer).prefix, *tokenizer(prompt, add_special_tokens=False)["input_ids"]]


def chat_ids(tokenizer: Any, messages: list[dict[str, str]]) -> list[int]:
    """A conversation in the model's own chat template, ready for the next reply."""
    encoded = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=True)
    return list(encoded["input_ids"])
