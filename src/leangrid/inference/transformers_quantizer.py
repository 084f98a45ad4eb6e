"""leangrid's quantizer for transformers: it makes packed layers where the checkpoint stores codes.

What a damaged file could spoil is checked here, for ``leangrid.load`` and ``from_pretrained`` alike: names, shapes and
dtypes against the headers before a tensor is read, and values before the model is returned.

Importing this module adds the quantizer to transformers' tables. transformers_hook imports it while transformers is
being imported, which may be in the middle of this module's own import."""

import re
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from leangrid.errors import CheckpointError, FormatError
from leangrid.formats import FORMATS, Format, format_of, schemes_of
from leangrid.formats.base import Layout
from leangrid.formats.checks import holds_codes
from leangrid.grids import AffineGrid
from leangrid.inference.layers import AffineLinear, LutLinear, OffsetLinear, PackedLinear
from leangrid.models.expert_forms import form_of
from leangrid.models.experts import unfuse_experts
from leangrid.models.linears import is_linear, linear_shape
from leangrid.schemes import Scheme
from leangrid.storage.dtypes import COMPUTED, DTYPES, dtype_of
from leangrid.storage.safetensors import TensorInfo, read_tensor_infos

METHOD = FORMATS["lut"].QUANT_METHOD
# Containers whose tensors are the buffers of our layers -> the layer for (scheme, rows, cols, bias, dtype of the model,
# dtype of the scales in the file). The tensors of every other container are unpacked after they are read.
_LAYERS: dict[str, Callable[[Scheme, int, int, bool, torch.dtype, torch.dtype], PackedLinear]] = {
    "lut": lambda scheme, rows, cols, bias, dtype, _: LutLinear(cols, rows, scheme.bits, bias, dtype, "meta"),
    "compressed-tensors": lambda scheme, rows, cols, bias, dtype, stored: AffineLinear(
        cols, rows, scheme.bits, bias, dtype, "meta", scheme.group_size, scheme.symmetric, stored_dtype=stored
    ),
    "mlx": lambda scheme, rows, cols, bias, dtype, _: OffsetLinear(
        cols, rows, scheme.bits, bias, dtype, "meta", scheme.group_size or cols
    ),
}


def route_to_leangrid(quantization_config: dict[str, Any], dtype: str | None = None) -> dict[str, Any]:
    """The ``quantization_config`` that makes transformers load a checkpoint of any container of ours on our layers.

    Args:
        quantization_config: the checkpoint's own; saving the model writes it back.
        dtype: the ``dtype`` in config.json, to which weights are rounded, in whatever dtype they are computed; None
            where config.json says none.
    """
    return {"quant_method": METHOD, "stored": deepcopy(quantization_config), "model_dtype": dtype}


class LeangridConfig(QuantizationConfigMixin):
    """The checkpoint's ``quantization_config``, as it is stored."""

    def __init__(self, **fields: Any) -> None:
        self.quant_method = METHOD  # pyright: ignore[reportAttributeAccessIssue]
        self.stored: dict[str, Any] = fields.get("stored", fields)
        self.model_dtype: str | None = fields.get("model_dtype")

    def to_dict(self) -> dict[str, Any]:
        return deepcopy(self.stored)


class StoredLinear(nn.Module):
    """A linear while it is loaded: its buffers are the container's tensors, until it becomes a packed layer."""

    bias: nn.Parameter | None

    def __init__(
        self,
        rows: int,
        cols: int,
        bias: bool,
        dtype: torch.dtype,
        layout: Layout,
    ) -> None:
        super().__init__()
        self.register_parameter(
            "bias", nn.Parameter(torch.empty(rows, dtype=dtype, device="meta"), requires_grad=False) if bias else None
        )
        for suffix, (stored, shape) in layout.items():
            self.register_buffer(suffix, torch.empty(shape, dtype=stored, device="meta"))
        self.shape = (rows, cols)  # from now on it has a weight

    def __getattr__(self, name: str) -> Any:
        if name == "weight" and name not in self._buffers and "shape" in vars(self):  # for a model that asks for it
            return torch.empty(self.shape, dtype=torch.float32, device="meta")
        return super().__getattr__(name)


