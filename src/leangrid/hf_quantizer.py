"""leangrid's row in transformers' table of quantizers: makes packed layers where the checkpoint has them.

Everything a damaged file could spoil is checked here, so it holds for ``leangrid.load`` and ``from_pretrained`` alike:
names, shapes and dtypes against the headers before a tensor is read, values before the model is handed out.
"""

import re
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from leangrid.errors import CheckpointError, FormatError
from leangrid.formats import FORMATS, Format, format_of, mlx
from leangrid.layers import AffineLinear, LutLinear, OffsetLinear, PackedLinear
from leangrid.recipe import Scheme
from leangrid.storage.safetensors import TensorInfo, read_header

METHOD = FORMATS["lut"].QUANT_METHOD
_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I32": torch.int32, "I64": torch.int64,
           "U32": torch.uint32}  # fmt: skip


def register() -> None:
    """Add ``quant_method: leangrid`` to transformers. Calling it twice changes nothing."""
    AUTO_QUANTIZATION_CONFIG_MAPPING.setdefault(METHOD, LeangridConfig)
    AUTO_QUANTIZER_MAPPING.setdefault(METHOD, LeangridQuantizer)


def through_leangrid(quantization_config: dict[str, Any]) -> dict[str, Any]:
    """A ``quantization_config`` of any of our formats, routed to our layers; saving the model writes the original back."""
    return {"quant_method": METHOD, "stored": deepcopy(quantization_config)}


class LeangridConfig(QuantizationConfigMixin):
    """The checkpoint's ``quantization_config``, kept as it was stored."""

    def __init__(self, **fields: Any) -> None:
        self.quant_method = METHOD  # pyright: ignore[reportAttributeAccessIssue]
        self.stored: dict[str, Any] = fields.get("stored", fields)

    def to_dict(self) -> dict[str, Any]:
        return deepcopy(self.stored)


class LeangridQuantizer(HfQuantizer):
    """Loads finished results only: quantizing is ``leangrid.quantize``."""

    requires_calibration = True

    def __init__(self, quantization_config: LeangridConfig, **fields: Any) -> None:
        super().__init__(quantization_config, **fields)
        self.stored = quantization_config.stored
        self.format: Format = format_of(self.stored)
        self.scheme: Scheme = self.format.scheme_of(self.stored)

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> None:
        headers = _headers(kwargs.get("checkpoint_files") or [])
        dtype = kwargs.get("dtype") or torch.get_default_dtype()
        for name, layer in list(model.named_modules()):
            if not isinstance(layer, (nn.Linear, Conv1D)):
                continue
            stored = next((n for n in _spellings(name, model.base_model_prefix) if self._is_quantized(n, headers)), None)
            if stored is None:
                continue
            cols, rows = (layer.in_features, layer.out_features) if isinstance(layer, nn.Linear) else tuple(layer.weight.shape)
            if headers:
                self._check_headers(headers, stored, (rows, cols))
            scale = headers.get(f"{stored}.weight_scale")
            in_file = dtype if scale is None else _DTYPES[scale.dtype]
            model.set_submodule(name, self._make(rows, cols, layer.bias is not None, dtype, in_file))
        self._check_complete(model, headers)

    def _is_quantized(self, name: str, headers: dict[str, TensorInfo]) -> bool:
        if not self.format.covers(self.stored, name):
            return False
        # compressed-tensors says "every Linear but these" and MLX nothing, so the spelling that the file uses decides.
        if "layers" in self.stored or not headers:
            return True
        integers = headers[f"{name}.weight"].dtype == "U32" if f"{name}.weight" in headers else False
        return integers or any(f"{name}.{mark}" in headers for mark in ("weight_packed", "scales"))

    def _make(self, rows: int, cols: int, bias: bool, dtype: torch.dtype, in_file: torch.dtype) -> PackedLinear:
        if self.scheme.grid == "nonuniform":
            return LutLinear(cols, rows, self.scheme.bits, bias, dtype, "meta")
        if self.format is FORMATS["mlx"]:
            return OffsetLinear(cols, rows, self.scheme.bits, bias, dtype, "meta", mlx.group_size(self.scheme, cols))
        grouping = (self.scheme.group_size, self.scheme.symmetric)
        return AffineLinear(cols, rows, self.scheme.bits, bias, dtype, "meta", *grouping, stored_dtype=in_file)

    def _check_headers(self, headers: dict[str, TensorInfo], name: str, shape: tuple[int, int]) -> None:
        """The layer's tensors, by header alone: present, of the right shape and dtype, and nothing else beside them."""
        allowed_floats = (torch.float32, torch.float16, torch.bfloat16)
        layout = self.format.layout(self.scheme, shape, torch.float32)
        way_out = "The result is damaged or incomplete: leangrid verify DIR, then quantize or copy it again"
        for suffix, (dtype, expected) in layout.items():
            info = headers.get(f"{name}.{suffix}")
            if info is None:
                raise CheckpointError("is missing", f"{name}.{suffix}", way_out)
            stored = _DTYPES.get(info.dtype)
            right = stored in allowed_floats if dtype.is_floating_point else stored == dtype
            if not right or tuple(info.shape) != expected:
                raise CheckpointError(f"is {info.dtype} {list(info.shape)}, not {dtype} {list(expected)}", f"{name}.{suffix}", way_out)
        beside = {n for n in headers if n.rpartition(".")[0] == name} - {f"{name}.{s}" for s in (*layout, "bias")}
        if beside:
            raise CheckpointError("does not belong to this format", min(beside), way_out)

    def _check_complete(self, model: Any, headers: dict[str, TensorInfo]) -> None:
        """Every layer that the config lists exists in the model, and every one that MLX's files hold quantized is a linear."""
        made = {s for n, m in model.named_modules() if isinstance(m, PackedLinear) for s in _spellings(n, model.base_model_prefix)}
        lost = [name for name in self.stored.get("layers", []) if name not in made]
        if lost or not made:
            what = f"the model has no linear '{lost[0]}'" if lost else "none of the model's linears is stored quantized"
            raise CheckpointError(what, "config.json: quantization_config", "The config does not belong to these weights")
        scaled = {n.removesuffix(".scales") for n in headers if n.endswith(".scales")} if self.format is FORMATS["mlx"] else set[str]()
        if others := sorted(scaled - made):
            raise FormatError("leangrid reads quantized linears only, and this is another layer", others[0], "Load it with mlx-lm")

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        """Values, before anything runs: finite grids in order, padding bits zero. Then the layout that the kernels read."""
        for name, layer in model.named_modules():
            if isinstance(layer, PackedLinear):
                tensors = dict(layer.named_buffers())
                self.format.check(tensors, self.scheme, (layer.out_features, layer.in_features), name)
                layer.prepare()
        return model

    def is_serializable(self) -> bool:
        """``save_pretrained`` writes the packed tensors back as they are."""
        return True

    @property
    def is_trainable(self) -> bool:
        return False


def _headers(files: list[str]) -> dict[str, TensorInfo]:
    headers: dict[str, TensorInfo] = {}
    for file in files:
        headers.update(read_header(Path(file)))
    return headers


def _spellings(name: str, prefix: str) -> tuple[str, ...]:
    """Names under which a checkpoint may keep the module ``name``: a base model is stored with or without its prefix."""
    return (name, f"{prefix}.{name}", re.sub(rf"^{re.escape(prefix)}\.", "", name)) if prefix else (name,)
