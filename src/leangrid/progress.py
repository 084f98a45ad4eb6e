"""What a long run says about itself while it works. The pipeline makes events; whoever called it decides what to
show."""

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Event:
    """One moment of a run.

    Attributes:
        stage: "notice" (``message`` is a sentence for the user), "load", "calibrate", "layer" (one linear is done),
            "block" (a whole block is done and committed), "save", "done"; "export" (one linear of ``blocks`` is
            written); "window" and "task" of an evaluation.
        block: index of the block at work, from 0.
        blocks: how many blocks there are; 0 while unknown.
        layer: name of the linear layer at work, or "".
        loss: for "layer", tr(E H E^T)/2 of that layer; for "block", the sum over its layers.
        tokens_per_second: calibration tokens that pass a block in one second; 0 while unknown.
        memory_bytes: resident memory of the process now.
        seconds_left: estimate for the rest of the run; negative while unknown.
        message: a sentence that must reach the user, or "".
    """

    stage: str
    block: int = 0
    blocks: int = 0
    layer: str = ""
    loss: float = 0.0
    tokens_per_second: float = 0.0
    memory_bytes: int = 0
    seconds_left: float = -1.0
    message: str = ""


Progress = Callable[[Event], None]
