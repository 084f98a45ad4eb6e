"""Mixtures of experts: a checkpoint in, every expert's linears quantized under their own names, opened by leangrid."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from walks import enter, walk_through

import leangrid
from leangrid.errors import CheckpointError
from leangrid.models.skeleton import Skeleton
from leangrid.models.streams import Streams
from leangrid.planning.structure import describe_fused
from leangrid.recipe import Recipe
from leangrid.report.records import read_records
from leangrid.report.text import quantize_summary
from leangrid.run.quantize import quantize
from leangrid.storage.manifest import list_differences
from leangrid.storage.safetensors import read_tensor_infos
from leangrid.storage.source import open_source

WINDOWS = tiny_models.tokens(6, 48)


def _logits(model: torch.nn.Module, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(ids).logits


@pytest.mark.parametrize(
    ("name", "scheme"),
    [*((n, "NU4") for n in tiny_models.MIXTURES), ("qwen3_moe", "W4A16_G32"), ("mixtral", "W4A16_G32")],
)
def test_every_expert_is_quantized_under_the_names_of_its_checkpoint(name: str, scheme: str, tmp_path: Path) -> None:
    source = tiny_models.save(name, tmp_path / "source")
    result = quantize(source, tmp_path / "out", Recipe(scheme=scheme), windows=WINDOWS)
    assert result.exit_code == 0 and 0 < result.loss < result.loss_rounding
    assert list_differences(tmp_path / "out") == []
    skeleton = Skeleton(open_source(source))
    linears = skeleton.all_linear_names()
    assert result.layers == len(linears)
    before, after = (read_tensor_infos(folder / "model.safetensors") for folder in (source, tmp_path / "out"))
    assert {n.rpartition(".")[0] for n in before} == {n.rpartition(".")[0] for n in after}
    assert {f"{n}.weight" for n in linears} <= set(before)
    same = {n for n, info in before.items() if n in after and after[n].dtype == info.dtype}
    assert not [n for n in same if ".experts." in n], "an expert stayed as it was"
    assert {n for n in before if ".gate." in n or "expert_gate" in n} <= same, "a router was quantized"
    if (
        scheme == "W4A16_G32"
    ):  # engines take every linear that is not named here to be quantized, and a router is one to them
        ignored = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]["ignore"]
        assert {n.removesuffix(".weight") for n in before if n.endswith(".gate.weight")} <= set(ignored)
    packed, _ = leangrid.load(tmp_path / "out")
    dense = tiny_models.build(name)
    _put(dense, {path: packed.get_submodule(path).weight_hat for path in map(skeleton.path, linears)})
    ids = WINDOWS[:2]
    torch.testing.assert_close(_logits(packed, ids), _logits(dense, ids), rtol=1e-4, atol=1e-4)
    if scheme == "NU4":  # transformers reads our own format through leangrid; compressed-tensors with its own code
        torch.testing.assert_close(
            _logits(AutoModelForCausalLM.from_pretrained(tmp_path / "out"), ids), _logits(packed, ids)
        )
    assert (_logits(packed, ids) - _logits(tiny_models.build(name), ids)).abs().max() > 1e-3


def _put(model: torch.nn.Module, weights: dict[str, Any]) -> None:
    """Write each linear into transformers' plain model, an expert's into its part of the fused tensors."""
    for name, weight in weights.items():
        path, _, leaf = name.rpartition(".")
        owner, _, expert = path.rpartition(".")
        if not expert.isdigit():
            model.get_parameter(f"{name}.weight").data.copy_(weight)
            continue
        fused: Any = model.get_submodule(owner)
        half = fused.gate_up_proj.shape[1] // 2
        target = fused.down_proj if leaf == "down_proj" else fused.gate_up_proj
        rows = {"gate_proj": slice(half), "up_proj": slice(half, None)}.get(leaf, slice(None))
        target.data[int(expert), rows] = weight


@pytest.mark.fault("N2")
def test_experts_that_the_router_never_or_hardly_chooses(tmp_path: Path) -> None:
    source = tiny_models.save("deepseek_v3", tmp_path / "source")
    tensors = load_file(source / "model.safetensors")
    tensors["model.layers.1.mlp.gate.e_score_correction_bias"] = torch.tensor([0.0, 0.0, -50.0, -50.0])
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    result = quantize(source, tmp_path / "out", Recipe(scheme="NU4"), windows=tiny_models.tokens(1, 48))
    assert result.exit_code == 4  # experts without a token count against the limit of rescues
    everything = {"experts": 4, "min": 0, "median": 24, "max": 48, "starved": 2, "unseen": 2}
    assert result.to_dict()["experts"] == everything | {"blocks": [{"block": "model.layers.1", **everything}]}
    summary = quantize_summary(result.to_dict())
    assert "0 / 24 / 48 (least, median, most of 4)" in summary and "2, and 2 that saw no token" in summary
    assert "| `model.layers.1` | 4 | 0 | 24 | 48 | 2 | 2 |" in (tmp_path / "out" / "README.md").read_text()
    page = (tmp_path / "out" / "report.html").read_text()
    assert (
        ">Tokens per expert</h2>" in page
        and '<th class="name" scope="row">model.layers.1</th><td class="n">4</td><td class="n">0</td>' in page
    )
    found = {
        r.name.partition("experts.")[2]: r
        for r in read_records(tmp_path / "out" / "records.jsonl")
        if ".experts." in r.name
    }
    kinds = {
        name: [rescue.kind for rescue in record.rescues if "expert" in rescue.kind] for name, record in found.items()
    }
    for part in ("gate_proj", "up_proj", "down_proj"):
        assert kinds[f"3.{part}"] == kinds[f"2.{part}"] == ["unseen_expert"]
        assert found[f"3.{part}"].tokens == 0 and 0 < found[f"3.{part}"].loss < found[f"3.{part}"].loss_rounding
        assert (
            found[f"0.{part}"].tokens == 48
        )  # both experts of the other group see every token: 48 for 64 columns, 32 of down
        assert kinds[f"0.{part}"] == (["starved_expert"] if part != "down_proj" else [])
    model, _ = leangrid.load(tmp_path / "out")
    for part in ("gate_proj", "up_proj", "down_proj"):
        name = f"model.layers.1.mlp.experts.3.{part}"
        layer: Any = model.get_submodule(name)
        weight, stored = layer.weight_hat, tensors[f"{name}.weight"]
        assert (weight - stored).norm() < 0.2 * stored.norm()


@pytest.mark.parametrize("name", tiny_models.MIXTURES)
@torch.no_grad()
def test_walks_that_pause_and_replay_give_the_model_and_the_same_bits(name: str, tmp_path: Path) -> None:
    skeleton = Skeleton(open_source(tiny_models.save(name, tmp_path)))
    plain, ids, seen = tiny_models.build(name), tiny_models.tokens(4, 32), []
    for index in range(len(skeleton.blocks)):
        block = plain.get_submodule(skeleton.block_name(index))
        block.register_forward_hook(lambda _m, _i, out: seen.append(out[0] if isinstance(out, tuple) else out))
    plain(ids[:2])
    flow, entered = enter(skeleton, ids.split(2))
    streams = {replay: Streams(list(entered.quantized), list(entered.quantized)) for replay in (False, True)}
    for index in range(len(skeleton.blocks)):
        read: dict[bool, list[torch.Tensor]] = {False: [], True: []}
        for replay in (False, True):
            noise = torch.Generator().manual_seed(0)
            with skeleton.load_block(index) as block:
                walk = walk_through(skeleton, block, flow, index, streams[replay], replay)
                for group in walk:
                    for held in group:
                        read[replay] += [x.clone() for x in (held if isinstance(held, list) else [held[1]])]
                    for linear in group.names:
                        weight = block.get_parameter(f"{linear}.weight")
                        walk.replace(linear, weight + 0.05 * torch.randn(weight.shape, generator=noise))
                streams[replay] = walk.finished()
        assert all(map(torch.equal, read[False], read[True])) and len(read[False]) == len(read[True])
        for one, other in zip(streams[False].tensors().values(), streams[True].tensors().values(), strict=True):
            assert torch.equal(one, other)
        original = streams[False].original
        assert original is not None
        torch.testing.assert_close(original[0], seen[index], rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["qwen3_moe", "mixtral"])
@pytest.mark.parametrize("suffix", ["", "_SYM"])
def test_plain_transformers_reads_quantized_experts_rightly_or_fails_loudly(
    name: str, suffix: str, tmp_path: Path
) -> None:
    source = tiny_models.save(name, tmp_path / "source")
    quantize(source, tmp_path / "out", Recipe(scheme=f"W4A16_G32{suffix}"), windows=WINDOWS)
    ours, _ = leangrid.load(tmp_path / "out")
    if not suffix:  # it stops with "Asymmetric quant requires zero-point values"
        with pytest.raises(RuntimeError, match="conversion of the weights"):
            AutoModelForCausalLM.from_pretrained(tmp_path / "out")
        return
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    torch.testing.assert_close(_logits(theirs, WINDOWS[:2]), _logits(ours, WINDOWS[:2]), rtol=1e-4, atol=1e-4)


def test_the_dense_export_of_a_mixture_opens_in_plain_transformers(tmp_path: Path) -> None:
    source = tiny_models.save("mixtral", tmp_path / "source")
    quantize(source, tmp_path / "out", Recipe(scheme="W4A16_G32"), windows=WINDOWS)
    leangrid.export(tmp_path / "out", tmp_path / "dense", "dense")
    ours, _ = leangrid.load(tmp_path / "out")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    torch.testing.assert_close(_logits(theirs, WINDOWS[:2]), _logits(ours, WINDOWS[:2]), rtol=1e-4, atol=1e-4)


def _save_fused(name: str, directory: Path) -> Path:
    """``name`` as transformers stores it where it is asked not to take the fused tensors apart."""
    tiny_models.save(name, directory)
    tiny_models.build(name).save_pretrained(directory, save_original_format=False)
    return directory


@pytest.mark.parametrize("name", tiny_models.MIXTURES)
def test_fused_experts_are_read_one_by_one(name: str, tmp_path: Path) -> None:
    fused, plain = _save_fused(name, tmp_path / "fused"), tiny_models.save(name, tmp_path / "plain")
    assert any(n.endswith(".mlp.experts.gate_up_proj") for n in read_tensor_infos(fused / "model.safetensors"))
    ours, theirs = Skeleton(open_source(fused)), Skeleton(open_source(plain))
    assert sorted(ours.parameter_names()) == sorted(theirs.parameter_names())
    assert ours.all_linear_names() == theirs.all_linear_names()
    assert all(torch.equal(ours.read(n), theirs.read(n)) for n in theirs.parameter_names())
    said = "the experts of a mixture are stored in one tensor: they are read one by one, and written so"
    assert describe_fused(ours, merge=True) == [said] and not describe_fused(theirs, merge=True)


def test_fused_experts_give_the_same_result(tmp_path: Path) -> None:
    sources = _save_fused("mixtral", tmp_path / "fused"), tiny_models.save("mixtral", tmp_path / "plain")
    for source in sources:
        quantize(source, tmp_path / f"{source.name}-out", Recipe(scheme="NU4"), windows=WINDOWS)
    one, other = ((tmp_path / f"{source.name}-out" / "model.safetensors").read_bytes() for source in sources)
    assert one == other


def test_fused_experts_that_do_not_fit_are_named(tmp_path: Path) -> None:
    source = _save_fused("qwen3_moe", tmp_path / "source")
    tensors = load_file(source / "model.safetensors")
    name = "model.layers.1.mlp.experts.gate_up_proj"
    for wrong in (
        tensors[name][:3].contiguous(),
        tensors[name][:, :62].contiguous(),
        tensors[name][:, :63].contiguous(),
        torch.zeros(1 << 40, 0, 4),
    ):
        expected = rf"{name} has shape {re.escape(str(list(wrong.shape)))}, the config asks for \[4, 64, 64\]"
        save_file(tensors | {name: wrong}, source / "model.safetensors", {"format": "pt"})
        with pytest.raises(CheckpointError, match=expected):
            quantize(source, tmp_path / "out", Recipe(scheme="NU4"), windows=WINDOWS)
    alone = {"model.layers.1.mlp.experts.3.up_proj.weight": torch.zeros(32, 64)}
    save_file(tensors | alone, source / "model.safetensors", {"format": "pt"})
    with pytest.raises(
        CheckpointError, match=rf"'model\.layers\.1\.mlp\.experts\.3\.up_proj\.weight' is stored twice, .* in '{name}'"
    ):
        quantize(source, tmp_path / "out", Recipe(scheme="NU4"), windows=WINDOWS)
    assert not (tmp_path / "out.partial").exists()


def test_an_index_that_names_experts_that_are_missing(tmp_path: Path) -> None:
    source = tiny_models.save("qwen3_moe", tmp_path / "source", sharded=True)
    index = json.loads((source / "model.safetensors.index.json").read_text())
    name = "model.layers.1.mlp.experts.3.up_proj.weight"
    shard = source / index["weight_map"][name]
    kept = {n: tensor for n, tensor in load_file(shard).items() if n != name}
    save_file(kept, shard, {"format": "pt"})
    with pytest.raises(
        CheckpointError, match=rf"index\.json lists tensors that their shards do not hold: {name} \(1 in all\)"
    ):
        quantize(source, tmp_path / "out", Recipe(scheme="NU4"), windows=WINDOWS)
    shard.unlink()
    with pytest.raises(CheckpointError, match=rf"index\.json names shards that are missing: {shard.name}"):
        quantize(source, tmp_path / "out", Recipe(scheme="NU4"), windows=WINDOWS)
    assert not (tmp_path / "out.partial").exists()


def test_an_expert_that_is_missing_is_named(tmp_path: Path) -> None:
    source = tiny_models.save("qwen3_moe", tmp_path / "source")
    tensors = load_file(source / "model.safetensors")
    for part in ("gate_proj", "up_proj", "down_proj"):
        del tensors[f"model.layers.1.mlp.experts.3.{part}.weight"]
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    with pytest.raises(
        CheckpointError, match=r"disagree: .*model\.layers\.1\.mlp\.experts\.3\.gate_proj\.weight is missing"
    ):
        quantize(source, tmp_path / "out", Recipe(scheme="NU4"), windows=WINDOWS)
    assert not (tmp_path / "out.partial").exists()
