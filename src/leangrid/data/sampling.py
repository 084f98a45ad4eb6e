"""Draws text from the model itself: calibration windows without data, and the reply of ``leangrid generate``.

Both go token by token, by what the model keeps of those before (decoding.py)."""

import math
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from leangrid.data.calibration import find_affixes
from leangrid.data.decoding import Decoder
from leangrid.errors import CalibrationError

# (model, keys, values) -> step(token, position) -> logits, or None if there is no such step for this model.
NativeStep = Callable[[torch.nn.Module, list[Tensor], list[Tensor]], Callable[[int, int], Tensor] | None]

_TRIED, _TRIED_IN_REPLIES = 32, 6  # tokens on which ways of decoding are tried: a reply begins at once
_MANY_LAYERS = 128  # of a model whose config counts them in parts
_CACHE_BYTES = 2 << 30  # largest size of keys and values of one batch of windows


@torch.no_grad()
def sample_windows(
    model: torch.nn.Module,
    tokenizer: PreTrainedTokenizerBase | None,
    samples: int,
    length: int,
    seed: int = 0,
    batch: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Int64[Tensor, "samples length"]:
    """Draw windows of token ids from a causal model at temperature 1: int64 [samples, length], on the CPU.

    A window begins with the tokenizer's opening token (BOS), or with a random ordinary token if it has none. After an
    end-of-text token a new text begins in the same way, so that windows are full and hold no padding. The random
    numbers belong to window and position, so that they do not depend on ``batch``.

    Args:
        tokenizer: of the model; None: every token of the vocabulary is ordinary.
        batch: how many windows are drawn at once; None: as many as have 2 GiB of keys and values.
        progress: is called with (tokens drawn, tokens in total), at most every 16 steps.

    Raises:
        CalibrationError: the model gives no logits (an encoder), takes no text alone, or has fewer positions than
            ``length``.
    """
    config = _text_config(model)
    _check_length(config, length)
    start = _Start(model, tokenizer)
    uniform = torch.rand((2, samples, length), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    size = batch or max(1, _CACHE_BYTES // (length * _cache_bytes_a_token(model)))
    size = math.ceil(samples / math.ceil(samples / size))  # equal batches
    decoder, drawn = Decoder(model, length, start.words[: max(2, min(_TRIED, length))]), []
    for first in range(0, samples, size):
        report = None if progress is None else _offset(progress, first * length, samples * length)
        drawn.append(_draw(decoder, _device(model), start, uniform[:, first : first + size], report))
    return torch.cat(drawn)


@torch.no_grad()
def stream_tokens(
    model: torch.nn.Module,
    prompt: Sequence[int],
    new_tokens: int,
    *,
    temperature: float = 0.0,
    seed: int = 0,
    stop: Collection[int] = (),
    native_step: NativeStep | None = None,
) -> Iterator[int]:
    """Yield the token ids with which the model continues ``prompt``, up to ``new_tokens`` or a token of ``stop``.

    Args:
        prompt: token ids.
        temperature: 0 takes the most likely token.
        seed: of the random numbers, for a temperature above 0.
        native_step: makes a faster step from the model and the cache once the prompt is in it. None, or if it returns
            None: every token is a forward pass of the model.

    Raises:
        CalibrationError: the model gives no logits (an encoder), or has too few positions.
    """
    config = _text_config(model)
    _check_length(config, len(prompt) + new_tokens)
    device, generator = _device(model), torch.Generator().manual_seed(seed)
    middle = config.vocab_size // 2  # tokens that fill up a short prompt
    trial = [*prompt, *range(middle, middle + _TRIED_IN_REPLIES)][:_TRIED_IN_REPLIES]
    decoder = Decoder(model, len(prompt) + new_tokens, torch.tensor(trial))
    logits = decoder.logits(torch.tensor([list(prompt)], device=device))
    buffers = decoder.buffers
    step = None if native_step is None or buffers is None else native_step(model, *buffers)
    for position in range(len(prompt), len(prompt) + new_tokens):
        if temperature > 0:
            chosen = int(
                _draw_tokens(logits / temperature, torch.rand(1, generator=generator, dtype=torch.float64).to(device))
            )
        else:
            chosen = int(logits.argmax(-1))
        if chosen in stop:
            return
        yield chosen
        if position + 1 == len(prompt) + new_tokens:
            return
        logits = step(chosen, position)[None] if step else decoder.logits(torch.tensor([[chosen]], device=device))


class _Start:
    """How a text begins and ends, and how many ids may be drawn."""

    def __init__(self, model: torch.nn.Module, tokenizer: PreTrainedTokenizerBase | None) -> None:
        config = _text_config(model)
        rows = int(config.vocab_size)
        # Rows of the embedding beyond the tokenizer's are padding, which was never trained.
        self.allowed = rows if tokenizer is None else min(rows, len(tokenizer))
        special = set() if tokenizer is None else set(tokenizer.all_special_ids)
        self.words = torch.tensor([index for index in range(self.allowed) if index not in special])
        opening = () if tokenizer is None else find_affixes(tokenizer).prefix
        self.opening = opening[0] if opening else None
        self.ends = torch.tensor(sorted(find_end_tokens(model, tokenizer)), dtype=torch.int64)

    def token(self, uniform: Float[Tensor, " batch"]) -> Int64[Tensor, " batch"]:
        """The first token of each text; a random ordinary one, chosen by ``uniform`` in [0, 1), without a BOS."""
        if self.opening is not None:
            return torch.full(uniform.shape, self.opening, dtype=torch.int64)
        return self.words[(uniform * len(self.words)).long().clamp_max(len(self.words) - 1)]


def find_end_tokens(model: torch.nn.Module, tokenizer: PreTrainedTokenizerBase | None) -> set[int]:
    """The ids that end a text, from the generation config, the config and the tokenizer."""
    found: set[int] = set()
    holders = (getattr(model, "generation_config", None), getattr(model, "config", None), tokenizer)
    for holder in holders:
        value = getattr(holder, "eos_token_id", None)
        found.update([value] if isinstance(value, int) else value or [])
    return found


def _draw(
    decoder: Decoder,
    device: torch.device,
    start: _Start,
    uniform: Tensor,
    progress: Callable[[int], None] | None,
) -> Tensor:
    """Draw one batch of windows: int64 [batch, length].

    ``uniform``: float64 [2, batch, length] in [0, 1), for the tokens and for those that begin a text."""
    _, batch, length = uniform.shape
    decoder.restart()
    tokens = torch.empty((batch, length), dtype=torch.int64)
    tokens[:, 0] = start.token(uniform[1, :, 0])
    for position in range(1, length):
        previous = tokens[:, position - 1]
        logits = decoder.logits(previous[:, None].to(device))[:, : start.allowed]
        chosen = _draw_tokens(logits, uniform[0, :, position].to(device)).cpu()
        ended = torch.isin(previous, start.ends)
        tokens[:, position] = torch.where(ended, start.token(uniform[1, :, position]), chosen)
        if progress is not None and position % 16 == 0:
            progress(batch * position)
    return tokens


def _draw_tokens(logits: Float[Tensor, "batch vocab"], uniform: Float[Tensor, " batch"]) -> Int64[Tensor, " batch"]:
    """Draw one token for each row: the inverse of the cumulative distribution at ``uniform`` in [0, 1)."""
    cumulative = torch.softmax(logits.double(), -1).cumsum(-1)
    target = uniform[:, None] * cumulative[:, -1:]
    return torch.searchsorted(cumulative, target, right=True)[:, 0].clamp_max(logits.shape[-1] - 1)


def _cache_bytes_a_token(model: torch.nn.Module) -> int:
    config = _text_config(model)
    try:
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        width = heads * (getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)
    except (AttributeError, RuntimeError, ValueError):  # layers that differ in heads, or have none
        width = max((max(parameter.shape) for parameter in model.parameters() if parameter.ndim == 1), default=1)
    layers = getattr(config, "num_hidden_layers", _MANY_LAYERS)
    return max(1, 2 * layers * width * next(model.parameters()).element_size())


def _text_config(model: torch.nn.Module) -> Any:
    config: Any = model.config
    return config.get_text_config()


def _check_length(config: Any, length: int) -> None:
    limit = getattr(config, "max_position_embeddings", None)
    if isinstance(limit, int) and 0 < limit < length:
        raise CalibrationError(
            f"windows of {length} tokens, but the model takes {limit}", "--length", f"Use --length {limit}"
        )


def _device(model: torch.nn.Module) -> torch.device:
    return next(model.parameters()).device


def _offset(progress: Callable[[int, int], None], first: int, total: int) -> Callable[[int], None]:
    return lambda done: progress(first + done, total)
