"""A causal model token by token, whatever it keeps of the tokens before: keys and values, states, or nothing.

What a type of model keeps is not known beforehand, and one that ignores what it is given back answers all the same, as
if the last token stood alone. So each way is tried on a few tokens first, against one forward pass over all of them."""

import inspect
from collections.abc import Callable, Iterator
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from leangrid.errors import CalibrationError, first_line
from leangrid.machine.devices import is_out_of_memory

_FAR = (
    0.1  # of the logits' own length: more than rounding, and less than the .4 that tiny models were off without a cache
)
_WAY_OUT = "Calibrate it by --calibration c4 or a .txt/.jsonl file (best without its own text: --tune 4 --finish 4)"
_KEPT = ("past_key_values", "cache_params", "state", "mems")  # what models call what they keep, in and out


class BufferedLayer(DynamicLayer):
    """Keys and values of one layer in buffers for ``capacity`` tokens, doubled where a model keeps more of its own.

    Attention gets a view of the filled part. A cache that grows by concatenation copies itself at every token, which
    takes longer than the model for long windows."""

    def __init__(self, capacity: int) -> None:
        super().__init__()
        self.capacity, self.filled = capacity, 0

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        start, self.filled = self.filled, self.filled + key_states.shape[-2]
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self.key_buffer, self.value_buffer = key_states[..., :0, :], value_states[..., :0, :]
        if self.filled > self.key_buffer.shape[-2]:
            self.capacity = self.capacity if self.filled <= self.capacity else 2 * self.filled
            self.key_buffer = _longer(self.key_buffer, start, self.capacity)
            self.value_buffer = _longer(self.value_buffer, start, self.capacity)
        self.key_buffer[..., start : self.filled, :] = key_states
        self.value_buffer[..., start : self.filled, :] = value_states
        self.keys, self.values = self.key_buffer[..., : self.filled, :], self.value_buffer[..., : self.filled, :]
        return self.keys, self.values


def _longer(buffer: Tensor, filled: int, capacity: int) -> Tensor:
    """A buffer for ``capacity`` tokens with the first ``filled`` of ``buffer``."""
    longer = buffer.new_empty((*buffer.shape[:-2], capacity, buffer.shape[-1]))
    longer[..., :filled, :] = buffer[..., :filled, :]
    return longer


Step = Callable[[Tensor], Tensor]  # token ids [batch, tokens] that follow those before -> logits of the last


class Decoder:
    """The logits of the next token, token after token.

    Args:
        model: transformers' causal model, or one of ours.
        capacity: how many tokens are expected.
        trial: int64 ids of two ordinary tokens or more, on which the ways are tried.

    Attributes:
        buffers: keys and values of each layer, where all that the model keeps is in ``BufferedLayer``; else None. They
            are there after the first step.

    Raises:
        CalibrationError: the model gives no logits (an encoder), or takes no text alone.
    """

    def __init__(self, model: nn.Module, capacity: int, trial: Int64[Tensor, " tokens"]) -> None:
        self._model, self._capacity = model, capacity
        self._layers: list[Any] = []
        ways = (self._with_buffers, self._with_what_it_returns)
        ids = trial[None].to(next(model.parameters()).device)
        self._way = next((way for way in ways if self._is_right(way, ids)), self._from_the_start)
        if self._way == self._from_the_start:
            self._try_text(ids)
        self.restart()

    def restart(self) -> None:
        """Forget the tokens."""
        self._layers = []
        self._step = self._way()

    def logits(self, ids: Int64[Tensor, "batch tokens"]) -> Float[Tensor, "batch vocab"]:
        """The float32 logits of the last position, after ``ids`` followed the tokens before them."""
        return self._step(ids)

    @property
    def buffers(self) -> tuple[list[Tensor], list[Tensor]] | None:
        layers = self._layers
        if not layers or not all(isinstance(layer, BufferedLayer) and layer.is_initialized for layer in layers):
            return None
        return [layer.key_buffer for layer in layers], [layer.value_buffer for layer in layers]

    def _with_buffers(self) -> Step:
        """By transformers' cache for this config, whose keys and values are in buffers."""
        self._layers = list(_cache_layers(self._model, self._capacity))
        cache = Cache(layers=self._layers)
        return lambda ids: self._last(self._call(ids, past_key_values=cache, use_cache=True))

    def _with_what_it_returns(self) -> Step:
        """By giving the model back what it returned beside its logits."""
        kept: dict[str, Any] = {}
        taken = inspect.signature(self._model.forward).parameters

        def step(ids: Tensor) -> Tensor:
            out = self._call(ids, **kept, use_cache=True)
            found = {name: getattr(out, name, None) for name in _KEPT if name in taken}
            kept.update((name, value) for name, value in found.items() if value is not None)
            return self._last(out)

        return step

    def _from_the_start(self) -> Step:
        """By all tokens again, for models that keep nothing: slow, and always right."""
        before: list[Tensor] = []

        def step(ids: Tensor) -> Tensor:
            before[:] = [torch.cat((*before, ids), 1)]
            return torch.cat([self._last(self._call(one)) for one in before[0].split(1)])  # logits of one text at once

        return step

    def _try_text(self, ids: Tensor) -> None:
        try:
            self._from_the_start()(ids)
        except (TypeError, ValueError, AttributeError) as error:
            what = f"the model says nothing to text alone: {first_line(error)}"
            raise CalibrationError(what, type(self._model).__name__, _WAY_OUT) from error

    def _call(self, ids: Tensor, **kept: Any) -> Any:
        last = (
            {"logits_to_keep": 1}
            if ids.shape[1] > 1 and "logits_to_keep" in inspect.signature(self._model.forward).parameters
            else {}
        )
        return self._model(input_ids=ids, **kept, **last)

    def _last(self, out: Any) -> Tensor:
        logits = getattr(out, "logits", None)
        if logits is None:
            raise CalibrationError("an encoder has no next token to draw", type(self._model).__name__, _WAY_OUT)
        return logits[:, -1].float()

    def _is_right(self, way: Callable[[], Step], ids: Tensor) -> bool:
        """Whether this way, by the last two tokens one after the other, has the logits of one whole forward pass."""
        first = max(1, ids.shape[1] - 2)
        try:
            step = way()
            found = [step(part) for part in (ids[:, :first], *ids[:, first:].split(1, dim=1))]
            return _near(found[-1], self._from_the_start()(ids))
        except (MemoryError, CalibrationError):
            raise
        except Exception as error:  # the model's own code may raise anything at a cache that is not its own
            if isinstance(error, RuntimeError) and is_out_of_memory(error):
                raise
            return False


def _cache_layers(model: Any, capacity: int) -> Iterator[Any]:
    """What each layer of the model keeps. Layers with a sliding window store all tokens too; the attention mask limits
    what they use."""
    try:
        own = DynamicCache(config=model.config).layers
    except (AttributeError, KeyError, TypeError, ValueError):  # a config that transformers makes no cache for
        own = []
    if all(type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in own):
        own = [DynamicLayer() for _ in range(model.config.get_text_config().num_hidden_layers)]
    for layer in own:
        yield BufferedLayer(capacity) if type(layer) is DynamicLayer else layer


def _near(found: Tensor, expected: Tensor) -> bool:
    centred = expected - expected.mean(-1, keepdim=True)
    return float((found - expected).norm()) <= _FAR * float(centred.norm())
