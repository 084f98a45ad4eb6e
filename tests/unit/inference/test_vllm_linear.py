"""Our layers for vLLM, without vLLM: what is refused, how parts are joined, and the arithmetic. `make interop` runs
them in vLLM itself."""

import importlib
import sys
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn

from leangrid.errors import CheckpointError, FormatError
from leangrid.formats import FORMATS
from leangrid.grids import NonuniformGrid
from leangrid.inference import vllm_plugin
from leangrid.schemes import Scheme

REGISTERED: dict[str, type] = {}
SCHEME = Scheme.parse("NU3")
MAPPING = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}


class LinearBase(nn.Module):
    """What ours asks of vLLM's: its type and its name."""

    def __init__(self, prefix: str = "layer") -> None:
        super().__init__()
        self.prefix = prefix


class QuantizationConfig:
    def __init__(self) -> None:
        self.packed_modules_mapping: dict[str, list[str]] = {}


def set_weight_attrs(parameter: nn.Parameter, attributes: dict[str, Any]) -> None:
    for name, value in attributes.items():
        setattr(parameter, name, value)


@pytest.fixture
def ours(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """leangrid.inference.vllm_linear on a stand-in of the few names that it takes from vLLM."""
    layers, base = ModuleType("vllm.model_executor.layers"), "vllm.model_executor"
    linear = {
        "LinearBase": LinearBase,
        "LinearMethodBase": object,
        "UnquantizedLinearMethod": type("UnquantizedLinearMethod", (), {}),
    }

    def register_quantization_config(name: str) -> Any:
        return lambda kind: REGISTERED.update({name: kind}) or kind

    names = {
        f"{base}.layers.linear": linear,
        f"{base}.layers.quantization": {"register_quantization_config": register_quantization_config},
        f"{base}.layers.quantization.base_config": {"QuantizationConfig": QuantizationConfig},
        f"{base}.utils": {"set_weight_attrs": set_weight_attrs},
    }
    for parent in ("vllm", base):
        monkeypatch.setitem(sys.modules, parent, ModuleType(parent))
    monkeypatch.setitem(sys.modules, layers.__name__, layers)
    for name, members in names.items():
        module = ModuleType(name)
        module.__dict__.update(members)
        monkeypatch.setitem(sys.modules, name, module)
    REGISTERED.clear()
    sys.modules.pop("leangrid.inference.vllm_linear", None)
    yield importlib.import_module("leangrid.inference.vllm_linear")
    sys.modules.pop("leangrid.inference.vllm_linear", None)


def config(ours: ModuleType, *layers: str) -> Any:
    made = ours.LeangridConfig.from_config(FORMATS["lut"].config(dict.fromkeys(layers, SCHEME), []))
    made.packed_modules_mapping = MAPPING
    return made


def test_registering_again_changes_nothing(ours: ModuleType) -> None:
    vllm_plugin.register()
    first = dict(REGISTERED)
    vllm_plugin.register()
    assert REGISTERED == first == {"leangrid": ours.LeangridConfig}


def test_the_entry_point_is_the_plugin() -> None:
    from importlib.metadata import entry_points

    found = [point.value for point in entry_points(group="vllm.general_plugins") if point.name == "leangrid"]
    assert found in (
        [],
        ["leangrid.inference.vllm_plugin:register"],
    )  # none where leangrid is on the path but not installed
    assert callable(vllm_plugin.register)


def test_joined_layers_are_quantized_together_or_not_at_all(ours: ModuleType) -> None:
    here = config(ours, "m.q_proj", "m.k_proj", "m.v_proj", "m.o_proj", "m.gate_proj")
    assert isinstance(here.get_quant_method(LinearBase(), "m.qkv_proj"), ours.LeangridLinearMethod)
    assert isinstance(here.get_quant_method(LinearBase(), "m.o_proj"), ours.LeangridLinearMethod)
    assert type(here.get_quant_method(LinearBase(), "m.router")).__name__ == "UnquantizedLinearMethod"
    assert here.get_quant_method(nn.Embedding(2, 2), "m.embed") is None
    with pytest.raises(FormatError, match=r"m\.up_proj is not quantized"):
        here.get_quant_method(LinearBase(), "m.gate_up_proj")


def test_experts_that_vllm_computes_as_one_are_refused_by_name(ours: ModuleType) -> None:
    """Its plain loader would meet packed codes."""
    experts = type("FusedMoE", (nn.Module,), {})()
    config = ours.LeangridConfig(SCHEME, ["model.layers.0.mlp.experts.3.up_proj", "model.layers.0.self_attn.o_proj"])
    with pytest.raises(FormatError, match=r"mlp\.experts\.3\.up_proj and others as one FusedMoE"):
        config.get_quant_method(experts, "model.layers.0.mlp.experts")
    assert config.get_quant_method(experts, "model.layers.1.mlp.experts") is None
    assert config.get_quant_method(nn.Identity(), "model.layers.0.self_attn.attn") is None


def test_other_containers_are_refused(ours: ModuleType) -> None:
    with pytest.raises(FormatError, match="blocks"):
        ours.LeangridConfig.from_config({"quant_method": "leangrid", "format": "blocks", "version": 1})


def test_rows_of_several_layers_are_one_product(ours: ModuleType) -> None:
    """As vLLM loads q, k, v: each part's rows into its place. More rows than a tile, and not a multiple of one."""
    generator = torch.Generator().manual_seed(0)
    cols, heights, layer = 96, [10, 6, 6], LinearBase("m.qkv_proj")
    method = ours.LeangridLinearMethod(SCHEME)

    def load(parameter: nn.Parameter, stored: torch.Tensor, part: int) -> None:
        parameter.data.narrow(parameter.output_dim, sum(heights[:part]), heights[part]).copy_(stored)  # pyright: ignore

    method.create_weights(layer, cols, heights, cols, sum(heights), torch.float32, weight_loader=load)
    dense = []
    for part, rows in enumerate(heights):
        grid = NonuniformGrid(torch.randn(rows, 8, generator=generator).sort(dim=1).values)
        codes = torch.randint(8, (rows, cols), generator=generator, dtype=torch.uint8)
        dense.append(grid.dequantize(codes))
        for name, tensor in FORMATS["lut"].pack(codes, grid, torch.float32, SCHEME).items():
            parameter = getattr(layer, name)
            parameter.weight_loader(parameter, tensor, part)
    bias, weight = torch.randn(sum(heights), generator=generator), torch.cat(dense)
    method.process_weights_after_loading(layer)
    method.process_weights_after_loading(layer)  # vLLM may do so
    for tokens in (3, 50):
        x = torch.randn(tokens, cols, generator=generator)
        torch.testing.assert_close(method.apply(layer, x, bias), x @ weight.T + bias, rtol=1e-5, atol=1e-4)


def test_damage_is_noticed_before_anything_runs(ours: ModuleType) -> None:
    layer, method = LinearBase("m.o_proj"), ours.LeangridLinearMethod(SCHEME)
    method.create_weights(layer, 32, [4], 32, 4, torch.float32, weight_loader=lambda *_: None)
    layer.weight.data.zero_()
    layer.lut.data.fill_(float("nan"))
    with pytest.raises(CheckpointError, match="NaN"):
        method.process_weights_after_loading(layer)


@pytest.mark.parametrize(
    ("bits", "here", "fits"), [(3, 96, True), (3, 48, False), (4, 8, True), (4, 4, False), (2, 100, True)]
)
def test_rows_are_split_over_ranks_at_words_only(ours: ModuleType, bits: int, here: int, fits: bool) -> None:
    everywhere = here if (bits, here) == (2, 100) else 2 * here  # one rank has whole rows, whatever fills its last word
    if fits:
        ours.check_columns("m.down_proj", bits, here, everywhere)
    else:
        with pytest.raises(FormatError, match="tensor-parallel-size"):
            ours.check_columns("m.down_proj", bits, here, everywhere)


def test_a_table_is_never_rounded(ours: ModuleType) -> None:
    seen: list[torch.Tensor] = []
    load = ours.exact_loader(lambda parameter, stored: seen.append(stored))
    parameter = nn.Parameter(torch.empty(2, dtype=torch.float16), requires_grad=False)
    load(parameter, torch.tensor([0.5, -2.0], dtype=torch.bfloat16))
    assert len(seen) == 1
    for stored in (
        torch.tensor([0.5, 1e-30], dtype=torch.bfloat16),
        torch.tensor([0.1, 0.2]),
        torch.tensor([1, 2], dtype=torch.int32),
    ):
        with pytest.raises(CheckpointError, match="--dtype auto"):
            load(parameter, stored)
    assert len(seen) == 1
