"""Skeletons of the tiny models, and their hidden states before the first block, for tests of what goes on there."""

from collections.abc import Sequence
from pathlib import Path

import tiny_models
import torch

from leangrid.models.flow import Flow, open_flow
from leangrid.models.skeleton import Skeleton
from leangrid.models.streams import Streams
from leangrid.models.walk import BlockWalk
from leangrid.storage.source import open_source


def skeleton_of(name: str, directory: Path) -> Skeleton:
    """The tiny model ``name``, written to ``directory``."""
    return Skeleton(open_source(tiny_models.save(name, directory)))


def enter(skeleton: Skeleton, batches: Sequence[torch.Tensor], paired: bool = True) -> tuple[Flow, Streams]:
    """The flow of ``skeleton``, and both streams (without ``paired`` one) before its first block."""
    flow = open_flow(skeleton)
    hidden = flow.enter(batches, lambda states: states, "quantized", *(["original"] if paired else []))
    return flow, Streams(hidden, list(hidden) if paired else None)


def walk_through(
    skeleton: Skeleton, block: torch.nn.Module, flow: Flow, index: int, streams: Streams, replay: bool = False
) -> BlockWalk:
    """The walk through ``block``, number ``index``."""
    return BlockWalk(block, skeleton.structure.blocks[index], flow, index, streams, replay)


def go_on(flow: Flow, streams: Streams) -> Streams:
    """The streams that enter the next block."""
    return flow.advance_both(streams)[1]
