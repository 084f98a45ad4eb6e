"""How strongly the model's output reacts to each unit of linears: the distance from the original of a model in which
that unit alone is rounded, for all units in one pass.

The original and one stream for each unit go through the model side by side, a block in memory at a time. A unit's
stream leaves the original's at the unit's block, where the unit's weights are rounded to the nearest level, and goes on
through original blocks."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from leangrid.gate.side_by_side import outputs, rounded_weight
from leangrid.metrics.divergence import divergence
from leangrid.models.flow import ChainedFlow, Flow, LiveFlow
from leangrid.models.model_inputs import Inputs
from leangrid.planning.budget import Unit
from leangrid.recipe import Recipe
from leangrid.run.run import Run

_ORIGINAL = "original"


class Probes:
    """The streams of all units on their way.

    Args:
        run: the measuring run, which stands before its first block.
        units: of the whole model.
        windows: what the distance is measured on: token ids, int64 [1, length] each, or rows with pictures.
    """

    def __init__(self, run: Run, units: Sequence[Unit], windows: Sequence[Inputs]) -> None:
        self._run, self._units, self._windows = run, units, windows
        skeleton, places = run.skeleton, run.states
        self._flow: Flow = (
            LiveFlow(skeleton, run.device, places.get, beside=True)
            if isinstance(run.flow, LiveFlow)
            else ChainedFlow(skeleton, run.device, looked_at=0)  # there are many streams; the run's own are looked at
        )
        self._names = [_ORIGINAL, *map(str, range(len(units)))]
        entered = self._flow.enter(windows, places.put, *self._names)
        self._states: dict[str, list[Tensor]] = {_ORIGINAL: entered}
        if not self._flow.waits:  # each stream is a pass of its own from the beginning
            self._states = {name: list(entered) for name in self._names}

    def through(self, index: int, block: nn.Module, rounding: Mapping[int, Recipe]) -> None:
        """Let all streams go through ``block``, number ``index``, and on to the next.

        Args:
            rounding: for each of the block's units, by number, the recipe by whose scheme it is rounded.
        """
        left = {name: self._call(name, index, block) for name in self._states if int_of(name) not in rounding}
        for number, recipe in rounding.items():
            with self._rounded(block, self._units[number].paths, recipe):
                left[str(number)] = self._call(str(number), index, block)
        self._states = {name: self._flow.advance(name, states)[1] for name, states in left.items()}

    def distances(self) -> tuple[list[float], int]:
        """Of each unit the sum over tokens of the distance from the original, and how many tokens there were: KL in
        nats per predicted token, or of a model without a language-model head |y^ - y|^2 / |y|^2 of its last hidden
        states. Afterwards nothing is held any more."""
        skeleton, device, flow, get = self._run.skeleton, self._run.device, self._flow, self._run.states.get
        held = self._states if flow.waits else {name: flow.finals(name) for name in self._names}
        flow.close()
        self._run.flow.close()
        windows = [window for window in self._windows for _ in self._names]
        ends = (held[name][number] for number in range(len(self._windows)) for name in self._names)
        placed = (get(end, torch.device(device)) if isinstance(end, Tensor) else end for end in ends)
        found = outputs(skeleton, windows, placed, device)
        sums, tokens = [0.0] * len(self._units), 0
        for _ in self._windows:
            original = next(found)
            for number in range(len(self._units)):
                each = _distance(original, next(found), skeleton.has_lm_head)
                sums[number] += float(each.sum())
            tokens += len(original) - skeleton.has_lm_head
        self._states = {}
        return sums, tokens

    def close(self) -> None:
        """Let everything go."""
        self._flow.close()

    def _call(self, name: str, index: int, block: nn.Module) -> list[Tensor]:
        """What leaves the block of one stream; of a unit whose block this is, from what enters it of the original."""
        flow, places, device = self._flow, self._run.states, torch.device(self._run.device)
        left = []
        for batch, hidden in enumerate(self._states.get(name, self._states[_ORIGINAL])):
            entered = places.get(hidden, device) if flow.waits else hidden  # else the flow gets it itself
            out = flow.call(name, batch, index, block, entered)
            left.append(places.put(out) if flow.waits else out)
        return left

    @contextmanager
    def _rounded(self, block: nn.Module, paths: Sequence[str], recipe: Recipe) -> Iterator[None]:
        """Context: the linears at ``paths`` are rounded."""
        own = {path: block.get_submodule(path).get_parameter("weight") for path in paths}
        kept = {path: weight.data for path, weight in own.items()}
        try:
            for path, weight in own.items():
                weight.data = rounded_weight(block.get_submodule(path), recipe, self._run.precision)
            yield
        finally:
            for path, weight in own.items():
                weight.data = kept[path]


def int_of(name: str) -> int:
    """The number of the unit whose stream has this name; -1 for the original's."""
    return int(name) if name.isdigit() else -1


def _distance(original: Tensor, other: Tensor, has_lm_head: bool) -> Tensor:
    """For each token, or each predicted one, how far ``other`` [length, out] is from ``original``, float64."""
    if has_lm_head:
        return divergence(torch.log_softmax(original[:-1].float(), -1), other).kl
    wanted = original.double()
    least = torch.finfo(torch.float32).tiny
    return (other.double() - wanted).square().sum(-1) / wanted.square().sum(-1).clamp(min=least)
