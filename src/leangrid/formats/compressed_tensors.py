"""The compressed-tensors ``pack-quantized`` container: w = S (q - Z), read by transformers and vLLM without leangrid.

Source: compressed-tensors 0.20, compressors/pack_quantized. docs/formats.md has the layout and what readers accept.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from jaxtyping import UInt8
from torch import Tensor

from leangrid.errors import CheckpointError, FormatError
from leangrid.formats.base import CONFIG, DAMAGED_CONFIG, Format, Layout, Reading
from leangrid.formats.bit_stream import pack as pack_bits
from leangrid.formats.bit_stream import packed_width
from leangrid.formats.bit_stream import unpack as unpack_bits
from leangrid.formats.checks import (
    DAMAGED,
    affine_grid,
    affine_only,
    cast_exactly,
    check_layout,
    check_padding,
    check_scales,
    no_conv1d,
    uneven_groups,
)
from leangrid.grids import AffineGrid, Grid
from leangrid.schemes import AFFINE_BITS, Scheme

_EXPERTS = r"re:.*\.experts(\..*)?$"


class CompressedTensors(Format):
    """Integer zero points, packed like the codes, and scales in the model's dtype, by groups of columns or by rows."""

    NAME = "compressed-tensors"
    QUANT_METHOD = "compressed-tensors"

    def refuse(self, scheme: Scheme, name: str, rows: int, cols: int, kind: str = "linear") -> str | None:
        """Non-uniform grids, GPT-2's Conv1D (its readers replace nn.Linear only) and groups that do not divide a
        row."""
        if scheme.grid != "affine":
            return affine_only(self.NAME, name, scheme.bits, f"W{scheme.bits}A16")
        if kind == "conv1d":
            return no_conv1d(name, "and readers of compressed-tensors know nn.Linear only", scheme.bits)
        return uneven_groups(name, scheme, cols)

    def layout(self, scheme: Scheme, shape: tuple[int, int], dtype: torch.dtype) -> Layout:
        """weight_packed int32 [rows, words], weight_scale ``dtype`` [rows, groups], weight_shape int64 [2], and unless
        the scheme is symmetric weight_zero_point int32 [words of a column, groups], packed along the rows."""
        rows, cols = shape
        groups = cols // (scheme.group_size or cols)
        tensors: Layout = {
            "weight_packed": (torch.int32, (rows, packed_width(cols, scheme.bits))),
            "weight_scale": (dtype, (rows, groups)),
            "weight_shape": (torch.int64, (2,)),
        }
        if not scheme.symmetric:
            tensors["weight_zero_point"] = (torch.int32, (packed_width(rows, scheme.bits), groups))
        return tensors

    def pack(
        self, codes: UInt8[Tensor, "rows cols"], grid: Grid, dtype: torch.dtype, scheme: Scheme
    ) -> dict[str, Tensor]:
        """Of an affine grid, scale and zero_point [rows, groups]. FormatError for another grid, where ``dtype`` rounds
        a scale, and for zero points that a symmetric scheme cannot say."""
        grid = affine_grid(grid, scheme, self.NAME)
        shape = (codes.shape[0], codes.shape[1])
        tensors = {
            "weight_packed": pack_bits(codes, scheme.bits),
            "weight_scale": cast_exactly(grid.scale, dtype, "scales"),
            "weight_shape": torch.tensor(shape, dtype=torch.int64),
        }
        if not scheme.symmetric:
            tensors["weight_zero_point"] = pack_bits(grid.zero_point.T.contiguous(), scheme.bits).T.contiguous()
        self.check(tensors, scheme, shape, "the packed layer")
        return tensors

    def check(self, tensors: dict[str, Tensor], scheme: Scheme, shape: tuple[int, int], name: str) -> None:
        """Shapes and dtypes, scales finite and not 0, padding bits of 0."""
        dtype = tensors["weight_scale"].dtype if "weight_scale" in tensors else torch.float32
        check_layout(tensors, self.layout(scheme, shape, dtype), name)
        said = tensors["weight_shape"].tolist()
        if tuple(said) != shape:
            raise CheckpointError(f"says {said}, the config {list(shape)}", f"{name}.weight_shape", DAMAGED)
        check_scales(tensors["weight_scale"], f"{name}.weight_scale")
        check_padding(tensors["weight_packed"], shape[1], scheme.bits, f"{name}.weight_packed")
        if not scheme.symmetric:
            zero_point = tensors["weight_zero_point"].T.contiguous()
            check_padding(zero_point, shape[0], scheme.bits, f"{name}.weight_zero_point")

    def unpack(
        self, tensors: dict[str, Tensor], scheme: Scheme, shape: tuple[int, int], name: str = "layer"
    ) -> tuple[Tensor, AffineGrid]:
        """(codes uint8 [rows, cols], grid)."""
        self.check(tensors, scheme, shape, name)
        scale = tensors["weight_scale"].float()
        if scheme.symmetric:
            zero_point = torch.full(scale.shape, scheme.levels // 2, dtype=torch.uint8, device=scale.device)
        else:
            zero_point = unpack_bits(tensors["weight_zero_point"].T.contiguous(), scheme.bits, shape[0]).T.contiguous()
        codes = unpack_bits(tensors["weight_packed"], scheme.bits, shape[1])
        return codes, AffineGrid(scale=scale, zero_point=zero_point, bits=scheme.bits, group_size=scheme.group_size)

    def weight_dtype(self, tensors: dict[str, Tensor]) -> torch.dtype:
        """The scales'."""
        return tensors["weight_scale"].dtype

    def config(self, schemes: Mapping[str, Scheme], ignore: list[str]) -> dict[str, Any]:
        """From the library's own classes. Every nn.Linear that is not quantized must be named in ``ignore``.

        Layers of one scheme are one group of all Linears, with ``dequantize``: transformers 5.23 loads packed zero
        points in no other way (5.17 does; vLLM does not read the key). Of several schemes each has a group, which lists
        its layers by name; without ``dequantize``, because transformers 5.23 would unpack every layer by the first."""
        targets: dict[Scheme, list[str]] = {}
        for name, scheme in schemes.items():
            targets.setdefault(scheme, []).append(name)
        if len(targets) == 1:
            return {**_library_config([(scheme, ["Linear"]) for scheme in targets], ignore), "dequantize": True}
        return _library_config(targets.items(), ignore)

    def config_entries(
        self, schemes: Mapping[str, Scheme], ignore: list[str], reading: Reading | None = None
    ) -> dict[str, Any]:
        """``config``, but where plain transformers opens the result as its ``reading`` says: experts of one scheme and
        other linears of another are two groups with ``dequantize``, the experts' by a pattern, since it looks for the
        word; without ``dequantize`` layers are listed under their modules' names too."""
        entry = self.config(schemes, ignore)
        if reading is None or reading.obstacle is not None:
            return {"quantization_config": entry}
        if reading.dequantize:
            experts = list(dict.fromkeys(schemes[name] for name in schemes if name in reading.merged))
            others = list(dict.fromkeys(schemes[name] for name in schemes if name not in reading.merged))
            if experts and others and experts != others:
                groups = [(one, [_EXPERTS]) for one in experts] + [(one, ["Linear"]) for one in others]
                entry = _library_config(groups, ignore)
            return {"quantization_config": entry | {"dequantize": True}}
        entry.pop("dequantize", None)
        for group in entry["config_groups"].values():
            if group["targets"] != ["Linear"]:
                group["targets"] += [path for name in group["targets"] if (path := reading.paths[name]) != name]
        return {"quantization_config": entry}

    def scheme_of(self, config: dict[str, Any]) -> Scheme:
        """Of an entry, ours or another tool's, with one group of packed integer weights."""
        groups = config.get("config_groups")
        group = next(iter(groups.values())) if isinstance(groups, dict) and len(groups) == 1 else None
        weights = group.get("weights") if isinstance(group, dict) else None
        if (
            not isinstance(group, dict)
            or not isinstance(weights, dict)
            or group.get("input_activations")
            or group.get("targets") != ["Linear"]
        ):
            what = "leangrid reads compressed-tensors with one group of Linear weights"
            raise FormatError(what, CONFIG, "Load it with transformers")
        bits, group_size = weights.get("num_bits"), weights.get("group_size")
        packed = (group.get("format") or config.get("format")) == "pack-quantized" and weights.get("type") == "int"
        strategy = weights.get("strategy")
        if not packed or bits not in AFFINE_BITS or strategy not in ("group", "channel"):
            what = f"leangrid does not read {bits!r} bits per {strategy!r} here"
            raise FormatError(what, CONFIG, "Load it with transformers")
        if strategy == "group" and not (isinstance(group_size, int) and group_size > 0):
            raise FormatError(f"group_size must be positive, not {group_size!r}", CONFIG, DAMAGED_CONFIG)
        size, symmetric = group_size if strategy == "group" else None, bool(weights.get("symmetric", True))
        return Scheme(grid="affine", method="leanquant", bits=bits, group_size=size, symmetric=symmetric)

    def schemes(self, config: dict[str, Any], names: Iterable[str]) -> dict[str, Scheme]:
        """Of several groups: the first that targets a layer by its name or a pattern, else the one of all Linears."""
        groups = config.get("config_groups")
        if not isinstance(groups, dict) or len(groups) <= 1:
            return super().schemes(config, names)
        parsed = []
        for name, group in groups.items():
            targets = group.get("targets") if isinstance(group, dict) else None
            if not isinstance(targets, list) or not all(isinstance(target, str) for target in targets):
                raise FormatError(f"{name} has no targets", CONFIG, DAMAGED_CONFIG)
            alone = {**config, "config_groups": {name: {**group, "targets": ["Linear"]}}}
            parsed.append((targets, self.scheme_of(alone)))
        found: dict[str, Scheme] = {}
        for name in names:
            named = (scheme for targets, scheme in parsed if any(_matches(target, name) for target in targets))
            scheme = next(named, None) or next((scheme for targets, scheme in parsed if "Linear" in targets), None)
            if scheme is not None:
                found[name] = scheme
        return found

    def covers(self, config: dict[str, Any], name: str) -> bool:
        """Whether no entry of ``ignore`` matches ``name``; the file decides then."""
        return not any(_matches(entry, name) for entry in config.get("ignore") or [])


def _matches(entry: str, name: str) -> bool:
    """Whether an entry of the library's lists, a name or ``re:`` and a pattern, matches the layer ``name``."""
    return name == entry or (entry.startswith("re:") and re.match(entry[3:], name) is not None)


def _library_config(targets: Iterable[tuple[Scheme, list[str]]], ignore: list[str]) -> dict[str, Any]:
    from compressed_tensors.quantization import (  # imports transformers
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
