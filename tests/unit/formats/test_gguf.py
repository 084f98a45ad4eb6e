"""The container of block bytes: every type there and back, and the weights of llama.cpp's own Python reader."""

from pathlib import Path
from typing import Any

import gguf as reader
import numpy as np
import pytest
import tiny_models
import torch
from math_problems import hessian, weight

import leangrid
from leangrid.block_types import BLOCK_TYPES
from leangrid.errors import CheckpointError, FormatError
from leangrid.formats import FORMATS, format_of
from leangrid.grids import Precision, fit_minmax
from leangrid.recipe import Recipe
from leangrid.report.records import read_records
from leangrid.schemes import Scheme
from leangrid.solve.factor import factorize
from leangrid.solve.layer import LinearResult, solve_linear

gguf = FORMATS["gguf"]


def solved(scheme: str, cols: int) -> LinearResult:
    matrix = hessian(cols)
    return solve_linear(
        weight(6, cols), factorize(matrix), matrix, Recipe(scheme=scheme).resolved(), Precision(torch.bfloat16)
    )


def _as_llama_cpp_reads(file: Path) -> dict[str, tuple[str, Any]]:
    """Type and weights of every tensor, by llama.cpp's own reader."""
    tensors = reader.GGUFReader(file).tensors
    return {t.name: (t.tensor_type.name, reader.dequantize(t.data, t.tensor_type)) for t in tensors}


@pytest.mark.parametrize("cols", [512, 96])
@pytest.mark.parametrize("name", sorted(BLOCK_TYPES))
def test_the_reader_arrives_at_our_weights_bit_for_bit(name: str, cols: int) -> None:
    scheme, result = Scheme.parse(name), solved(name, cols)
    tensors = gguf.pack(result.codes, result.grid, torch.bfloat16, scheme)
    kind = BLOCK_TYPES[name].fitting(cols)
    assert {key: (t.dtype, tuple(t.shape)) for key, t in tensors.items()} == gguf.layout(
        scheme, (6, cols), torch.bfloat16
    )
    theirs = reader.dequantize(tensors["weight"].numpy(), reader.GGMLQuantizationType[kind.name])
    ours = result.grid.dequantize(result.codes)
    assert np.array_equal(theirs, ours.numpy())
    codes, grid = gguf.unpack(tensors, scheme, (6, cols))
    assert torch.equal(codes, result.codes)
    assert torch.equal(grid.dequantize(codes), ours)
    assert torch.equal(gguf.dense(tensors, scheme, (6, cols)), ours)


@pytest.mark.parametrize("name", sorted(BLOCK_TYPES))
def test_a_reader_that_expects_weights_meets_another_shape(name: str) -> None:
    """Whatever the columns: so transformers without leangrid stops, and never takes bytes for weights."""
    cols = 512
    dtype, (rows, width) = gguf.layout(Scheme.parse(name), (6, cols), torch.float32)["weight"]
    assert dtype == torch.uint8 and rows == 6 and width != cols


def test_what_the_blocks_cannot_hold_is_refused() -> None:
    scheme = Scheme.parse("Q4_0")
    assert "Q4_K" in str(gguf.refuse(Scheme.parse("W4A16_G32"), "a.b", 4, 64))
    assert "do not divide its 40 columns" in str(gguf.refuse(scheme, "a.b", 4, 40))
    assert "Conv1D" in str(gguf.refuse(scheme, "a.b", 4, 64, "conv1d"))
    assert gguf.refuse(scheme, "a.b", 4, 64) is None
    w = weight(2, 64)
    with pytest.raises(FormatError, match="Q4_0 does not hold"):  # zero points that are not in the middle
        found = fit_minmax(w.abs(), 4, 32, scale_dtype=torch.float16)
        gguf.pack(found.nearest(w), found, torch.float32, scheme)
    with pytest.raises(FormatError, match="groups of 32"):
        found = fit_minmax(w, 4, 64, True, torch.float16)
        gguf.pack(found.nearest(w), found, torch.float32, scheme)


@pytest.mark.parametrize("name", ["Q4_1", "Q4_K"])
def test_damaged_bytes_are_named(name: str) -> None:
    scheme, result = Scheme.parse(name), solved(name, 512)
    tensors = gguf.pack(result.codes, result.grid, torch.float32, scheme)
    for value, where in ((0x7C00, 0), (0, 0), (0x7E00, 2)):
        damaged = tensors["weight"].clone()
        damaged[3, where : where + 2] = torch.tensor([value & 255, value >> 8], dtype=torch.uint8)
        with pytest.raises(CheckpointError, match=r"a\.b\.weight"):
            gguf.check({"weight": damaged}, scheme, (6, 512), "a.b")
    with pytest.raises(CheckpointError, match=r"a\.b\.weight"):
        gguf.check({"weight": tensors["weight"][:, 1:]}, scheme, (6, 512), "a.b")


