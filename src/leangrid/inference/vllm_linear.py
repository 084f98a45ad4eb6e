"""Non-uniform results in vLLM: linear layers with packed codes and one look-up table a row (kernels/packed.py).

vLLM merges q, k, v and gate, up into one layer by their rows. A table belongs to a row, so the merged layer is as exact
as its parts. Only ``vllm_plugin.register`` imports this module."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from vllm.model_executor.layers.linear import (  # pyright: ignore[reportMissingImports]
    LinearBase,
    LinearMethodBase,
    UnquantizedLinearMethod,
)
from vllm.model_executor.layers.quantization import register_quantization_config  # pyright: ignore[reportMissingImports]
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig  # pyright: ignore[reportMissingImports]
from vllm.model_executor.utils import set_weight_attrs  # pyright: ignore[reportMissingImports]

from leangrid.errors import CheckpointError, FormatError
from leangrid.formats import FORMATS
from leangrid.formats.bit_stream import packed_width
from leangrid.kernels import packed
from leangrid.schemes import Scheme
from leangrid.storage.dtypes import torch_name

LUT = FORMATS["lut"]


def register() -> None:
    """Put ``LeangridConfig`` into vLLM's table of quantizations, in place of an earlier registration."""
    register_quantization_config(LUT.QUANT_METHOD)(LeangridConfig)


class LeangridConfig(QuantizationConfig):
    """``quantization_config`` of a LUT result. ``layers`` are the checkpoint's names of the quantized linears."""

    def __init__(self, scheme: Scheme, layers: list[str]) -> None:
        super().__init__()
        self.scheme, self.layers = scheme, layers

    def __repr__(self) -> str:
        return f"LeangridConfig(NU{self.scheme.bits}, {len(self.layers)} layers)"

    def get_name(self) -> str:
        return LUT.QUANT_METHOD

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        return 80  # bfloat16, and what the kernels are compiled for

    @staticmethod
    def get_config_filenames() -> list[str]:
        return []

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "LeangridConfig":
        """FormatError for any other container of ours."""
        return cls(LUT.scheme_of(config), list(config["layers"]))

    def apply_vllm_mapper(self, hf_to_vllm_mapper: Any) -> None:
        """vLLM renames modules of some models; the list follows."""
        self.layers = hf_to_vllm_mapper.apply_list(self.layers)

    def get_quant_method(self, layer: nn.Module, prefix: str) -> Any:
        """``LeangridLinearMethod`` where the checkpoint holds codes, vLLM's plain method for other linears, None for
        what is no linear.

        Raises:
            FormatError: vLLM merges quantized layers with plain ones, or computes quantized experts as one layer.
        """
        if not isinstance(layer, LinearBase):
            inside = next((name for name in self.layers if name.startswith(f"{prefix}.")), None)
            if inside is not None:
                what = f"vLLM computes {inside} and others as one {type(layer).__name__}"
                way_out = "Serve an affine scheme such as W4A16_G128_SYM, or open it with leangrid.load"
                raise FormatError(f"{what}, for which there is no kernel of non-uniform levels", prefix, way_out)
            return None
        parts = merged_layers(prefix, self.packed_modules_mapping)
        listed = [name in self.layers for name in parts]
        if all(listed):
            return LeangridLinearMethod(self.scheme)
        if any(listed):
            plain = parts[listed.index(False)]
            raise FormatError(f"vLLM computes {', '.join(parts)} as one layer, but {plain} is not quantized", prefix,
                              "Quantize all of them, or serve the model with transformers")  # fmt: skip
        return UnquantizedLinearMethod()


class LeangridLinearMethod(LinearMethodBase):
    """y = x W^T + bias, W[i, j] = lut[i, code[i, j]]. vLLM makes one for each layer."""

    cols: int  # of this rank

    def __init__(self, scheme: Scheme) -> None:
        self.scheme, self.bits = scheme, scheme.bits

    def create_weights(
        self,
        layer: Any,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        """``weight`` int32 [rows, words] and ``lut`` [rows, 2^bits] of this rank's rows and columns."""
        rows, bits, self.cols = sum(output_partition_sizes), self.bits, input_size_per_partition
        check_columns(getattr(layer, "prefix", "a layer"), bits, input_size_per_partition, input_size)
        load = exact_loader(extra_weight_attrs.pop("weight_loader"))
        weight = nn.Parameter(
            torch.empty(rows, packed_width(input_size_per_partition, bits), dtype=torch.int32), requires_grad=False
        )
        table = nn.Parameter(torch.empty(rows, 2**bits, dtype=params_dtype), requires_grad=False)
        for name, parameter, extra in (("weight", weight, {"input_dim": 1}), ("lut", table, {})):
            layer.register_parameter(name, parameter)
            set_weight_attrs(parameter, {"output_dim": 0, "weight_loader": load, **extra, **extra_weight_attrs})

    def process_weights_after_loading(self, layer: Any) -> None:
        """Check the values, as ``leangrid.load`` does, and bring the codes into the layout that the kernels read, in
        place of the stored one."""
        if layer.weight.dtype != torch.int32:  # done before
            return
        stored, cols = {"weight": layer.weight.data, "lut": layer.lut.data}, self.cols
        LUT.check(stored, self.scheme, (len(stored["lut"]), cols), getattr(layer, "prefix", "a layer"))
        if packed.can_tile(stored["weight"]):
            layer.weight = nn.Parameter(packed.tile(stored["weight"], self.bits, cols), requires_grad=False)

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        return packed.lut_linear(x, layer.weight, layer.lut, bias, self.bits)


def merged_layers(prefix: str, mapping: dict[str, list[str]]) -> list[str]:
    """The checkpoint's names of the layers that vLLM's layer ``prefix`` is made of: itself, or those that it merges."""
    parent, _, name = prefix.rpartition(".")
    return [f"{parent}.{part}" if parent else part for part in mapping.get(name, [name])]


def check_columns(name: str, bits: int, here: int, all_ranks: int) -> None:
    """FormatError where tensor parallelism would cut a row of codes inside a word."""
    if here != all_ranks and here * bits % 32:
        what = f"{here} of {all_ranks} columns at {bits} bits do not fill whole 32-bit words"
        raise FormatError(f"{name} cannot be split over {all_ranks // here} ranks: {what}", "tensor_parallel_size",
                          "Use a smaller --tensor-parallel-size, such as 1")  # fmt: skip


def exact_loader(load: Callable[..., Any]) -> Callable[..., Any]:
    """vLLM's ``load(parameter, stored, ...)``, which now raises CheckpointError where the parameter's dtype would round
    or wrap a stored value."""

    def checked(parameter: nn.Parameter, stored: Tensor, *rest: Any, **named: Any) -> Any:
        exact = parameter.dtype == stored.dtype
        if not exact and parameter.dtype.is_floating_point and stored.dtype.is_floating_point:
            exact = torch.equal(stored.to(parameter.dtype).to(stored.dtype), stored)
        if not exact:
            kinds = f"{torch_name(stored.dtype)}, vLLM asks for {torch_name(parameter.dtype)}"
            raise CheckpointError(
                f"a table is stored in {kinds}, which changes its values", "--dtype", "Start vLLM with --dtype auto"
            )
        return load(parameter, stored, *rest, **named)

    return checked
