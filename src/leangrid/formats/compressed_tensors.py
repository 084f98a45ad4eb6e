"""The compressed-tensors ``pack-quantized`` container: w = S (q - Z), read by transformers and vLLM without leangrid.

Source: compressed-tensors 0.20, compressors/pack_quantized (docs/formats.md has the layout and the readers' limits).
"""

import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from jaxtyping import UInt8
from torch import Tensor

from leangrid.errors import CheckpointError, FormatError
from leangrid.formats.bit_stream import pack as pack_bits
from leangrid.formats.bit_stream import packed_width
from leangrid.formats.bit_stream import unpack as unpack_bits
from leangrid.formats.checks import check_layout, check_padding, check_scales, exactly
from leangrid.grids import AffineGrid, Grid, Precision
from leangrid.recipe import AFFINE_BITS, Scheme

QUANT_METHOD: str = "compressed-tensors"
_WHERE = "config.json: quantization_config"


def refuse(scheme: Scheme, name: str, rows: int, cols: int, kind: str = "linear") -> str | None:
    """Non-uniform grids, GPT-2's Conv1D (its readers replace nn.Linear only) and groups that do not divide a row."""
    if scheme.grid != "affine":
        return f"{name}: compressed-tensors holds affine grids only. Use format lut for NU{scheme.bits}, or scheme W{scheme.bits}A16"
    if kind == "conv1d":
        bits = min(scheme.bits, 4)
        return f"{name} is a Conv1D, and readers of compressed-tensors know nn.Linear only. Use scheme NU{bits} (format lut)"
    if scheme.group_size and cols % scheme.group_size:
        return f"{name}: groups of {scheme.group_size} do not divide its {cols} columns. Use a group that does, or whole rows (no _G)"
    return None


def _groups(scheme: Scheme, cols: int) -> int:
    return cols // scheme.group_size if scheme.group_size else 1


def stored(scheme: Scheme, columns: set[int]) -> Scheme:
    """The same."""
    return scheme


def precision(dtype: torch.dtype) -> Precision:
    """``dtype``: everything is stored in the model's."""
    return Precision(dtype)


def layout(
    scheme: Scheme, shape: tuple[int, int], dtype: torch.dtype
) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """weight_packed int32 [rows, words], weight_scale [rows, groups], weight_shape int64 [2], and unless symmetric
    weight_zero_point int32 [words of a column, groups], packed along the rows."""
    rows, cols = shape
    tensors: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {
        "weight_packed": (torch.int32, (rows, packed_width(cols, scheme.bits))),
        "weight_scale": (dtype, (rows, _groups(scheme, cols))),
        "weight_shape": (torch.int64, (2,)),
    }
    if not scheme.symmetric:
        tensors["weight_zero_point"] = (torch.int32, (packed_width(rows, scheme.bits), _groups(scheme, cols)))
    return tensors


