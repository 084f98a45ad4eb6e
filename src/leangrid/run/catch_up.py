"""How the streams go on from a block that is committed, where the model's own forward pass is held at its blocks.

Where hidden states are all that flows, they are what the block gave, and they are saved. In other models (flow.py) each
pass goes on from block to block: to the next one; through one that is called again, which has its new weights by then;
and, in a run that is resumed, through all that are committed, with the weights that were read from the files. These are
the same weights and the same products as before the run was stopped, so its bytes are the same."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

from torch import Tensor, nn

from leangrid.formats import FORMATS
from leangrid.models.linears import rows_first
from leangrid.models.streams import Streams
from leangrid.planning.sizes import stored_schemes
from leangrid.storage.safetensors import read_named

if TYPE_CHECKING:
    from leangrid.run.run import Run


def advance(run: "Run", index: int, streams: Streams) -> Streams:
    """The streams that enter the next block that is not committed, after block ``index``; ``streams`` left it."""
    if run.flow.waits:
        return streams
    entered, following = _step(run, streams)
    while following is not None and following <= index:  # called again: its weights are known
        entered, following = _through(run, following, entered)
    return entered


def catch_up(run: "Run", streams: Streams) -> Streams:
    """The streams that enter the first block that is not committed; ``streams`` enter the first."""
    for index in range(run.journal.count_committed()):
        streams, following = _through(run, index, streams)
        while following is not None and following <= index:
            streams, following = _through(run, following, streams)
    return streams


def _through(run: "Run", index: int, streams: Streams) -> tuple[Streams, int | None]:
    """Run both streams through the committed block ``index``, each with its own weights, and on to the next."""
    with run.stage("calibrate"), run.skeleton.load_block(index, run.device) as block:
        for batch, hidden in enumerate(streams.original or []):
            run.flow.call("original", batch, index, block, hidden)
        for name, weight in _committed_weights(run, index, block).items():
            block.get_submodule(name).weight.data = weight
        for batch, hidden in enumerate(streams.quantized):
            run.flow.call("quantized", batch, index, block, hidden)
    return _step(run, streams)


def _step(run: "Run", streams: Streams) -> tuple[Streams, int | None]:
    """Hand every pass what its block returned; the states that enter the next one, and its number."""
    with run.stage("calibrate"):
        following, quantized = run.flow.advance("quantized", streams.quantized)
        original = None
        if streams.original is not None:
            _, original = run.flow.advance("original", streams.original)
    return Streams(quantized, original), following


def _committed_weights(run: "Run", index: int, block: nn.Module) -> Mapping[str, Tensor]:
    """The new weight of each quantized linear of a committed block, as its module stores it."""
    container, schemes = FORMATS[run.recipe.format], stored_schemes(run.skeleton, run.recipe)
    infos, found = run.journal.locate_block_tensors(index), {}
    for name in (name for group in run.skeleton.groups(index) for name in group):
        path = run.skeleton.linear_name(index, name)
        shape = run.skeleton.shape(path)
        suffixes = container.layout(schemes[path], shape, run.skeleton.dtype)
        stored = read_named(infos, [f"{path}.{suffix}" for suffix in suffixes])
        tensors = {suffix: stored[f"{path}.{suffix}"] for suffix in suffixes}
        codes, grid = container.unpack(tensors, schemes[path], shape, path)
        weight = container.dequantize(codes, grid, run.skeleton.dtype)
        module = block.get_submodule(name)
        parameter = module.get_parameter("weight")
        found[name] = rows_first(module, weight.to(parameter.device, parameter.dtype)).contiguous()
    return found
