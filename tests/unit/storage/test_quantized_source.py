"""Weights stored in fewer bits than 16: every layout against float64 values computed from its bits, and what a
checkpoint of them looks like from outside."""

import json
import resource
import shutil
from pathlib import Path

import pytest
import quantized_sources
import torch
from quantized_sources import KINDS, e2m1, save, spread, values_of
from safetensors.torch import save_file

from leangrid.errors import CheckpointError, FormatError
from leangrid.storage.quantized_source import MODELOPT
from leangrid.storage.safetensors import save as save_plain
from leangrid.storage.source import open_source


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_values_are_those_of_the_bits(tmp_path: Path, kind: str, dtype: str) -> None:
    made = quantized_sources.write(tmp_path / "source", kind, dtype=dtype)
    with open_source(tmp_path / "source") as checkpoint:
        assert set(checkpoint.tensors) == {"a.weight", "b.c.weight", "embed.weight"}
        for name, one in made.items():
            info, got = checkpoint.tensors[f"{name}.weight"], checkpoint.read(f"{name}.weight")
            assert got.dtype == info.torch_dtype == getattr(torch, dtype) and got.shape == info.shape
            assert info.nbytes == got.nbytes and not info.is_plain
            expected = one.values.float().to(one.rounded).to(got.dtype)
            assert torch.equal(got, expected), kind
    assert checkpoint.tensors["embed.weight"].is_plain


@pytest.mark.parametrize("kind", KINDS)
def test_what_the_source_was_is_said_and_its_config_does_not_say_it_any_more(tmp_path: Path, kind: str) -> None:
    quantized_sources.write(tmp_path / "source", kind)
    checkpoint = open_source(tmp_path / "source")
    said = checkpoint.stored_as
    assert said is not None and said.what == KINDS[kind].described and said.tensors == 2
    assert said.method == KINDS[kind].entry["quant_method"] and said.entry == KINDS[kind].entry
    assert f"the source is stored in {said.what}: 2 tensors are dequantized to bfloat16 as they are read" in (
        checkpoint.notices
    )
    assert "quantization_config" not in checkpoint.config and checkpoint.config["model_type"] == "tiny"
    raw = open_source(tmp_path / "source", allow_quantized=True)
    assert raw.stored_as is None and "quantization_config" in raw.config
    assert said.bytes == sum(info.nbytes for info in raw.tensors.values())


def test_the_codes_mean_what_the_config_says_so_another_config_is_another_checkpoint(tmp_path: Path) -> None:
    quantized_sources.write(tmp_path / "source", "ct-int8")
    first = open_source(tmp_path / "source").fingerprint
    assert open_source(tmp_path / "source").fingerprint == first
    config = json.loads((tmp_path / "source/config.json").read_text())
    config["quantization_config"]["config_groups"]["group_0"]["weights"]["observer"] = "mse"
    (tmp_path / "source/config.json").write_text(json.dumps(config))
    assert open_source(tmp_path / "source").fingerprint != first


def test_what_is_stored_plain_is_read_plain_whatever_the_config_lists(tmp_path: Path) -> None:
    made = quantized_sources.write(tmp_path / "source", "fp8-blocks", modules_to_not_convert=["a"])
    checkpoint = open_source(tmp_path / "source")
    assert torch.equal(checkpoint.read("a.weight"), made["a"].values.float().bfloat16())
    assert checkpoint.read("embed.weight").dtype == torch.bfloat16


def test_the_stored_parts_of_a_tensor_can_be_copied_byte_for_byte(tmp_path: Path) -> None:
    made = quantized_sources.write(tmp_path / "source", "ct-int4-asymmetric")
    checkpoint = open_source(tmp_path / "source")
    parts = checkpoint.stored_parts("a.weight")
    assert set(parts) == {f"a.{end}" for end in made["a"].tensors}
    for end, tensor in made["a"].tensors.items():
        assert torch.equal(checkpoint.read_info(parts[f"a.{end}"], end), tensor)
    assert list(checkpoint.stored_parts("embed.weight")) == ["embed.weight"]
    save_plain(tmp_path / "copy.safetensors", parts)
    with pytest.raises(FormatError, match=r"stored in codes.*'a.weight'"):
        save_plain(tmp_path / "wrong.safetensors", {"a.weight": checkpoint.tensors["a.weight"]})


