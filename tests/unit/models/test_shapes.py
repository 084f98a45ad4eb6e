"""Models by name: the table gives the published numbers of parameters, and a description plans as the checkpoint
does."""

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

from leangrid.errors import CheckpointError, LeangridError, OutputError
from leangrid.models.shapes import SHAPES, describe_shape
from leangrid.planning.plan import plan
from leangrid.recipe import Recipe

# As the hub's safetensors metadata count them.
PARAMETERS = {
    "llama-2-7b": 6_738_415_616,
    "llama-2-13b": 13_015_864_320,
    "llama-2-70b": 68_976_648_192,
    "llama-3-8b": 8_030_261_248,
    "llama-3-70b": 70_553_706_496,
    "llama-3.1-405b": 405_853_388_800,
    "mistral-7b": 7_241_732_096,
    "mistral-large-123b": 122_610_069_504,
    "qwen2.5-0.5b": 494_032_768,
    "qwen2.5-7b": 7_615_616_512,
    "qwen2.5-72b": 72_706_203_648,
    "qwen3-8b": 8_190_735_360,
    "gemma-2-9b": 9_241_705_984,
    "smollm2-135m": 134_515_008,
}


_FAST = ("llama-3-8b", "mistral-7b", "qwen2.5-0.5b", "smollm2-135m")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in _FAST else pytest.mark.slow) for name in SHAPES]
)
def test_every_row_has_the_published_number_of_parameters(name: str) -> None:
    described = describe_shape(name)
    assert sum(torch.Size(tensor.shape).numel() for tensor in described.tensors.values()) == PARAMETERS[name]
    assert sum(tensor.nbytes for tensor in described.tensors.values()) == 2 * PARAMETERS[name]


def test_a_config_alone_plans_as_its_checkpoint(tiny: Callable[..., Path]) -> None:
    source, recipe = tiny("qwen2", dtype=torch.bfloat16), Recipe(scheme="NU3", samples=4, length=32)
    whole, alone, by_directory = (
        plan(source, recipe),
        plan(None, recipe, shape=str(source / "config.json")),
        plan(None, recipe, shape=str(source)),
    )
    for name in (
        "layers",
        "bits_per_weight",
        "bytes",
        "bytes_before",
        "disk_bytes",
        "placement",
        "layer_plans",
        "format",
    ):
        assert asdict(whole)[name] == asdict(alone)[name] == asdict(by_directory)[name]


def test_weights_of_a_description_cannot_be_read() -> None:
    with pytest.raises(CheckpointError, match="holds no weights"):
        describe_shape("smollm2-135m").read("model.norm.weight")


def test_a_large_model_on_devices_that_are_not_here() -> None:
    one, two, fast = (plan(None, shape="llama-3-70b", device=device) for device in ("16GB", "2x16GB", "2x16GB@90TF"))
    assert two.layers == 80 * 7 and two.peak_gpu_bytes < 0.94 * 16 * 2**30 and two.placement["in_place"]
    assert two.available_ram_bytes is None and two.bound == "compute" and two.devices == 2 and one.devices == 1
    for stage in ("calibrate", "hessian", "solve", "grid", "baseline"):
        assert two.seconds[stage] == pytest.approx(one.seconds[stage] / 2, rel=1e-3)
        assert fast.seconds[stage] == pytest.approx(two.seconds[stage] / 3, rel=1e-3)
    assert two.seconds["factor"] == one.seconds["factor"] > 0, "every rank factors the whole matrix"
    assert "exchange" not in one.seconds and two.seconds["exchange"] > 0
    assert one.seconds["total"] / 2 < two.seconds["total"] < one.seconds["total"]
    states = 2 * 128 * 2048 * 8192 * 2
    assert one.peak_ram_bytes - one.memory["ram_with_states_on_disk"] == pytest.approx(1.1 * 2 * states)
    assert two.rates["assumed"] and two.rates["forward"] == 4 * two.rates["algebra"]


def test_a_checkpoint_on_a_device_that_is_not_here(tiny: Callable[..., Path]) -> None:
    planned = plan(tiny("llama3", dtype=torch.bfloat16), Recipe(samples=4, length=32), device="24GB")
    assert planned.layers == 14 and 0 < planned.peak_gpu_bytes < 2**26 and not planned.placement["replay"]


def test_a_device_too_small_is_refused_with_what_is_needed() -> None:
    with pytest.raises(OutputError, match=r"needs \d+\.\d GiB on 2x8GB at the least, 7\.5 GiB can be used"):
        plan(None, shape="llama-3.1-405b", device="2x8GB")


@pytest.mark.parametrize(("fields", "left_out"), [({}, "finish"), ({"finish": 0, "guide": 4}, "guide")])
def test_a_device_too_small_for_the_whole_model_alone_is_told_what_to_leave_out(
    fields: dict[str, int], left_out: str
) -> None:
    with pytest.raises(OutputError, match=rf"at the least, .* Use --{left_out} 0"):
        plan(None, Recipe.model_validate({"effort": "best"} | fields), shape="llama-3-8b", device="24GB")
    without = Recipe.model_validate({"effort": "best"} | fields | {left_out: 0})
    assert plan(None, without, shape="llama-3-8b", device="24GB").layers == 224


def test_a_model_is_finished_block_by_block_where_its_float32_weights_do_not_fit() -> None:
    planned = plan(None, Recipe(effort="best"), shape="llama-3-8b", device="48GB")
    assert planned.placement["replay"] and planned.memory["peak_phase"] == "finish"
    assert 16 * 2**30 < planned.peak_gpu_bytes < 32 * 2**30


def test_cards_are_known_by_name() -> None:
    """At the memory that such a card reports and the rates of its data sheet, however the name is written."""
    one, two, other = (plan(None, shape="smollm2-135m", device=name) for name in ("h200", "2xH200", "rtx4090"))
    assert one.devices == 1 and two.devices == 2
    assert one.rates == {**two.rates, "ranks": 1} and one.rates["forward"] == pytest.approx(0.7 * 989e12)
    assert one.rates["sums"] == pytest.approx(0.7 * 495e12) and one.rates["algebra"] == pytest.approx(0.7 * 67e12)
    assert other.rates["sums"] == other.rates["algebra"]  # its TensorFloat-32 is no faster


@pytest.mark.parametrize(
    "device",
    ["2x", "48", "0x48GB", "2x48", "48GB@", "0GB", "48GB@0TF", "2x48GB@fast", "-1x48GB", "99999x1GB", "2xh999"],
)
def test_malformed_devices_are_one_sentence(device: str) -> None:
    with pytest.raises(LeangridError) as caught:
        plan(None, shape="smollm2-135m", device=device)
    assert device in str(caught.value) and caught.value.way_out and len(str(caught.value).splitlines()) == 1


def test_what_is_no_shape_is_refused_with_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"'gpt-5' is no known shape and no file.*llama-3\.1-405b"):
        plan(None, shape="gpt-5")
    with pytest.raises(CheckpointError, match=r"there is no config\.json"):
        plan(None, shape=str(tmp_path))
    (tmp_path / "config.json").write_text('{"model_type": "llama", "torch_dtype": "float8"}')
    with pytest.raises(CheckpointError, match="dtype 'float8' cannot be quantized"):
        plan(None, shape=str(tmp_path))
    for source, named in ((None, None), (tmp_path, "smollm2-135m")):
        with pytest.raises(LeangridError, match="a SOURCE or a --shape"):
            plan(source, shape=named)
