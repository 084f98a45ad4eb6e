"""Small modules that look like models, and what is found in them (models/discovery.py)."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from leangrid.models.discovery import Structure, discover

WIDTH = 64


def linear(rows: int = WIDTH, cols: int = WIDTH) -> nn.Linear:
    return nn.Linear(cols, rows, bias=False)


class Block(nn.Module):
    """Attention without its middle, an MLP, a residual around both."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (linear() for _ in range(4))
        self.norm = nn.LayerNorm(WIDTH)
        self.up, self.down = linear(128), linear(cols=128)

    def forward(self, x: Tensor, **_: Any) -> Tensor:
        x = x + self.o(self.q(x) + self.k(x) * self.v(x))
        return x + self.down(torch.relu(self.up(self.norm(x))))


class Model(nn.Module):
    """Blocks of one kind in a row."""

    def __init__(self, kind: Callable[[], nn.Module] = Block, blocks: int = 3) -> None:
        super().__init__()
        self.embed = nn.Embedding(100, WIDTH)
        self.layers = nn.ModuleList([kind() for _ in range(blocks)])
        self.tower = linear()  # of pictures: text does not reach it
        self.norm = nn.LayerNorm(WIDTH)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x)
        return self.norm(x)


def run(model: nn.Module, number: int) -> Any:
    return model(torch.arange(5)[None] + 1 + number)


def found(kind: Callable[[], nn.Module] = Model) -> Structure:
    with torch.device("meta"):
        model = kind()
    structure = discover(model, model, run)
    assert all(parameter.is_meta for parameter in model.parameters()), "a weight was left behind"
    assert all("forward" not in vars(module) for module in model.modules()), "a forward was left behind"
    return structure


def with_block(kind: Callable[[], nn.Module]) -> Structure:
    return found(lambda: Model(kind))
