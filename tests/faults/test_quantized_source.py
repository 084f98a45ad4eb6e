"""Quantized sources that are damaged, or in a layout that leangrid does not read, are refused before any work: what,
where, and what is read."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import quantized_sources
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from quantized_sources import FP8
from safetensors.torch import load_file, save_file

from leangrid.errors import CheckpointError
from leangrid.storage import files
from leangrid.storage.manifest import MANIFEST, seal
from leangrid.storage.source import Checkpoint, open_source

pytestmark = pytest.mark.fault("S11")
Tensors = dict[str, torch.Tensor]


def refused(directory: Path, *words: str) -> str:
    """The one sentence with which a directory is refused; each word must be in it."""
    with pytest.raises(CheckpointError) as caught:
        open_source(directory)
    message = str(caught.value)
    assert caught.value.exit_code == 2 and "\n" not in message
    for word in words:
        assert word in message, message
    return message


def unreadable(checkpoint: Checkpoint, name: str) -> str:
    """The message with which reading one tensor ends."""
    with pytest.raises(CheckpointError) as caught:
        checkpoint.read(name)
    return str(caught.value)


def changed(directory: Path, kind: str, edit: Callable[[Tensors], object], **entry: Any) -> Path:
    """A source of one kind after ``edit`` of its tensors and of fields of its quantization entry."""
    quantized_sources.write(directory, kind, **entry)
    tensors = load_file(directory / "model.safetensors")
    edit(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, directory / "model.safetensors")
    return directory


@pytest.mark.parametrize(
    ("kind", "gone", "dtype"),
    [
        ("fp8-blocks", "weight_scale_inv", "F8_E4M3"),
        ("fbgemm", "weight_scale", "F8_E4M3"),
        ("ct-fp8-row", "weight_scale", "F8_E4M3"),
        ("ct-int8", "weight_scale", "I8"),
        ("ct-int4", "weight_scale", "I32"),
        ("ct-int4", "weight_shape", "I32"),
        ("ct-nvfp4", "weight_scale", "U8"),
        ("modelopt-fp8", "weight_scale", "F8_E4M3"),
        ("modelopt-nvfp4", "weight_scale", "U8"),
        ("modelopt-nvfp4", "weight_scale_2", "U8"),
    ],
)
def test_codes_without_their_scale(tmp_path: Path, kind: str, gone: str, dtype: str) -> None:
    source = changed(tmp_path / "source", kind, lambda tensors: tensors.pop(f"b.c.{gone}"))
    refused(source, f"'b.c.{gone}' is missing", f"stored in {dtype}", "model.safetensors", "Download")


def test_mxfp4_blocks_without_their_scales_or_of_another_shape(tmp_path: Path) -> None:
    entry = {"quantization_config": {"quant_method": "mxfp4"}}
    blocks = torch.zeros(2, 8, 2, 16, dtype=torch.uint8)
    quantized_sources.save(tmp_path / "one", entry, {"x.experts.down_proj_blocks": blocks})
    refused(tmp_path / "one", "'x.experts.down_proj_scales' is missing", "U8")
    wrong = {"x.experts.down_proj_blocks": blocks, "x.experts.down_proj_scales": blocks[:, :4, :, 0].contiguous()}
    quantized_sources.save(tmp_path / "two", entry, wrong)
    refused(tmp_path / "two", "[2, 4, 2]", "[8, 64]", "1 x 32")
    wrong = {"x.experts.down_proj_blocks": blocks[..., :8].contiguous(), "x.experts.down_proj_scales": blocks[..., 0]}
    quantized_sources.save(tmp_path / "three", entry, {name: tensor.contiguous() for name, tensor in wrong.items()})
    refused(tmp_path / "three", "[2, 8, 2, 8]", "16 bytes")


@pytest.mark.parametrize(
    ("kind", "shape", "words"),
    [
        ("fp8-blocks", (3, 3), ["[3, 3]", "[96, 64]", "32 x 32"]),
        ("fp8-blocks", (2, 3), ["[2, 3]"]),  # transposed
        ("fp8-blocks", (96, 1), ["[96, 1]"]),
        ("fp8-blocks", (3, 2, 1), ["[3, 2, 1]"]),
        ("fp8-blocks", (0, 2), ["[0, 2]"]),
        ("fp8-tensor", (7, 3), ["[7, 3]"]),
        ("fbgemm", (64,), ["[64]"]),
        ("ct-fp8-row", (64, 1), ["[64, 1]", "1 x 64"]),
        ("ct-fp8-tensor", (96, 1), ["[96, 1]", "96 x 64"]),
        ("ct-int8", (96, 2), ["[96, 2]"]),
        ("ct-int4", (96, 4), ["words a row", "128 integers of 4 bits"]),
        ("ct-int4", (95, 2), ["[95, 2]"]),
        ("ct-nvfp4", (96, 2), ["[96, 2]", "1 x 16"]),
        ("ct-mxfp4", (96, 1), ["[96, 1]", "1 x 32"]),
        ("modelopt-fp8-row", (48,), ["[48]"]),
        ("modelopt-nvfp4", (96, 2), ["[96, 2]", "1 x 16"]),
    ],
)
def test_scales_whose_shape_does_not_fit(tmp_path: Path, kind: str, shape: tuple[int, ...], words: list[str]) -> None:
    def reshape(tensors: Tensors) -> None:
        name = next(name for name in tensors if name.startswith("a.weight_scale") and not name.endswith("_2"))
        tensors[name] = torch.zeros(shape).to(tensors[name].dtype)

    refused(changed(tmp_path / "source", kind, reshape), "'a.weight_scale", *words)


@pytest.mark.parametrize("kind", ["fp8-blocks", "ct-fp8-row", "ct-int8"])
def test_scales_that_are_no_floats(tmp_path: Path, kind: str) -> None:
    def integers(tensors: Tensors) -> None:
        name = next(name for name in tensors if name.startswith("a.weight_scale"))
        tensors[name] = tensors[name].to(torch.int32)

    refused(changed(tmp_path / "source", kind, integers), "'a.weight_scale", "stored in I32")


def test_zero_points_that_are_missing_not_expected_or_do_not_fit(tmp_path: Path) -> None:
    def added(tensors: Tensors) -> None:
        tensors["a.weight_zero_point"] = torch.zeros(96, 1, dtype=torch.int8)

    for kind in ("ct-int8", "ct-fp8-row"):
        refused(changed(tmp_path / kind, kind, added), "'a.weight_zero_point' is a zero point", "is symmetric")
    without = changed(tmp_path / "without", "ct-int8-asymmetric", lambda tensors: tensors.pop("a.weight_zero_point"))
    refused(without, "'a.weight' has no zero point", "not symmetric")

    def cut(tensors: Tensors) -> None:
        tensors["a.weight_zero_point"] = tensors["a.weight_zero_point"][:5]

    refused(changed(tmp_path / "cut", "ct-int4-asymmetric", cut), "'a.weight_zero_point' holds I32 [5, 2]", "[96, 2]")


@pytest.mark.parametrize("kind", ["fp8-blocks", "ct-int8", "ct-int4", "ct-nvfp4", "modelopt-nvfp4", "ct-mxfp8"])
def test_nan_scales_are_found_when_they_are_read(tmp_path: Path, kind: str) -> None:
    def spoil(tensors: Tensors) -> None:
        name = next(name for name in tensors if name.startswith("a.weight_scale") and not name.endswith("_2"))
        scale = tensors[name]
        if scale.dtype in (torch.uint8, FP8):
            scale.view(torch.uint8)[3, 0] = 255 if scale.dtype == torch.uint8 else 0x7F
        else:
            scale[2 if kind == "fp8-blocks" else 3, 0] = torch.nan

    with open_source(changed(tmp_path / "source", kind, spoil)) as checkpoint:
        checkpoint.read("b.c.weight")
        with pytest.raises(CheckpointError, match=r"'a.weight_scale(_inv)?' holds 1 NaN and 0 infinite"):
            checkpoint.read("a.weight")


def test_nan_codes_and_products_too_large_for_the_dtype_are_found_when_they_are_read(tmp_path: Path) -> None:
    def spoil(tensors: Tensors) -> None:
        tensors["a.weight"].view(torch.uint8)[5, 6] = 0xFF

    with open_source(changed(tmp_path / "codes", "fp8-blocks", spoil)) as checkpoint:
        message = unreadable(checkpoint, "a.weight")
        assert "'a.weight' holds 1 NaN and 0 infinite of 6144 values" in message

    def enlarge(tensors: Tensors) -> None:
        tensors["a.weight_scale"] = torch.full((96, 1), 1e38)
        tensors["a.weight"] = torch.full((96, 64), 448.0).to(FP8)

    with open_source(changed(tmp_path / "large", "fbgemm", enlarge)) as checkpoint:
        assert "'a.weight' holds 0 NaN and 6144 infinite" in unreadable(checkpoint, "a.weight")


def test_a_second_scale_that_is_zero_or_no_number(tmp_path: Path) -> None:
    zero = changed(tmp_path / "zero", "ct-nvfp4", lambda tensors: tensors["a.weight_global_scale"].zero_())
    with open_source(zero) as checkpoint, pytest.raises(CheckpointError, match=r"'a.weight_global_scale' is zero"):
        checkpoint.read("a.weight")

    def several(tensors: Tensors) -> None:
        tensors["a.weight_scale_2"] = torch.ones(96)

    refused(changed(tmp_path / "several", "modelopt-nvfp4", several), "'a.weight_scale_2'", "[96], not one number")


def test_a_shape_beside_packed_integers_that_is_not_theirs(tmp_path: Path) -> None:
    def turned(tensors: Tensors) -> None:
        tensors["a.weight_shape"] = torch.tensor([64, 96])

    with open_source(changed(tmp_path / "group", "ct-int4", turned)) as checkpoint:
        message = unreadable(checkpoint, "a.weight")
        assert "'a.weight_shape' says" in message and "[64, 96]" in message and "[96, 64]" in message
    refused(changed(tmp_path / "row", "ct-int4-row", turned), "'a.weight_shape' says 64 rows, not 24")

    def short(tensors: Tensors) -> None:
        tensors["a.weight_shape"] = torch.tensor([24, 40])

    refused(changed(tmp_path / "short", "ct-int4-row", short), "8 words a row", "40 integers of 4 bits")


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        ({"quant_method": "gptq", "bits": 4}, ["gptq"]),
        ({"quant_method": "awq"}, ["awq"]),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, ["bitsandbytes"]),
        *(({"quant_method": method}, [method]) for method in ("quark", "hqq", "torchao", "eetq", "aqlm", "bitnet")),
        ({"quant_method": ["fp8"]}, ["['fp8']"]),
        ({"bits": 4}, ["unnamed"]),
        ("fp8", ["unnamed"]),
        (quantized_sources.KINDS["ct-int8"].entry | {"format": "marlin-24"}, ["format 'marlin-24'"]),
        (
            quantized_sources.KINDS["ct-int8"].entry | {"sparsity_config": {"format": "sparse-24-bitmask"}},
            ["sparsity 'sparse-24-bitmask'"],
        ),
        (
            quantized_sources.KINDS["ct-int8"].entry | {"transform_config": {"config_groups": {"u": {}}}},
            ["transform_config"],
        ),
        ({"quant_method": "modelopt", "quant_algo": "W4A16_AWQ"}, ["quant_algo 'W4A16_AWQ'"]),
    ],
)
def test_unknown_layouts_are_refused_with_what_is_known(tmp_path: Path, entry: Any, words: list[str]) -> None:
    quantized_sources.write(tmp_path / "source", "ct-int8")
    config = json.loads((tmp_path / "source/config.json").read_text()) | {"quantization_config": entry}
    (tmp_path / "source/config.json").write_text(json.dumps(config))
    refused(tmp_path / "source", "already quantized", "FP8", "MXFP4", "compressed-tensors", "modelopt", *words)


@pytest.mark.parametrize(
    ("weights", "words"),
    [
        ({"strategy": "token"}, ["'token'"]),
        ({"num_bits": 9}, ["9 bits"]),
        ({"num_bits": "x"}, ["config_groups cannot be used"]),
        ({"strategy": "group", "group_size": 0}, ["group_size 0"]),
        ({"strategy": "block", "block_structure": [0, 8]}, ["[0, 8]"]),
        ({"type": "float", "num_bits": 4}, ["'a.weight' is stored in I8", "says nothing"]),
    ],
)
def test_schemes_that_no_weights_have(tmp_path: Path, weights: dict[str, Any], words: list[str]) -> None:
    quantized_sources.write(tmp_path / "source", "ct-int8")
    path = tmp_path / "source/config.json"
    config = json.loads(path.read_text())
    config["quantization_config"]["config_groups"]["group_0"]["weights"] |= weights
    path.write_text(json.dumps(config))
    refused(tmp_path / "source", *words)


def test_groups_of_columns_that_do_not_exist(tmp_path: Path) -> None:
    def sorted_into(groups: torch.Tensor) -> Callable[[Tensors], object]:
        return lambda tensors: tensors.update({"a.weight_g_idx": groups})

    short = changed(tmp_path / "short", "ct-int4", sorted_into(torch.zeros(60, dtype=torch.int32)))
    refused(short, "'a.weight_g_idx' holds I32 [60]", "64 columns")
    beyond = changed(tmp_path / "beyond", "ct-int4", sorted_into(torch.arange(64, dtype=torch.int32)))
    with open_source(beyond) as checkpoint:
        assert "'a.weight_g_idx' names groups from 0 to 63 of 2" in unreadable(checkpoint, "a.weight")


def test_inputs_that_are_changed(tmp_path: Path) -> None:
    def smoothed(tensors: Tensors) -> None:
        tensors["a.pre_quant_scale"] = torch.ones(64)

    refused(changed(tmp_path / "source", "modelopt-nvfp4", smoothed), "'a.pre_quant_scale'")


def test_a_weight_that_is_stored_plain_and_as_codes(tmp_path: Path) -> None:
    def twice(tensors: Tensors) -> None:
        tensors["a.weight"] = torch.zeros(96, 64)

    refused(changed(tmp_path / "source", "ct-int4", twice), "'a.weight' is stored twice")


def test_codes_that_are_no_matrix(tmp_path: Path) -> None:
    def flat(tensors: Tensors) -> None:
        tensors["a.weight"] = tensors["a.weight"].flatten()

    refused(changed(tmp_path / "source", "fp8-blocks", flat), "'a.weight'", "[6144]", "no matrix")


def test_plain_weights_under_a_config_that_calls_them_quantized(tmp_path: Path) -> None:
    entry = quantized_sources.KINDS["fp8-blocks"].entry
    quantized_sources.save(tmp_path / "source", {"quantization_config": entry}, {"a.weight": torch.zeros(8, 8)})
    refused(tmp_path / "source", "plain F32", "remove quantization_config", "fp8")


def test_a_scale_beside_a_plain_weight(tmp_path: Path) -> None:
    def dequantized(tensors: Tensors) -> None:
        tensors["a.weight"] = torch.zeros(96, 64, dtype=torch.bfloat16)

    source = changed(tmp_path / "source", "fp8-blocks", dequantized)
    refused(source, "'a.weight_scale_inv' is the scale of no codes", "'a.weight' is stored in plain BF16", "Download")


@pytest.mark.parametrize("size", [[0, 0], "128x128", [128], 128, [32, "32"]])
def test_blocks_of_no_size(tmp_path: Path, size: Any) -> None:
    source = changed(tmp_path / "source", "fp8-blocks", lambda tensors: tensors, weight_block_size=size)
    refused(source, "weight_block_size is", "config.json", "rows and columns")


def test_infinite_scales_are_found_when_they_are_read(tmp_path: Path) -> None:
    source = changed(tmp_path / "source", "fp8-blocks", lambda tensors: tensors["a.weight_scale_inv"].fill_(torch.inf))
    with open_source(source) as checkpoint:
        assert "'a.weight_scale_inv' holds 0 NaN and 6 infinite" in unreadable(checkpoint, "a.weight")


def test_a_result_of_leangrid_is_no_source(tmp_path: Path) -> None:
    quantized_sources.write(tmp_path / "source", "ct-int4")
    (tmp_path / "source" / MANIFEST).write_bytes(files.json_bytes(seal({"files": {}})))
    refused(tmp_path / "source", "a result of leangrid", "already quantized", "it was made of")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 200) | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
FIELDS = st.dictionaries(
    st.sampled_from(
        (
            "format",
            "config_groups",
            "sparsity_config",
            "transform_config",
            "weight_block_size",
            "quantization",
            "quant_algo",
            "quantized_layers",
        )
    ),
    JSON,
    max_size=4,
)
SCHEME = st.dictionaries(
    st.sampled_from(("num_bits", "type", "strategy", "group_size", "block_structure", "symmetric")), JSON, max_size=4
)


@given(kind=st.sampled_from(sorted(quantized_sources.KINDS)), fields=FIELDS, scheme=SCHEME, targets=JSON)
@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_whatever_the_entry_says_the_source_is_read_or_refused(
    in_memory: Path, kind: str, fields: dict[str, Any], scheme: dict[str, Any], targets: Any
) -> None:
    directory = in_memory / kind
    if not directory.exists():
        quantized_sources.write(directory, kind, ("a",))
    path = directory / "config.json"
    config = json.loads(path.read_text())
    entry = dict(quantized_sources.KINDS[kind].entry)
    if "config_groups" in entry:
        weights = entry["config_groups"]["group_0"]["weights"] | scheme
        entry["config_groups"] = {"group_0": {"targets": targets, "weights": weights}}
    path.write_text(json.dumps(config | {"quantization_config": entry | fields}))
    try:
        with open_source(directory) as checkpoint:
            checkpoint.read("a.weight")
    except CheckpointError as error:
        assert "\n" not in str(error) and error.exit_code == 2
