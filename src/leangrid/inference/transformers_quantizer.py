"""leangrid's row in transformers' table of quantizers: makes packed layers where the checkpoint has them.

Everything a damaged file could spoil is checked here, so it holds for ``leangrid.load`` and ``from_pretrained`` alike:
names, shapes and dtypes against the headers before a tensor is read, values before the model is handed out.

Importing this file is what adds the row: transformers_hook imports it while transformers is being imported, and that
may be half way through this file's own import."""

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
from leangrid.formats import FORMATS, Format, compressed_tensors, format_of, schemes_of
from leangrid.grids import AffineGrid
from leangrid.inference.layers import AffineLinear, LutLinear, OffsetLinear, PackedLinear
from leangrid.models import experts
from leangrid.recipe import Scheme
from leangrid.storage.safetensors import TensorInfo, read_header

METHOD = FORMATS["lut"].QUANT_METHOD
_OF_LAYERS = (FORMATS["lut"], FORMATS["compressed-tensors"], FORMATS["mlx"])  # stored as the layers' own buffers
_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I32": torch.int32, "I64": torch.int64,
           "U32": torch.uint32, "U8": torch.uint8}  # fmt: skip


def through_leangrid(quantization_config: dict[str, Any], dtype: str | None = None) -> dict[str, Any]:
    """A ``quantization_config`` of any of our formats, routed to our layers; saving the model writes the original back.

    ``dtype`` is what config.json says: W is rounded to it, whatever it is computed in.
    """
    return {"quant_method": METHOD, "stored": deepcopy(quantization_config), "model_dtype": dtype}


class LeangridConfig(QuantizationConfigMixin):
    """The checkpoint's ``quantization_config``, kept as it was stored."""

    def __init__(self, **fields: Any) -> None:
        self.quant_method = METHOD  # pyright: ignore[reportAttributeAccessIssue]
        self.stored: dict[str, Any] = fields.get("stored", fields)
        self.model_dtype: str | None = fields.get("model_dtype")

    def to_dict(self) -> dict[str, Any]:
        return deepcopy(self.stored)


class StoredLinear(nn.Module):
    """A linear as a container stores it, buffers named and typed by its layout, until it becomes a packed layer."""

    bias: nn.Parameter | None

    def __init__(
        self,
        rows: int,
        cols: int,
        bias: bool,
        dtype: torch.dtype,
        layout: dict[str, tuple[torch.dtype, tuple[int, ...]]],
    ) -> None:
        super().__init__()
        self.shape = (rows, cols)
        self.register_parameter(
            "bias", nn.Parameter(torch.empty(rows, dtype=dtype, device="meta"), requires_grad=False) if bias else None
        )
        for suffix, (stored, shape) in layout.items():
            self.register_buffer(suffix, torch.empty(shape, dtype=stored, device="meta"))