def test_tensors_are_compared_by_what_they_are_dequantized_to(tmp_path: Path) -> None:
    made = quantized_sources.write(tmp_path / "one", "ct-int8", ("a", "b"))
    tensors = {f"{name}.{end}": t for name in "ab" for end, t in made["a"].tensors.items()}
    tensors["plain.weight"] = made["a"].values.float().bfloat16()
    tensors["a.weight_scale"] = tensors["a.weight_scale"].clone()
    config = {"model_type": "tiny", "dtype": "bfloat16", "quantization_config": KINDS["ct-int8"].entry}
    save(tmp_path / "two", config, {name: tensor.clone() for name, tensor in tensors.items()})
    checkpoint = open_source(tmp_path / "two")
    checkpoint.prefetch(checkpoint.tensors)
    assert checkpoint.tensors_equal("a.weight", "b.weight") and checkpoint.tensors_equal("a.weight", "plain.weight")
    tensors["b.weight"] = tensors["b.weight"].clone()
    tensors["b.weight"][0, 0] ^= 1
    save(tmp_path / "three", config, {name: tensor.clone() for name, tensor in tensors.items()})
    assert not open_source(tmp_path / "three").tensors_equal("a.weight", "b.weight")


@pytest.mark.parametrize("biased", [True, False])
def test_mxfp4_experts_are_the_transposed_and_are_read_one_at_a_time(tmp_path: Path, biased: bool) -> None:
    """gpt-oss: blocks [experts, rows, groups, 16]; transformers' model holds [experts, cols, rows]."""
    generator, name = torch.Generator().manual_seed(0), "model.layers.0.mlp.experts.gate_up_proj"
    blocks = torch.randint(256, (3, 8, 2, 16), generator=generator, dtype=torch.uint8)
    scales = torch.randint(110, 125, (3, 8, 2), generator=generator, dtype=torch.uint8)
    tensors = {f"{name}_blocks": blocks, f"{name}_scales": scales}
    if biased:
        tensors[f"{name}_bias"] = torch.randn(3, 8)
    save(tmp_path / "source", {"quantization_config": {"quant_method": "mxfp4"}, "dtype": "float32"}, tensors)
    checkpoint = open_source(tmp_path / "source")
    assert checkpoint.stored_as is not None and checkpoint.stored_as.what == "MXFP4"
    assert checkpoint.tensors[name].shape == (3, 64, 8), "left whole: no expert's matrix is a range of its rows"
    whole = checkpoint.read(name)
    for expert in range(3):
        codes = torch.stack((blocks[expert] & 15, blocks[expert] >> 4), dim=-1).reshape(8, 64)
        exponents = 2.0 ** (scales[expert].double() - 127)
        expected = (values_of(codes, e2m1) * spread(exponents, 8, 64, 1, 32)).T.float()
        assert torch.equal(whole[expert], expected) and torch.equal(checkpoint.read_entry(name, expert), expected)


def test_fused_fp8_experts_are_read_one_at_a_time_or_in_parts(tmp_path: Path) -> None:
    made = [KINDS["fp8-blocks"].make(64, 32, torch.Generator().manual_seed(seed)) for seed in range(3)]
    name = "model.layers.0.mlp.experts.gate_up_proj"
    tensors = {
        name: torch.stack([one.tensors["weight"].view(torch.uint8) for one in made]).view(quantized_sources.FP8),
        f"{name}_scale_inv": torch.stack([one.tensors["weight_scale_inv"] for one in made]),
        "plain": torch.randn(3, 4, 5),
    }
    save(tmp_path / "source", {"quantization_config": KINDS["fp8-blocks"].entry, "dtype": "float32"}, tensors)
    checkpoint = open_source(tmp_path / "source")
    assert torch.equal(checkpoint.read(name), torch.stack([one.values.float() for one in made]))
    for expert, one in enumerate(made):
        info = checkpoint.tensors[name].entry(expert)
        assert torch.equal(checkpoint.read_entry(name, expert), one.values.float())
        assert torch.equal(checkpoint.read_info(info.rows(10, 40), name), one.values.float()[10:40])
        assert torch.equal(checkpoint.read_entry("plain", expert), tensors["plain"][expert])
        rows = checkpoint.tensors["plain"].entry(expert).rows(1, 3)
        assert torch.equal(checkpoint.read_info(rows, "plain"), tensors["plain"][expert, 1:3])