def pack(codes: UInt8[Tensor, "rows cols"], grid: Grid, dtype: torch.dtype, scheme: Scheme) -> dict[str, Tensor]:
    """codes and a grid with scale, zero_point [rows, groups] -> the layer's tensors.

    Raises:
        FormatError: a non-uniform grid, a scale that ``dtype`` would round, or zero points that a symmetric scheme
        cannot say.
    """
    if not isinstance(grid, AffineGrid) or grid.bits != scheme.bits:
        what = f"compressed-tensors holds affine grids of {scheme.bits} bits here, not {type(grid).__name__} of {grid.bits} bits"
        raise FormatError(what, None, "Use format lut for non-uniform grids")
    if scheme.symmetric and not bool((grid.zero_point == scheme.levels // 2).all()):
        raise FormatError(
            "a symmetric scheme needs every zero point in the middle", None, "Use the scheme without _SYM"
        )
    shape = (codes.shape[0], codes.shape[1])
    tensors = {
        "weight_packed": pack_bits(codes, scheme.bits),
        "weight_scale": exactly(grid.scale, dtype, "scales"),
        "weight_shape": torch.tensor(shape, dtype=torch.int64),
    }
    if not scheme.symmetric:
        tensors["weight_zero_point"] = pack_bits(grid.zero_point.T.contiguous(), scheme.bits).T.contiguous()
    check(tensors, scheme, shape, "the packed layer")
    return tensors


def check(tensors: dict[str, Tensor], scheme: Scheme, shape: tuple[int, int], name: str) -> None:
    """CheckpointError unless shapes and dtypes are right, scales finite and not 0, and padding bits zero."""
    check_layout(
        tensors,
        layout(scheme, shape, tensors["weight_scale"].dtype if "weight_scale" in tensors else torch.float32),
        name,
    )
    way_out = "The file is damaged: quantize or copy it again"
    if tuple(tensors["weight_shape"].tolist()) != shape:
        raise CheckpointError(
            f"says {tensors['weight_shape'].tolist()}, the config {list(shape)}", f"{name}.weight_shape", way_out
        )
    check_scales(tensors["weight_scale"], f"{name}.weight_scale")
    check_padding(tensors["weight_packed"], shape[1], scheme.bits, f"{name}.weight_packed")
    if not scheme.symmetric:
        check_padding(tensors["weight_zero_point"].T.contiguous(), shape[0], scheme.bits, f"{name}.weight_zero_point")


def unpack(
    tensors: dict[str, Tensor], scheme: Scheme, shape: tuple[int, int], name: str = "layer"
) -> tuple[Tensor, AffineGrid]:
    """The layer's tensors -> (codes uint8 [rows, cols], grid); checked first."""
    check(tensors, scheme, shape, name)
    scale = tensors["weight_scale"].float()
    if scheme.symmetric:
        zero_point = torch.full(scale.shape, scheme.levels // 2, dtype=torch.uint8, device=scale.device)
    else:
        zero_point = unpack_bits(tensors["weight_zero_point"].T.contiguous(), scheme.bits, shape[0]).T.contiguous()
    codes = unpack_bits(tensors["weight_packed"], scheme.bits, shape[1])
    return codes, AffineGrid(scale=scale, zero_point=zero_point, bits=scheme.bits, group_size=scheme.group_size)


def dense(tensors: dict[str, Tensor], scheme: Scheme, shape: tuple[int, int], name: str = "layer") -> Tensor:
    """S (q - Z), [rows, cols], rounded once to the scales' dtype."""
    codes, grid = unpack(tensors, scheme, shape, name)
    return grid.dequantize(codes).to(tensors["weight_scale"].dtype)


def config(scheme: Scheme, layers: list[str], ignore: list[str], dtype: torch.dtype) -> dict[str, Any]:
    """``quantization_config`` from the library's own classes. Every nn.Linear that is not in ``layers`` must be in
    ``ignore``.

    ``dequantize`` is there because transformers 5.23 cannot load packed zero points any other way (5.17 can; vLLM does
    not read the key)."""
    return {**_config([(scheme, ["Linear"])], ignore), "dequantize": True}


def mixed_config(schemes: Mapping[str, Scheme], ignore: list[str]) -> dict[str, Any]:
    """The same with a group for each scheme, which lists its layers by name.

    Without ``dequantize``: transformers 5.23 would then unpack every layer by the first group.
    """
    targets: dict[Scheme, list[str]] = {}
    for name, scheme in schemes.items():
        targets.setdefault(scheme, []).append(name)
    return _config(targets.items(), ignore)


def _config(targets: Iterable[tuple[Scheme, list[str]]], ignore: list[str]) -> dict[str, Any]:
    from compressed_tensors.quantization import (  # brings transformers
        QuantizationArgs,
        QuantizationConfig,
        QuantizationScheme,
    )

    groups = {}
    for number, (scheme, names) in enumerate(targets):
        strategy = (
            {"strategy": "group", "group_size": scheme.group_size} if scheme.group_size else {"strategy": "channel"}
        )
        weights = QuantizationArgs.model_validate(
            {"num_bits": scheme.bits, "type": "int", "symmetric": scheme.symmetric, **strategy}
        )
        group = {"targets": names, "weights": weights, "format": "pack-quantized"}
        groups[f"group_{number}"] = QuantizationScheme.model_validate(group)
    full = {
        "config_groups": groups,
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "ignore": list(ignore),
    }
    return QuantizationConfig.model_validate(full).model_dump(mode="json")


def scheme_of(config: dict[str, Any]) -> Scheme:
    """The scheme of a ``quantization_config`` with one group of packed integer weights, ours or another tool's."""
    groups = config.get("config_groups")
    group = next(iter(groups.values())) if isinstance(groups, dict) and len(groups) == 1 else None
    weights = group.get("weights") if isinstance(group, dict) else None
    if (
        not isinstance(group, dict)
        or not isinstance(weights, dict)
        or group.get("input_activations")
        or group.get("targets") != ["Linear"]
    ):
        raise FormatError(
            "leangrid reads compressed-tensors with one group of Linear weights", _WHERE, "Load it with transformers"
        )
    bits, group_size = weights.get("num_bits"), weights.get("group_size")
    packed = (group.get("format") or config.get("format")) == "pack-quantized" and weights.get("type") == "int"
    strategy = weights.get("strategy")
    if not packed or bits not in AFFINE_BITS or strategy not in ("group", "channel"):
        raise FormatError(
            f"leangrid does not read {bits!r} bits per {strategy!r} here", _WHERE, "Load it with transformers"
        )
    if strategy == "group" and not (isinstance(group_size, int) and group_size > 0):
        raise FormatError(
            f"group_size must be positive, not {group_size!r}",
            _WHERE,
            "The config is damaged: quantize or copy it again",
        )
    size = group_size if strategy == "group" else None
    return Scheme(
        grid="affine", method="leanquant", bits=bits, group_size=size, symmetric=bool(weights.get("symmetric", True))
    )


def mixed_schemes(config: dict[str, Any], names: Iterable[str]) -> dict[str, Scheme]:
    """Layer -> scheme for those of ``names`` that a group of ``config`` targets by name or pattern, or else as a
    Linear."""
    groups = config["config_groups"]
    parsed = []
    for name, group in groups.items():
        targets = group.get("targets") if isinstance(group, dict) else None
        if not isinstance(targets, list) or not all(isinstance(target, str) for target in targets):
            raise FormatError(f"{name} has no targets", _WHERE, "The config is damaged: quantize or copy it again")
        one = {**config, "config_groups": {name: {**group, "targets": ["Linear"]}}}
        parsed.append((targets, scheme_of(one)))
    found: dict[str, Scheme] = {}
    for name in names:
        named = (
            s for targets, s in parsed for t in targets if t == name or (t.startswith("re:") and re.match(t[3:], name))
        )
        scheme = next(named, None) or next((s for targets, s in parsed if "Linear" in targets), None)
        if scheme is not None:
            found[name] = scheme
    return found


def covers(config: dict[str, Any], name: str) -> bool:
    """Whether no entry of ``ignore`` (a name, or re: and a pattern) matches ``name``."""
    ignore = config.get("ignore") or []
    return not any(name == entry or (entry.startswith("re:") and re.match(entry[3:], name)) for entry in ignore)
