"""Which stored tensor is which of the model: ties as transformers settles them, what lies beyond the model, dtypes."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny_models
import torch
import transformers as hf
from safetensors.torch import load_file, save_file

import leangrid
from leangrid.errors import CheckpointError
from leangrid.models.skeleton import Skeleton
from leangrid.storage.source import open_source

Tensors = dict[str, torch.Tensor]
RECIPE = leangrid.Recipe(scheme="W8A16", samples=2, length=32)


def _drop(part: str) -> Callable[[Tensors], None]:
    def edit(tensors: Tensors) -> None:
        for name in [name for name in tensors if part in name]:
            del tensors[name]

    return edit


def write(
    name: str, directory: Path, edit: Callable[[Tensors], None], dtype: torch.dtype = torch.float32, **config: object
) -> Path:
    tiny_models.save(name, directory, dtype)
    tensors = load_file(directory / "model.safetensors")
    edit(tensors)
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))
    return directory


def quantized(source: Path, recipe: leangrid.Recipe = RECIPE) -> Path:
    """The result's directory; the gate must have passed it."""
    result = leangrid.quantize(source, source.parent / "out", recipe, windows=tiny_models.tokens(2, 32))
    assert result.exit_code == 0, result.quality
    return result.directory


def logits(directory: Path) -> torch.Tensor:
    """As plain transformers opens it, our layers for what is packed."""
    with torch.no_grad():
        return leangrid.load(directory, dtype=torch.float32)[0](tiny_models.tokens()).logits


def near(source: Path, out: Path, limit: float = 0.02) -> None:
    one, other = logits(source), logits(out)
    assert float((one - other).norm() / one.norm()) < limit


@pytest.mark.fault("S17")
def test_a_tied_flag_with_another_head_stored_is_untied(tmp_path: Path) -> None:
    head = torch.randn(tiny_models.VOCAB, tiny_models.HIDDEN)
    source = write("llama3_tied", tmp_path / "m", lambda t: t.update({"lm_head.weight": head}))
    skeleton = Skeleton(open_source(source))
    assert skeleton.naming.untied and torch.equal(skeleton.read("lm_head.weight"), head)
    assert any("kept apart" in notice for notice in skeleton.naming.notices)
    out = quantized(source)
    assert torch.equal(load_file(out / "model.safetensors")["lm_head.weight"], head)
    assert json.loads((out / "config.json").read_text())["tie_word_embeddings"] is False
    near(source, out)


@pytest.mark.fault("S17")
def test_an_equal_copy_of_a_tied_head_stays_tied(tmp_path: Path) -> None:
    source = write(
        "llama3_tied", tmp_path / "m", lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()})
    )
    skeleton = Skeleton(open_source(source))
    assert not skeleton.naming.untied and "lm_head.weight" not in skeleton.parameter_names()
    near(source, quantized(source))


@pytest.mark.fault("S17")
def test_a_head_of_another_dtype_but_of_the_same_values_stays_tied(tmp_path: Path) -> None:
    copy = "model.embed_tokens.weight"
    source = write(
        "llama3_tied", tmp_path / "m", lambda t: t.update({"lm_head.weight": t[copy].float()}), torch.bfloat16
    )
    assert not Skeleton(open_source(source)).naming.untied


@pytest.mark.fault("S17")
def test_only_the_head_of_a_tied_pair_stored(tmp_path: Path) -> None:
    source = write(
        "llama3_tied", tmp_path / "m", lambda t: t.update({"lm_head.weight": t.pop("model.embed_tokens.weight")})
    )
    out = quantized(source)
    assert "model.embed_tokens.weight" in load_file(out / "model.safetensors")
    near(source, out)


@pytest.mark.fault("S17")
def test_neither_of_a_tied_pair_stored_is_missing(tmp_path: Path) -> None:
    source = write("llama3_tied", tmp_path / "m", _drop("embed_tokens"))
    with pytest.raises(CheckpointError, match=r"embed_tokens\.weight is missing"):
        Skeleton(open_source(source))


