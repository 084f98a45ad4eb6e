"""What a run reports while it works: it calls a function of the caller with an Event."""

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Event:
    """One moment of a run.

    Attributes:
        stage: "notice" and "calibrate" (``message`` is a sentence for the user), "layer" (one linear is done), "block"
            (a whole block is done and committed), "save" (all blocks are; the result is written now); "export" (one
            linear of ``blocks`` is written); "window" (one is measured) and "task" (``message`` says which part begins)
            of an evaluation.
        block: index of the current block, from 0; of an export the linear, of an evaluation the window from 1.
        blocks: how many blocks (linears, windows) there are; 0 while unknown.
        layer: name of the current linear, or ""; of an evaluation the model.
        loss: for "layer", tr(E H E^T)/2 of that layer; for "block", the sum over its layers.
        tokens_per_second: calibration tokens that a block is computed for in one second; 0 while unknown.
        memory_bytes: resident memory of the process now; 0 while unknown.
        seconds_left: estimate for the rest of the run; negative while unknown.
        message: a sentence for the user, or "".
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