def test_the_config_names_the_type_and_the_layers() -> None:
    config = gguf.config({"a.b": Scheme.parse("Q4_K")}, [])
    assert format_of(config) is FORMATS["gguf"]
    assert gguf.scheme_of(config) == Scheme.parse("Q4_K")
    assert gguf.covers(config, "a.b") and not gguf.covers(config, "a.c")
    for change in ({"type": "Q4_9"}, {"version": 2}, {"layers": []}):
        with pytest.raises(FormatError):
            gguf.scheme_of(config | change)


def test_a_whole_model_keeps_its_types_from_the_plan_to_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """hidden 64 takes the narrow type, the down projections of 256 columns the one asked for; llama.cpp's reader finds
    our weights."""
    monkeypatch.setitem(tiny_models.CONFIGS, "llama2", lambda: tiny_models._llama(intermediate_size=256))
    tiny_models.save("llama2", tmp_path / "source", torch.bfloat16)
    recipe, told = leangrid.Recipe(scheme="Q4_K"), []
    windows = tiny_models.tokens(4, 32)
    leangrid.quantize(
        tmp_path / "source", tmp_path / "out", recipe, windows=windows, progress=lambda e: told.append(e.message)
    )
    assert "Q4_K: 12 layers of 64 columns take Q4_1, 256 does not divide them" in told
    records = {record.name: record for record in read_records(tmp_path / "out" / "records.jsonl")}
    assert {r.scheme for name, r in records.items() if name.endswith("down_proj")} == {"Q4_K"}
    assert {r.scheme for name, r in records.items() if not name.endswith("down_proj")} == {"Q4_1"}
    assert all(record.loss < record.loss_minmax for record in records.values())
    for target in ("mlx", "gptq", "compressed-tensors"):
        with pytest.raises(FormatError, match=r"does not hold llama\.cpp's Q4_K"):
            leangrid.export(tmp_path / "out", tmp_path / "no", to=target)
    with pytest.raises(FormatError, match=r"block type of llama\.cpp"):
        leangrid.quantize(
            tmp_path / "source",
            tmp_path / "no",
            leangrid.Recipe(scheme="Q4_0", format="compressed-tensors"),
            windows=windows,
        )
    assert not (tmp_path / "no").exists()
    model, _ = leangrid.load(tmp_path / "out", dtype=torch.float32)
    ours = {name: p.detach() for name, p in model.named_parameters()}
    leangrid.export(tmp_path / "out", tmp_path / "file", to="gguf")
    theirs = _as_llama_cpp_reads(tmp_path / "file/model.gguf")
    for block in range(2):
        for there, here, kind in (
            ("ffn_down", "mlp.down_proj", "Q4_K"),
            ("ffn_up", "mlp.up_proj", "Q4_1"),
            ("attn_v", "self_attn.v_proj", "Q4_1"),
        ):
            found = theirs[f"blk.{block}.{there}.weight"]
            assert found[0] == kind
            assert np.array_equal(found[1], ours[f"model.layers.{block}.{here}.weight"].numpy())


def test_of_several_types_the_config_lists_the_layers_of_each_other_one() -> None:
    schemes = {"a.b": Scheme.parse("Q4_K"), "a.c": Scheme.parse("Q6_K"), "a.d": Scheme.parse("Q4_K")}
    config = gguf.config(schemes, [])
    assert (config["version"], config["type"], config["types"]) == (2, "Q4_K", {"Q6_K": ["a.c"]})
    assert gguf.schemes(config, schemes) == schemes
    for change in ({"version": 1}, {"types": {"Q4_9": ["a.c"]}}, {"types": {"Q6_K": "a.c"}}, {"types": []}):
        with pytest.raises(FormatError):
            gguf.schemes(config | change, schemes)


def test_a_budget_of_block_types_is_in_the_file_tensor_by_tensor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(tiny_models.CONFIGS, "llama2", lambda: tiny_models._llama(intermediate_size=256))
    tiny_models.save("llama2", tmp_path / "source", torch.bfloat16)
    recipe = leangrid.Recipe(scheme="Q4_K", bits=5.0)
    result = leangrid.quantize(tmp_path / "source", tmp_path / "out", recipe, windows=tiny_models.tokens(4, 32))
    assert result.bits_per_weight <= 5.0 and len(result.budget["widths"]) > 1
    records = {record.name: record for record in read_records(tmp_path / "out" / "records.jsonl")}
    model, _ = leangrid.load(tmp_path / "out", dtype=torch.float32)
    ours = {name: p.detach() for name, p in model.named_parameters()}
    leangrid.export(tmp_path / "out", tmp_path / "file", to="gguf")
    theirs = _as_llama_cpp_reads(tmp_path / "file/model.gguf")
    for block in range(2):
        for there, here in (("ffn_down", "mlp.down_proj"), ("ffn_up", "mlp.up_proj"), ("attn_v", "self_attn.v_proj")):
            kind, found = theirs[f"blk.{block}.{there}.weight"]
            name = f"model.layers.{block}.{here}"
            assert kind == records[name].scheme, name
            assert np.array_equal(found, ours[f"{name}.weight"].numpy())