class LeangridQuantizer(HfQuantizer):
    """Loads quantized checkpoints; quantizing itself is ``leangrid.quantize``."""

    requires_calibration = True

    def __init__(self, quantization_config: LeangridConfig, **fields: Any) -> None:
        super().__init__(quantization_config, **fields)
        self.stored = quantization_config.stored
        self.format: Format = format_of(self.stored)
        schemes_of(self.stored, ())  # refuses what leangrid does not read, by its name
        self._paths: dict[str, str] = {}  # name in the files -> path of the linear
        self._names: dict[str, list[str]] = {}  # the other way round
        self.schemes: dict[str, Scheme] = {}  # module -> scheme, of the layers made
        self.model_dtype = dtype_of(quantization_config.model_dtype)

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> None:
        headers = _headers(kwargs.get("checkpoint_files") or [])
        self._prepare_names(model, headers)
        dtype = kwargs.get("dtype") or torch.get_default_dtype()
        for name, layer in list(model.named_modules()):
            shape = linear_shape(layer) if is_linear(layer) else (0, 0)
            if 0 in shape:  # also a linear without rows or columns, such as those of no shared experts
                continue
            schemes = schemes_of(self.stored, self._spelled(name, model.base_model_prefix))
            stored = next((n for n, scheme in schemes.items() if self._is_quantized(n, headers, scheme, shape)), None)
            if stored is None:
                continue
            if headers:
                self._check_headers(headers, stored, schemes[stored], shape)
            scale = headers.get(f"{stored}.weight_scale")
            scale_dtype = dtype if scale is None else scale.torch_dtype
            self.schemes[name] = schemes[stored]
            made = self._make_layer(schemes[stored], shape, layer.bias is not None, dtype, scale_dtype)
            model.set_submodule(name, made)
        self._check_complete(model, headers)

    def _is_quantized(self, name: str, headers: dict[str, TensorInfo], scheme: Scheme, shape: tuple[int, int]) -> bool:
        """Whether a covered linear is stored quantized under this spelling of its name: where config.json lists no
        layers, the file decides."""
        layout = self.format.layout(scheme, shape, torch.float32)
        return "layers" in self.stored or not headers or holds_codes(headers, name, layout)

    def _make_layer(
        self, scheme: Scheme, shape: tuple[int, int], bias: bool, dtype: torch.dtype, scale_dtype: torch.dtype
    ) -> PackedLinear | StoredLinear:
        make = _LAYERS.get(self.format.NAME)
        if make is None:
            return StoredLinear(*shape, bias, dtype, self.format.layout(scheme, shape, dtype))
        return make(scheme, *shape, bias, dtype, scale_dtype)

    def _check_headers(self, headers: dict[str, TensorInfo], name: str, scheme: Scheme, shape: tuple[int, int]) -> None:
        """CheckpointError unless the headers say all of the layer's tensors, of the right shapes and dtypes, and no
        other."""
        allowed_floats = {DTYPES[float_] for float_ in COMPUTED}
        layout = self.format.layout(scheme, shape, torch.float32)
        way_out = "The result is damaged or incomplete: leangrid verify DIR, then quantize or copy it again"
        for suffix, (dtype, expected) in layout.items():
            info = headers.get(f"{name}.{suffix}")
            if info is None:
                raise CheckpointError("is missing", f"{name}.{suffix}", way_out)
            stored = info.torch_dtype
            # float32: the model's dtype
            right = stored == dtype or (dtype == torch.float32 and stored in allowed_floats)
            if not right or tuple(info.shape) != expected:
                raise CheckpointError(
                    f"is {info.dtype} {list(info.shape)}, not {dtype} {list(expected)}", f"{name}.{suffix}", way_out
                )
        beside = {n for n in headers if n.rpartition(".")[0] == name} - {f"{name}.{s}" for s in (*layout, "bias")}
        if beside:
            raise CheckpointError("does not belong to this format", min(beside), way_out)

    def _check_complete(self, model: Any, headers: dict[str, TensorInfo]) -> None:
        """Refuse a config that lists a layer which the model lacks, and files that hold another layer than a linear
        quantized."""
        made = {
            s
            for n, m in model.named_modules()
            if isinstance(m, PackedLinear | StoredLinear)
            for s in self._spelled(n, model.base_model_prefix)
        }
        lost = [name for name in self.stored.get("layers", []) if name not in made]
        if lost or not made:
            what = f"the model has no linear '{lost[0]}'" if lost else "none of the model's linears is stored quantized"
            raise CheckpointError(
                what, "config.json: quantization_config", "The config does not belong to these weights"
            )
        mark = self.format.MARK
        marked = {n.removesuffix(f".{mark}") for n in headers if n.endswith(f".{mark}")} if mark else set[str]()
        if others := sorted(marked - made):
            raise FormatError(
                "leangrid reads quantized linears only, and this is another layer", others[0], "Load it with mlx-lm"
            )

    def update_weight_conversions(self, weight_conversions: Any, *model: Any) -> Any:
        """transformers' own, but that tensors of linears go to where ``match_result`` found them: so experts that are
        apart here are not merged. (transformers 5.17 gives no model.)"""
        # Imported here: transformers itself may be half imported when it imports this module.
        from transformers.core_model_loading import WeightRenaming

        from leangrid.inference.result_renaming import ResultRenaming, leave_alone

        given = list(super().update_weight_conversions(weight_conversions, *model))
        renamings = [one for one in given if isinstance(one, WeightRenaming)]
        others = [one for one in given if not isinstance(one, WeightRenaming)]
        if not self._paths:
            return [*renamings, *others]
        for one in others:
            leave_alone(one, frozenset(self._paths.values()))
        return [ResultRenaming(self._paths, renamings), *others]

    def _prepare_names(self, model: Any, headers: dict[str, TensorInfo]) -> None:
        """Take the experts of ``model`` apart that are stored so, and find its linears in the files."""
        if not headers:
            unfuse_experts(model)
            return
        from leangrid.models.result_names import match_result  # as above
        from leangrid.models.stored import merged_mixtures

        for module in model.modules():  # transformers fills no module at random whose experts it would not find
            if any(form_of(child) is not None for child in module.children()):
                module._is_hf_initialized = True
        fused = deepcopy(model)  # on the meta device
        with torch.device("cpu"):  # transformers loads under that of "meta"
            whole = merged_mixtures(fused, headers)
            unfuse_experts(model, keep=whole)
            self._paths = match_result(fused, model, headers)
        for name, path in self._paths.items():
            self._names.setdefault(path, []).append(name)

    def _spelled(self, name: str, prefix: str) -> tuple[str, ...]:
        """The names under which the checkpoint may store the module ``name``."""
        return tuple(dict.fromkeys((*self._names.get(name, ()), *_spellings(name, prefix))))

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        """Check the values of every layer, then bring its codes into the layout that the kernels read."""
        for name, layer in list(model.named_modules()):
            if isinstance(layer, StoredLinear):
                model.set_submodule(name, self._unpacked(name, layer, kwargs.get("dtype") or model.dtype))
            elif isinstance(layer, PackedLinear):
                self.format.check(
                    dict(layer.named_buffers()), self.schemes[name], (layer.out_features, layer.in_features), name
                )
                layer.prepare()
        return model

    def _unpacked(self, name: str, stored: StoredLinear, dtype: torch.dtype) -> nn.Module:
        """A linear of another container, checked, as an ``AffineLinear`` that computes in ``dtype``; llama.cpp's blocks
        as an nn.Linear."""
        (rows, cols), scheme = stored.shape, self.schemes[name]
        codes, grid = self.format.unpack(dict(stored.named_buffers()), scheme, stored.shape, name)
        if self.format.BLOCKS:
            linear = nn.Linear(cols, rows, bias=False, device="meta")
            linear.weight = nn.Parameter(grid.dequantize(codes).to(dtype), requires_grad=False)
            linear.register_parameter("bias", stored.bias)
            return linear
        if not isinstance(grid, AffineGrid):
            raise FormatError(f"leangrid has no layer for {type(grid).__name__}", name, "Load it with its own engine")
        try:
            tensors = FORMATS["compressed-tensors"].pack(codes, grid, dtype, scheme)
        except FormatError as error:
            raise FormatError(error.what, name, "Load it with dtype float16 or float32") from error
        rounded_to = self.format.precision(self.model_dtype or dtype).dtype
        layer = _LAYERS["compressed-tensors"](scheme, rows, cols, False, dtype, rounded_to)
        layer.load_state_dict(tensors, assign=True)
        layer.register_parameter("bias", stored.bias)
        return layer

    def is_serializable(self) -> bool:
        """Whether ``save_pretrained`` may write the model: not where the layers hold other tensors than the
        container's."""
        return self.format.NAME in _LAYERS

    @property
    def is_trainable(self) -> bool:
        return False


def _headers(files: list[str]) -> dict[str, TensorInfo]:
    headers: dict[str, TensorInfo] = {}
    for file in files:
        headers.update(read_tensor_infos(Path(file)))
    return headers


def _spellings(name: str, prefix: str) -> tuple[str, ...]:
    """Names under which a checkpoint may store the module ``name``: a base model's with or without its prefix."""
    return (name, f"{prefix}.{name}", re.sub(rf"^{re.escape(prefix)}\.", "", name)) if prefix else (name,)


AUTO_QUANTIZATION_CONFIG_MAPPING.setdefault(METHOD, LeangridConfig)
AUTO_QUANTIZER_MAPPING.setdefault(METHOD, LeangridQuantizer)
