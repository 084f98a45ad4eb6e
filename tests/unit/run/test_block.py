"""Weights that are queued while a group is solved take their places when the streams go on, not before."""

from contextlib import nullcontext
from pathlib import Path

import tiny_models
import torch

from leangrid.models.skeleton import Skeleton
from leangrid.models.streams import Streams, run_to_first_block
from leangrid.models.walk import BlockWalk
from leangrid.run.block import Block
from leangrid.storage.source import open_source


@torch.no_grad()
def test_queued_weights_reach_the_groups_that_follow(tmp_path: Path) -> None:
    skeleton = Skeleton(open_source(tiny_models.save("llama2", tmp_path)))
    hidden, calls = run_to_first_block(skeleton, [tiny_models.tokens(2, 16)])
    with skeleton.load_block(0) as module:
        walk = BlockWalk(module, skeleton.groups(0), calls, 0, Streams(hidden, list(hidden)))
        block = Block(0, skeleton.block_name(0), module, walk, skeleton.architecture)
        differ, before = [], block.parameter("self_attn.v_proj").data.clone()
        for number, group in block.groups(lambda _name: nullcontext()):
            pairs = list(group)
            differ.append(any(not torch.equal(theirs, ours) for theirs, ours in pairs))  # pyright: ignore
            if number == 0:
                block.queue_weight("self_attn.v_proj", torch.zeros_like(before))
                assert torch.equal(block.parameter("self_attn.v_proj").data, before), "the original stream needs it yet"
    assert differ == [False, True, True, True]
