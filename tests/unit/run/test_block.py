"""Weights that are queued while a group is solved take their places when the streams go on, not before."""

from contextlib import nullcontext
from pathlib import Path

import tiny_models
import torch
from walks import enter, skeleton_of, walk_through

from leangrid.run.block import Block


@torch.no_grad()
def test_queued_weights_reach_the_groups_that_follow(tmp_path: Path) -> None:
    skeleton = skeleton_of("llama2", tmp_path)
    flow, streams = enter(skeleton, [tiny_models.tokens(2, 16)])
    with skeleton.load_block(0) as module:
        walk = walk_through(skeleton, module, flow, 0, streams)
        block = Block(0, skeleton.block_name(0), module, walk, skeleton)
        differ, before = [], block.parameter("self_attn.v_proj").data.clone()
        for number, group in block.groups(lambda _name: nullcontext()):
            pairs = list(group)
            differ.append(any(not torch.equal(theirs, ours) for theirs, ours in pairs))  # pyright: ignore
            if number == 0:
                block.queue_weight("self_attn.v_proj", torch.zeros_like(before))
                assert torch.equal(block.parameter("self_attn.v_proj").data, before), "the original stream needs it yet"
    assert differ == [False, True, True, True]