@pytest.mark.fault("S17")
def test_no_head_and_no_tie_is_refused_by_name(tmp_path: Path) -> None:
    source = write("llama2", tmp_path / "m", _drop("lm_head"))
    with pytest.raises(CheckpointError, match=r"lm_head\.weight is missing.*tie_word_embeddings"):
        Skeleton(open_source(source))


@pytest.mark.fault("S17")
def test_a_bert_whose_tied_decoder_differs(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = tiny_models.CONFIGS["bert"]()
    hf.BertForMaskedLM(config).save_pretrained(tmp_path / "m")
    tiny_models.tokenizer().save_pretrained(tmp_path / "m")
    tensors = load_file(tmp_path / "m" / "model.safetensors")
    tensors["cls.predictions.decoder.weight"] = torch.randn(tiny_models.VOCAB, tiny_models.HIDDEN)
    save_file(tensors, tmp_path / "m" / "model.safetensors", {"format": "pt"})
    out = quantized(tmp_path / "m")
    stored = load_file(out / "model.safetensors")
    assert torch.equal(stored["cls.predictions.decoder.weight"], tensors["cls.predictions.decoder.weight"])
    assert torch.equal(
        stored["cls.predictions.decoder.bias"], tensors["cls.predictions.bias"]
    )  # tied no longer, so each has its own


def _further(tensors: Tensors, at: int) -> None:
    for name in [name for name in tensors if ".layers.1." in name]:
        tensors[name.replace(".layers.1.", f".layers.{at}.")] = tensors[name].clone()
    tensors[f"model.layers.{at}.eh_proj.weight"] = torch.randn(64, 128)


@pytest.mark.fault("S18")
@pytest.mark.parametrize(("at", "fields"), [(61, {}), (2, {"num_nextn_predict_layers": 1})])
def test_a_layer_that_predicts_further_tokens_is_copied(tmp_path: Path, at: int, fields: dict[str, int]) -> None:
    source = write("deepseek_v3", tmp_path / "m", lambda t: _further(t, at), **fields)
    out = quantized(source, RECIPE.model_copy(update={"scheme": "W8A16"}))
    before, after = load_file(source / "model.safetensors"), load_file(out / "model.safetensors")
    extra = [name for name in before if f".layers.{at}." in name]
    assert extra and all(torch.equal(after[name], before[name]) for name in extra)
    ignore = json.loads((out / "config.json").read_text())["quantization_config"]["ignore"]
    assert f"model.layers.{at}.eh_proj" in ignore


@pytest.mark.fault("S18")
@pytest.mark.parametrize("fields", [{}, {"num_nextn_predict_layers": 1}])
def test_layers_that_nothing_announces_are_refused(tmp_path: Path, fields: dict[str, int]) -> None:
    source = write("deepseek_v3", tmp_path / "m", lambda t: _further(t, 3), **fields)
    with pytest.raises(CheckpointError, match=r"layers\.3\..* is not part of the model"):
        Skeleton(open_source(source))


@pytest.mark.fault("S18")
@pytest.mark.parametrize(
    "name", ["v_head.summary.weight", "mtp.fc.weight", "score.weight", "model.mtp.norm.weight", "vision_tower.a.weight"]
)
def test_what_lies_beside_the_model_is_copied_and_said(tmp_path: Path, name: str) -> None:
    source = write("llama2", tmp_path / "m", lambda t: t.update({name: torch.randn(1, 64)}))
    skeleton = Skeleton(open_source(source))
    assert skeleton.naming.extra == (name,) and any(name in notice for notice in skeleton.naming.notices)
    out = quantized(source)
    assert torch.equal(load_file(out / "model.safetensors")[name], load_file(source / "model.safetensors")[name])
    near(source, out)


@pytest.mark.fault("S18")
@pytest.mark.parametrize(
    "name",
    [
        "lm_head.bias",
        "model.norm.bias",
        "model.layers.0.extra.weight",
        "model.layers.0.self_attn.q_proj.bias",
        "model.foo.weight",
    ],
)
def test_what_would_change_the_model_is_refused(tmp_path: Path, name: str) -> None:
    source = write("llama2", tmp_path / "m", lambda t: t.update({name: torch.randn(64)}))
    with pytest.raises(CheckpointError, match=f"{name} is not part of the model"):
        Skeleton(open_source(source))


@pytest.mark.fault("S18")
def test_the_heads_of_bert_base_and_its_old_names(tmp_path: Path) -> None:
    hf.BertForPreTraining(tiny_models.CONFIGS["bert"]()).save_pretrained(tmp_path / "m")
    tiny_models.tokenizer().save_pretrained(tmp_path / "m")
    tensors = load_file(tmp_path / "m" / "model.safetensors")
    old = {
        n.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): t
        for n, t in tensors.items()
    }
    save_file(old, tmp_path / "m" / "model.safetensors", {"format": "pt"})
    path = tmp_path / "m" / "config.json"
    for name, beyond in (
        ("BertForMaskedLM", {"bert.pooler", "cls.seq_relationship"}),
        ("BertModel", {"cls.predictions", "cls.seq_relationship"}),
    ):
        path.write_text(json.dumps(json.loads(path.read_text()) | {"architectures": [name]}))
        left = {".".join(n.split(".")[:2]) for n in Skeleton(open_source(tmp_path / "m")).naming.extra}
        assert left == beyond, name