def test_fp4_experts_beside_fp8_are_read(tmp_path: Path) -> None:
    """DeepSeek-V4: experts in FP4 with a power of two for 32 values, the other linears in FP8; scales named scale."""
    packed = KINDS["ct-mxfp4"].make(32, 64, torch.Generator().manual_seed(0))
    fp8 = KINDS["fp8-blocks"].make(64, 64, torch.Generator().manual_seed(1))
    tensors = {
        "experts.0.w1.weight": packed.tensors["weight_packed"].view(torch.int8),
        "experts.0.w1.scale": packed.tensors["weight_scale"].view(torch.float8_e8m0fnu),
        "wq.weight": fp8.tensors["weight"],
        "wq.scale": fp8.tensors["weight_scale_inv"],
    }
    entry = {"quant_method": "fp8", "weight_block_size": [32, 32], "expert_dtype": "fp4", "scale_fmt": "ue8m0"}
    save(tmp_path / "source", {"quantization_config": entry, "dtype": "float32"}, tensors)
    checkpoint = open_source(tmp_path / "source")
    assert torch.equal(checkpoint.read("experts.0.w1.weight"), packed.values.float())
    assert torch.equal(checkpoint.read("wq.weight"), fp8.values.float())
    assert checkpoint.stored_as is not None
    assert set(checkpoint.stored_as.what.split(" and ")) == {"MXFP4", "FP8 with 32 x 32 scales"}


def test_schemes_of_several_groups_are_told_apart_by_their_targets(tmp_path: Path) -> None:
    """Kimi-K2: FP8 attention and INT4 experts; two groups of integers fit by their bits."""
    four, eight = (KINDS[kind].make(96, 64, torch.Generator().manual_seed(3)) for kind in ("ct-int4", "ct-int8-packed"))
    fp8 = KINDS["ct-fp8-row"].make(96, 64, torch.Generator().manual_seed(4))
    made = {"x.experts.0.up": four, "x.attn.q": eight, "x.attn.o": fp8}
    tensors = {f"{name}.{end}": tensor for name, one in made.items() for end, tensor in one.tensors.items()}
    weights = {
        kind: KINDS[kind].entry["config_groups"]["group_0"]["weights"]
        for kind in ("ct-int4", "ct-int8-packed", "ct-fp8-row")
    }
    groups = {
        "group_0": {"targets": ["Linear"], "weights": weights["ct-int8-packed"], "format": "pack-quantized"},
        "group_1": {"targets": ["re:.*experts.*"], "weights": weights["ct-int4"], "format": "pack-quantized"},
        "group_2": {"targets": ["x.attn.o"], "weights": weights["ct-fp8-row"], "format": "float-quantized"},
    }
    entry = {"quant_method": "compressed-tensors", "format": "mixed-precision", "config_groups": groups}
    save(tmp_path / "source", {"text_config": {"dtype": "bfloat16", "quantization_config": entry}}, tensors)
    checkpoint = open_source(tmp_path / "source")
    for name, one in made.items():
        assert torch.equal(checkpoint.read(f"{name}.weight"), one.values.float().bfloat16()), name
    assert checkpoint.config == {"text_config": {"dtype": "bfloat16"}}, "sections say it too"


