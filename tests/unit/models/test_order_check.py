"""The model's own passes that stand beside blocks which are run alone: of the first batches alone."""

from collections.abc import Callable
from pathlib import Path

import tiny_models
import torch

from leangrid.models.flow import ChainedFlow
from leangrid.models.skeleton import Skeleton
from leangrid.storage.source import open_source


def test_a_few_batches_are_looked_at_however_many_there_are(tiny: Callable[..., Path]) -> None:
    skeleton = Skeleton(open_source(tiny("llama2")))
    batches = tiny_models.tokens(9, 16).split(1)
    flow = ChainedFlow(skeleton)
    entered = flow.enter(batches, lambda states: states.clone(), "quantized", "original")
    assert len(entered) == 9 and all(states.shape == (1, 16, tiny_models.HIDDEN) for states in entered)
    check = flow._check
    assert {stream: len(passes) for stream, passes in check._passes.items()} == {"quantized": 4, "original": 4}
    streams = {"quantized": entered, "original": list(entered)}
    assert check.stands_at(0, streams) and not check.stands_at(1, streams)
    assert not check.stands_at(0, {"quantized": entered, "original": entered[:8]})
    left = [torch.randn_like(states) for states in entered]
    flow.advance("quantized", left)
    flow.advance("original", left)
    assert check.stands_at(1, streams)
    flow.close()
