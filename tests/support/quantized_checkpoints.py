"""Finished results without a run: each linear of a tiny checkpoint on a simple grid, packed and written as a
directory."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny_models
import torch
import transformers as hf
from safetensors.torch import load_file, save_file
from torch import Tensor

from leangrid.formats import FORMATS
from leangrid.grids import AffineGrid, NonuniformGrid, OffsetGrid, fit_minmax
from leangrid.models.skeleton import Skeleton
from leangrid.recipe import Recipe
from leangrid.schemes import Scheme
from leangrid.storage.config import add_older_rope_keys
from leangrid.storage.source import open_source

Made = Callable[..., tuple[Path, Path, dict[str, Tensor]]]


def make_once(
    tiny: Callable[..., Path],
    folders: pytest.TempPathFactory,
    format_name: str = "auto",
    dtype: torch.dtype = torch.float32,
) -> Made:
    """``made(model, scheme, dtype)`` -> (source, result, dense weights), each made once; ``dtype`` is the default."""
    done: dict[tuple, tuple[Path, Path, dict[str, Tensor]]] = {}

    def result(model: str, scheme: str, dtype: torch.dtype = dtype) -> tuple[Path, Path, dict[str, Tensor]]:
        key = (model, scheme, dtype)
        if key not in done:
            source, out = tiny(model, dtype), folders.mktemp("results") / "out"
            done[key] = (source, out, write(source, out, scheme, format_name))
        return done[key]

    return result


def grid_for(weight: Tensor, scheme: Scheme, dtype: torch.dtype) -> AffineGrid | NonuniformGrid:
    """A grid with parameters exact in ``dtype``: quantiles, or min-max with scales of both signs where they may have
    one."""
    if scheme.grid == "nonuniform":
        at = torch.linspace(0.01, 0.99, scheme.levels)
        return NonuniformGrid(weight.float().quantile(at, dim=1).T.contiguous()).rounded(dtype)
    grid = fit_minmax(weight.float(), scheme.bits, scheme.group_size, scheme.symmetric, dtype)
    if scheme.symmetric:
        signs = torch.ones_like(grid.scale)
        signs[::2] = -1
        grid = AffineGrid(grid.scale * signs, grid.zero_point, grid.bits, grid.group_size)
    return grid


def offset_grid_for(weight: Tensor, scheme: Scheme, dtype: torch.dtype) -> OffsetGrid:
    """Min-max with scales of both signs: the offset is the lowest weight of its group, or the highest."""
    grid = fit_minmax(weight.float(), scheme.bits, scheme.group_size, False, dtype)
    signs = torch.ones_like(grid.scale)
    signs[1::2] = -1
    groups = weight.float().unflatten(1, (grid.scale.shape[1], -1))
    offset = torch.where(signs > 0, groups.amin(2), groups.amax(2))
    return OffsetGrid(grid.scale * signs, offset, scheme.bits, scheme.group_size).rounded(dtype)


def _skeleton(config: dict) -> torch.nn.Module:
    with torch.device("meta"):
        return getattr(hf, config["architectures"][0])(hf.CONFIG_MAPPING[config["model_type"]].from_dict(config))


def write(source: Path, out: Path, scheme_name: str, format_name: str = "auto") -> dict[str, Tensor]:
    """Quantize the checkpoint ``source`` to the directory ``out``; returns name -> dequantized weight [rows, cols]."""
    scheme, config = Scheme.parse(scheme_name), json.loads((source / "config.json").read_text())
    format_name = Recipe(scheme=scheme_name, format=format_name).resolved().format
    fmt = FORMATS[format_name]
    skeleton, tensors, dense = Skeleton(open_source(source)), load_file(source / "model.safetensors"), {}
    quantized = set(skeleton.all_linear_names())
    names = [name for key in tensors if (name := key.removesuffix(".weight")) in quantized]
    stored = fmt.stored_scheme(scheme, {skeleton.shape(name)[1] for name in names})
    for name in names:
        weight = tensors.pop(f"{name}.weight")
        kind = skeleton.layer_kind(name)
        weight = (weight.T if kind == "conv1d" else weight).contiguous()
        refusal = fmt.refuse(scheme, name, *weight.shape, kind)
        assert refusal is None, refusal
        grid = (offset_grid_for if format_name == "mlx" and not scheme.symmetric else grid_for)(
            weight, scheme, weight.dtype
        )
        packed = fmt.pack(grid.nearest(weight.float()), grid, weight.dtype, stored)
        dense[name] = grid.dequantize(grid.nearest(weight.float())).to(weight.dtype)
        tensors |= {f"{name}.{suffix}": tensor for suffix, tensor in packed.items()}
    ignore = [
        name
        for name, module in _skeleton(config).named_modules()
        if isinstance(module, torch.nn.Linear) and name not in dense
    ]
    shutil.copytree(source, out, ignore=shutil.ignore_patterns("*.safetensors"))
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    config = add_older_rope_keys(config) | fmt.config_entries(dict.fromkeys(dense, stored), ignore)
    (out / "config.json").write_text(json.dumps(config))
    return dense


def reference(source: Path, dense: dict[str, Tensor]) -> hf.PreTrainedModel:
    """The source model with its weights replaced by ``dense``: what every reader of the result must equal."""
    kind = getattr(hf, json.loads((source / "config.json").read_text())["architectures"][0])
    model = kind.from_pretrained(source)
    for name, weight in dense.items():
        parameter = model.get_submodule(name).weight
        parameter.data = (
            weight.T.contiguous() if isinstance(model.get_submodule(name), hf.pytorch_utils.Conv1D) else weight
        )
    return model.eval()


def auto(result: Path) -> hf.PreTrainedModel:
    """The result as transformers' own ``from_pretrained`` opens it."""
    encoder = json.loads((result / "config.json").read_text())["model_type"] in tiny_models.ENCODERS
    return (hf.AutoModel if encoder else hf.AutoModelForCausalLM).from_pretrained(result)


def answer(model: torch.nn.Module, tokens: Tensor) -> Tensor:
    """Logits, or the last hidden state of an encoder."""
    with torch.no_grad():
        out = model(tokens)
    return out.logits if hasattr(out, "logits") else out.last_hidden_state
