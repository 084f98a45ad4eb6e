"""The Hessians of some linears of the original model, from its own inputs on the calibration windows."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from leangrid.solve.hessian import Hessian, HessianSum


@contextmanager
def sum_inputs(model: nn.Module, names: list[str]) -> Iterator[dict[str, HessianSum]]:
    """A context that yields name -> HessianSum. While it is open, the inputs of these linears are added to their
    sums."""
    sums: dict[str, HessianSum] = {}
    hooks = []
    for name in names:
        linear = model.get_submodule(name)
        sums[name] = HessianSum(linear.weight.shape[1])  # pyright: ignore[reportArgumentType, reportAttributeAccessIssue]

        def add(_: nn.Module, inputs: tuple[Tensor, ...], total: HessianSum = sums[name]) -> None:
            total.add(inputs[0].flatten(0, -2).float())

        hooks.append(linear.register_forward_pre_hook(add))
    yield sums
    for hook in hooks:
        hook.remove()


@torch.no_grad()
def collect_hessians(model: Any, names: list[str], windows: Tensor) -> dict[str, Hessian]:
    """Run ``model`` on ``windows`` int64 [samples, length]; the Hessian of each linear in ``names``."""
    with sum_inputs(model, names) as sums:
        for window in windows:
            model(input_ids=window[None].to(model.device))
    return {name: total.finish() for name, total in sums.items()}