@pytest.mark.fault("S18")
def test_a_bert_without_its_pooler_is_read_without_it(tmp_path: Path) -> None:
    source = write("bert", tmp_path / "m", _drop("pooler"))
    skeleton = Skeleton(open_source(source))
    assert skeleton.naming.absent == ("pooler",) and skeleton.naming.notices
    stored = load_file(quantized(source) / "model.safetensors")
    assert not any("pooler" in name for name in stored)


@pytest.mark.fault("S18")
def test_half_a_pooler_is_missing_tensors(tmp_path: Path) -> None:
    source = write("bert", tmp_path / "m", _drop("pooler.dense.bias"))
    with pytest.raises(CheckpointError, match=r"pooler\.dense\.bias is missing"):
        Skeleton(open_source(source))


@pytest.mark.fault("S19")
def test_mixed_dtypes_stay_as_they_are_stored(tmp_path: Path) -> None:
    def edit(tensors: Tensors) -> None:
        for name in list(tensors):
            if "norm" in name or "lm_head" in name or name == "model.layers.0.self_attn.q_proj.weight":
                tensors[name] = tensors[name].float()

    source = write("llama2", tmp_path / "m", edit, torch.bfloat16)
    assert Skeleton(open_source(source)).dtype == torch.bfloat16
    out = quantized(source)
    before, after = load_file(source / "model.safetensors"), load_file(out / "model.safetensors")
    kept = [name for name in after if name in before]
    assert len(kept) == 7 and all(after[n].dtype == before[n].dtype and torch.equal(after[n], before[n]) for n in kept)
    assert {t.dtype for n, t in after.items() if n.endswith("weight_scale")} == {torch.bfloat16}


@pytest.mark.fault("S19")
def test_float64_is_computed_in_float32(tmp_path: Path) -> None:
    source = write("llama2", tmp_path / "m", lambda t: t.update({n: x.double() for n, x in t.items()}))
    assert Skeleton(open_source(source)).dtype == torch.float32
    near(source, quantized(source))


@pytest.mark.fault("S19")
@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn, torch.int64, torch.bool])
@pytest.mark.parametrize("name", ["model.layers.1.mlp.up_proj.weight", "model.norm.weight", "lm_head.weight"])
def test_every_tensor_s_dtype_is_looked_at_before_work(tmp_path: Path, name: str, dtype: torch.dtype) -> None:
    source = write("llama2", tmp_path / "m", lambda t: t.update({name: t[name].to(dtype)}))
    with pytest.raises(CheckpointError, match=f"{name}.*quantized|quantized.*{name}"):
        Skeleton(open_source(source))


@pytest.mark.fault("S19")
def test_an_infinite_head_leaves_nothing_behind(tmp_path: Path) -> None:
    source = write("llama2", tmp_path / "m", lambda t: t["lm_head.weight"].view(-1).__setitem__(5, float("inf")))
    with pytest.raises(CheckpointError, match=r"lm_head.*infinite"):
        quantized(source)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m"]