@pytest.mark.parametrize("in_order", [True, False])
def test_columns_that_were_sorted_have_the_scale_of_their_group(tmp_path: Path, in_order: bool) -> None:
    """weight_g_idx of compressed-tensors before 0.20: the group of each column; -1 where they follow one another."""
    generator = torch.Generator().manual_seed(0)
    made = KINDS["ct-int4-asymmetric"].make(96, 64, generator)
    groups = torch.full((64,), -1) if in_order else (torch.arange(64) // 32)[torch.randperm(64, generator=generator)]
    tensors = {f"a.{end}": tensor for end, tensor in made.tensors.items()} | {"a.weight_g_idx": groups.int()}
    save(tmp_path / "source", {"quantization_config": KINDS["ct-int4-asymmetric"].entry, "dtype": "float32"}, tensors)
    got = open_source(tmp_path / "source").read("a.weight")
    if in_order:
        assert torch.equal(got, made.values.float().bfloat16().float())
        return
    codes = made.tensors["weight_packed"].view(torch.uint8)
    codes = torch.stack((codes & 15, codes >> 4), dim=-1).flatten(1).double()
    zero = made.tensors["weight_zero_point"].T.contiguous().view(torch.uint8)
    zero = torch.stack((zero & 15, zero >> 4), dim=-1).flatten(1).T.double()[:96]
    expected = (codes - zero[:, groups]) * made.tensors["weight_scale"].double()[:, groups]
    assert torch.equal(got, expected.float().bfloat16().float())


def test_modelopt_says_it_in_a_file_of_its_own(tmp_path: Path) -> None:
    made = quantized_sources.write(tmp_path / "source", "modelopt-nvfp4")
    config = json.loads((tmp_path / "source/config.json").read_text())
    del config["quantization_config"]
    (tmp_path / "source/config.json").write_text(json.dumps(config))
    said = {"producer": {"name": "modelopt"}, "quantization": {"quant_algo": "NVFP4", "kv_cache_quant_algo": "FP8"}}
    (tmp_path / "source" / MODELOPT).write_text(json.dumps(said))
    checkpoint = open_source(tmp_path / "source")
    assert torch.equal(checkpoint.read("a.weight"), made["a"].values.float().bfloat16())
    assert MODELOPT not in checkpoint.side_files(), "the result is not what it says"


def test_scales_of_activations_and_of_the_cache_are_left_out_aloud(tmp_path: Path) -> None:
    quantized_sources.write(tmp_path / "source", "modelopt-fp8")
    checkpoint = open_source(tmp_path / "source")
    assert any("'a.input_scale' and 1 more: scales of activations" in notice for notice in checkpoint.notices)
    cache = {"quant_method": "compressed-tensors", "config_groups": {}, "kv_cache_scheme": {"num_bits": 8}}
    tensors = {"x.self_attn.k_proj.weight": torch.randn(8, 8), "x.self_attn.k_scale": torch.ones(1)}
    save(tmp_path / "cache", {"quantization_config": cache}, tensors)
    plain = open_source(tmp_path / "cache")
    assert set(plain.tensors) == {"x.self_attn.k_proj.weight"} and "quantization_config" not in plain.config


def test_parts_may_lie_in_different_files(tmp_path: Path) -> None:
    made = quantized_sources.write(tmp_path / "source", "fp8-blocks", ("a",))
    parts = made["a"].tensors
    (tmp_path / "source/model.safetensors").unlink()
    for number, (end, tensor) in enumerate(parts.items(), 1):
        save_file({f"a.{end}": tensor}, tmp_path / f"source/model-0000{number}-of-00002.safetensors")
    assert torch.equal(open_source(tmp_path / "source").read("a.weight"), made["a"].values.float().bfloat16())


def test_reading_costs_the_tensor_and_little_more(tmp_path: Path) -> None:
    rows, cols = 8192, 4096  # 64 MiB in bfloat16, 32 MiB of codes
    codes = torch.zeros(rows, cols, dtype=torch.uint8).view(quantized_sources.FP8)
    tensors = {"a.weight": codes, "a.weight_scale_inv": torch.ones(rows // 128, cols // 128)}
    entry = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    save(tmp_path / "source", {"quantization_config": entry}, tensors)
    del codes, tensors
    quantized_sources.write(tmp_path / "small", "fp8-blocks", ("a",))
    open_source(tmp_path / "small").read("a.weight")
    checkpoint = open_source(tmp_path / "source")
    ballast = torch.ones(1 << 26, dtype=torch.uint8)  # so that the peak so far hides nothing
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    got = checkpoint.read("a.weight")
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) >> 10
    assert got.nbytes >> 20 == 64 and grown < 64 + 32 + 80, f"{grown} MiB"
    assert ballast.numel()
    shutil.rmtree(tmp_path / "source")


@pytest.mark.parametrize("kind", ["ct-int3", "ct-int3-holes"])
def test_a_matrix_too_narrow_to_tell_is_packed_as_the_others(tmp_path: Path, kind: str) -> None:
    """48 columns of 3 bits are five words with and without holes; 192 are 18 and 20."""
    generator = torch.Generator().manual_seed(5)
    shapes = {"narrow": (20, 48), "wide": (20, 192)}
    made = {name: KINDS[kind].make(*shape, generator) for name, shape in shapes.items()}
    tensors = {f"{name}.{end}": tensor for name, one in made.items() for end, tensor in one.tensors.items()}
    assert tensors["narrow.weight_packed"].shape[1] == 5
    config = {"model_type": "tiny", "dtype": "float32", "quantization_config": KINDS[kind].entry}
    save(tmp_path / "source", config, tensors)
    with open_source(tmp_path / "source") as checkpoint:
        for name, one in made.items():
            assert torch.equal(checkpoint.read(f"{name}.weight"), one.values.float()), name


def test_zero_points_in_the_other_packing_are_refused(tmp_path: Path) -> None:
    """192 rows of 3 bits are 18 words without holes and 20 with them."""
    generator = torch.Generator().manual_seed(6)
    with_holes, without = (KINDS[kind].make(192, 192, generator) for kind in ("ct-int3-holes", "ct-int3"))
    tensors = with_holes.tensors | {"weight_zero_point": without.tensors["weight_zero_point"]}
    config = {"model_type": "tiny", "dtype": "float32", "quantization_config": KINDS["ct-int3"].entry}
    save(tmp_path / "source", config, {f"a.{end}": tensor for end, tensor in tensors.items()})
    with pytest.raises(CheckpointError, match="the zero point"):
        open_source(tmp_path / "source")