class LeangridQuantizer(HfQuantizer):
    """Loads finished results only: quantizing is ``leangrid.quantize``."""

    requires_calibration = True

    def __init__(self, quantization_config: LeangridConfig, **fields: Any) -> None:
        super().__init__(quantization_config, **fields)
        self.stored = quantization_config.stored
        self.format: Format = format_of(self.stored)
        schemes_of(self.stored, ())  # refused here, by name
        self._separate = False  # a mixture of experts, an expert's linears apart
        self.schemes: dict[str, Scheme] = {}  # of the layers made, by module
        known = {str(dtype).removeprefix("torch."): dtype for dtype in _DTYPES.values()}
        self.model_dtype: torch.dtype | None = known.get(str(quantization_config.model_dtype))

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> None:
        if experts.separate(model, model.config.model_type == "mixtral"):
            self._separate = True
        headers = _headers(kwargs.get("checkpoint_files") or [])
        dtype = kwargs.get("dtype") or torch.get_default_dtype()
        for name, layer in list(model.named_modules()):
            if not isinstance(layer, (nn.Linear, Conv1D)):
                continue
            cols, rows = (
                (layer.in_features, layer.out_features) if isinstance(layer, nn.Linear) else tuple(layer.weight.shape)
            )
            schemes = schemes_of(self.stored, _spellings(name, model.base_model_prefix))
            stored = next(
                (n for n, scheme in schemes.items() if self._is_quantized(n, headers, scheme, (rows, cols))), None
            )
            if stored is None:
                continue
            if headers:
                self._check_headers(headers, stored, schemes[stored], (rows, cols))
            scale = headers.get(f"{stored}.weight_scale")
            in_file = dtype if scale is None else _DTYPES[scale.dtype]
            self.schemes[name] = schemes[stored]
            model.set_submodule(name, self._make(schemes[stored], rows, cols, layer.bias is not None, dtype, in_file))
        self._check_complete(model, headers)

    def _is_quantized(self, name: str, headers: dict[str, TensorInfo], scheme: Scheme, shape: tuple[int, int]) -> bool:
        # Most containers say "every Linear but these", so the spelling that the file uses decides; a dense weight is
        # called weight too.
        layout = self.format.layout(scheme, shape, torch.float32)
        codes = [
            f"{name}.{suffix}"
            for suffix, (dtype, _) in layout.items()
            if dtype in (torch.int32, torch.uint32, torch.uint8)
        ]
        found = [
            key
            for key in codes
            if key in headers and (not key.endswith(".weight") or headers[key].dtype in ("I32", "U32", "U8"))
        ]
        return "layers" in self.stored or not headers or bool(found)

    def _make(
        self, scheme: Scheme, rows: int, cols: int, bias: bool, dtype: torch.dtype, in_file: torch.dtype
    ) -> PackedLinear | StoredLinear:
        if self.format not in _OF_LAYERS:
            return StoredLinear(rows, cols, bias, dtype, self.format.layout(scheme, (rows, cols), dtype))
        if scheme.grid == "nonuniform":
            return LutLinear(cols, rows, scheme.bits, bias, dtype, "meta")
        if self.format is FORMATS["mlx"]:
            return OffsetLinear(cols, rows, scheme.bits, bias, dtype, "meta", scheme.group_size or cols)
        return AffineLinear(
            cols, rows, scheme.bits, bias, dtype, "meta", scheme.group_size, scheme.symmetric, stored_dtype=in_file
        )

    def _check_headers(self, headers: dict[str, TensorInfo], name: str, scheme: Scheme, shape: tuple[int, int]) -> None:
        """The layer's tensors, by header alone: present, of the right shape and dtype, and nothing else beside them."""
        allowed_floats = (torch.float32, torch.float16, torch.bfloat16)
        layout = self.format.layout(scheme, shape, torch.float32)
        way_out = "The result is damaged or incomplete: leangrid verify DIR, then quantize or copy it again"
        for suffix, (dtype, expected) in layout.items():
            info = headers.get(f"{name}.{suffix}")
            if info is None:
                raise CheckpointError("is missing", f"{name}.{suffix}", way_out)
            stored = _DTYPES.get(info.dtype)
            right = stored == dtype or (dtype == torch.float32 and stored in allowed_floats)  # float32: as the model is
            if not right or tuple(info.shape) != expected:
                raise CheckpointError(
                    f"is {info.dtype} {list(info.shape)}, not {dtype} {list(expected)}", f"{name}.{suffix}", way_out
                )
        beside = {n for n in headers if n.rpartition(".")[0] == name} - {f"{name}.{s}" for s in (*layout, "bias")}
        if beside:
            raise CheckpointError("does not belong to this format", min(beside), way_out)

    def _check_complete(self, model: Any, headers: dict[str, TensorInfo]) -> None:
        """Every layer that the config lists exists in the model, and every one that MLX's files hold quantized is a
        linear."""
        made = {
            s
            for n, m in model.named_modules()
            if isinstance(m, PackedLinear | StoredLinear)
            for s in _spellings(n, model.base_model_prefix)
        }
        lost = [name for name in self.stored.get("layers", []) if name not in made]
        if lost or not made:
            what = f"the model has no linear '{lost[0]}'" if lost else "none of the model's linears is stored quantized"
            raise CheckpointError(
                what, "config.json: quantization_config", "The config does not belong to these weights"
            )
        scaled = (
            {n.removesuffix(".scales") for n in headers if n.endswith(".scales")}
            if self.format is FORMATS["mlx"]
            else set[str]()
        )
        if others := sorted(scaled - made):
            raise FormatError(
                "leangrid reads quantized linears only, and this is another layer", others[0], "Load it with mlx-lm"
            )

    def update_weight_conversions(self, weight_conversions: Any, *model: Any) -> Any:
        """A mixture is already as the checkpoint stores it: transformers must not stack or rename its experts. (5.17
        gives no model.)"""
        return [] if self._separate else super().update_weight_conversions(weight_conversions, *model)

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        """Values, before anything runs: finite grids in order, padding bits zero. Then the layout that the kernels
        read."""
        for name, layer in list(model.named_modules()):
            if isinstance(layer, StoredLinear):
                model.set_submodule(name, self._packed(name, layer, kwargs.get("dtype") or model.dtype))
            elif isinstance(layer, PackedLinear):
                self.format.check(
                    dict(layer.named_buffers()), self.schemes[name], (layer.out_features, layer.in_features), name
                )
                layer.prepare()
        return model

    def _packed(self, name: str, stored: StoredLinear, dtype: torch.dtype) -> nn.Module:
        """A linear of another container as our own layer, checked, that computes in ``dtype``; llama.cpp's blocks as a
        dense one."""
        (rows, cols), scheme = stored.shape, self.schemes[name]
        codes, grid = self.format.unpack(dict(stored.named_buffers()), scheme, stored.shape, name)
        if self.format is FORMATS["gguf"]:
            linear = nn.Linear(cols, rows, bias=False, device="meta")
            linear.weight = nn.Parameter(grid.dequantize(codes).to(dtype), requires_grad=False)
            linear.register_parameter("bias", stored.bias)
            return linear
        if not isinstance(grid, AffineGrid):
            raise FormatError(f"leangrid has no layer for {type(grid).__name__}", name, "Load it with its own engine")
        try:
            tensors = compressed_tensors.pack(codes, grid, dtype, scheme)
        except FormatError as error:
            raise FormatError(error.what, name, "Load it with dtype float16 or float32") from error
        grouping = (scheme.group_size, scheme.symmetric)
        in_file = self.format.precision(self.model_dtype or dtype).dtype
        layer = AffineLinear(cols, rows, scheme.bits, False, dtype, "meta", *grouping, stored_dtype=in_file)
        layer.load_state_dict(tensors, assign=True)
        layer.register_parameter("bias", stored.bias)
        return layer

    def is_serializable(self) -> bool:
        """``save_pretrained`` writes packed tensors back as they are; a converted container would get its config with
        our tensors."""
        return self.format in _OF_LAYERS

    @property
    def is_trainable(self) -> bool:
        return False


def _headers(files: list[str]) -> dict[str, TensorInfo]:
    headers: dict[str, TensorInfo] = {}
    for file in files:
        headers.update(read_header(Path(file)))
    return headers


def _spellings(name: str, prefix: str) -> tuple[str, ...]:
    """Names under which a checkpoint may keep the module ``name``: a base model is stored with or without its
    prefix."""
    return (name, f"{prefix}.{name}", re.sub(rf"^{re.escape(prefix)}\.", "", name)) if prefix else (name,)


AUTO_QUANTIZATION_CONFIG_MAPPING.setdefault(METHOD, LeangridConfig)
AUTO_QUANTIZER_MAPPING.setdefault(METHOD, LeangridQuantizer)
