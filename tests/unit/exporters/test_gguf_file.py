"""``export --to gguf``: what gguf-py's reader and transformers' GGUF loader find in the file, and what is refused
before one is begun."""

import json
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest
import tiny_models
import torch
import transformers as hf
from foreign_readers import model_of_gguf

import leangrid
from leangrid.errors import ArchitectureError, CheckpointError, FormatError, LeangridError
from leangrid.models import gguf as gguf_source
from leangrid.models.gguf_check import check_against_file
from leangrid.models.gguf_names import ROPE_FREQS, describe
from leangrid.models.result_reader import ResultReader
from leangrid.storage.journal import partial_of

Results = Callable[..., Path]
# llama.cpp's Gemma 3 has one full attention in six blocks, so two blocks have none.
CONFIGS = {
    "gemma3": lambda: hf.Gemma3TextConfig(**tiny_models._GQA, head_dim=16, query_pre_attn_scalar=16, sliding_window=16)
}
ARCHES = {
    "llama2": "llama",
    "llama3": "llama",
    "llama3_tied": "llama",
    "mistral": "llama",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "gemma3": "gemma3",
}


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> Results:
    """``result("W4A16_G32", "llama2")`` -> a finished directory of a tiny bfloat16 model, made once."""
    made: dict[tuple[str, str], Path] = {}

    def finished(scheme: str, model: str) -> Path:
        if (scheme, model) not in made:
            base = tmp_path_factory.mktemp("gguf")
            with pytest.MonkeyPatch.context() as patch:
                patch.setitem(tiny_models.CONFIGS, model, CONFIGS.get(model, tiny_models.CONFIGS[model]))
                tiny_models.save(model, base / "source", torch.bfloat16)
            recipe = leangrid.Recipe(scheme=scheme, steps=32, correct=0, refine=0)
            leangrid.quantize(base / "source", base / "out", recipe, windows=tiny_models.tokens(2, 16))
            made[scheme, model] = base / "out"
        return made[scheme, model]

    return finished


def exported(source: Path, out: Path, like: Path | None = None) -> gguf.GGUFReader:
    leangrid.export(source, out, to="gguf", like=like)
    assert leangrid.verify(out) == [] and sorted(path.name for path in out.iterdir()) == [
        "README.md",
        "manifest.json",
        "model.gguf",
        "records.jsonl",
        "report.html",
        "run.json",
    ]
    return gguf.GGUFReader(str(out / "model.gguf"))


@pytest.mark.parametrize(("model", "arch"), ARCHES.items())
def test_every_tensor_is_the_finished_results(result: Results, model: str, arch: str, tmp_path: Path) -> None:
    source = result("W4A16_G32", model)
    reader = exported(source, tmp_path / "out")
    found, finished = {tensor.name: tensor for tensor in reader.tensors}, ResultReader.verified(source)
    names = describe(finished.checkpoint.config, "x")
    assert reader.fields["general.architecture"].contents() == arch == names.arch
    for name, (rows, _) in finished.layers.items():
        codes, grid = finished.layer(name)
        weight, stored, order = (
            grid.dequantize(codes),
            found.pop(names.tensor_name(f"{name}.weight")),
            names.row_order(f"{name}.weight", rows),
        )
        assert stored.tensor_type.name == "Q5_0"
        assert np.array_equal(
            gguf.dequantize(stored.data, stored.tensor_type), (weight if order is None else weight[order]).numpy()
        )
    for name in finished.plain_tensors():
        tensor, stored = finished.checkpoint.read(name).float(), found.pop(names.tensor_name(name))
        order = names.row_order(name, len(tensor))
        tensor = tensor + 1 if arch == "gemma3" and "norm" in name else tensor if order is None else tensor[order]
        assert stored.tensor_type.name == ("F32" if tensor.ndim == 1 else "BF16")
        assert np.array_equal(gguf.dequantize(stored.data, stored.tensor_type), tensor.numpy())
    assert set(found) == ({ROPE_FREQS} if model.startswith("llama3") else set())


@pytest.mark.parametrize("model", ["llama2", "mistral", "qwen2", "qwen3", "gemma3"])
def test_transformers_reads_the_file_as_the_same_model(result: Results, model: str, tmp_path: Path) -> None:
    source = result("W4A16_G32", model)
    exported(source, tmp_path / "out")
    hf.utils.logging.disable_progress_bar()
    # transformers takes neither Qwen 3's head_dim nor Gemma 3's second theta from a header: tests/interop/test_llama.py
    # does.
    given = {"config": hf.AutoConfig.from_pretrained(source.parent / "source")} if model in ("qwen3", "gemma3") else {}
    read = model_of_gguf(tmp_path / "out", **given)
    ours, finished = (
        hf.AutoModelForCausalLM.from_pretrained(source.parent / "source", dtype=torch.float32).eval(),
        ResultReader.verified(source),
    )
    for name in finished.layers:
        codes, grid = finished.layer(name)
        ours.get_submodule(name).weight.data = grid.dequantize(codes)
    tokens = tiny_models.tokens(2, 12)
    with torch.no_grad():
        expected, got = ours(tokens).logits, read(tokens).logits
    assert torch.allclose(got, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


def test_llama3s_rope_factors_are_transformers_frequencies(result: Results, tmp_path: Path) -> None:
    reader = exported(result("W4A16_G32", "llama3"), tmp_path / "out")
    config = tiny_models.CONFIGS["llama3"]()
    factors = torch.tensor(next(tensor for tensor in reader.tensors if tensor.name == ROPE_FREQS).data)
    plain = config.rope_parameters["rope_theta"] ** (-torch.arange(0, 16, 2).double() / 16)
    scaled = hf.LlamaForCausalLM(config).model.rotary_emb.inv_freq.double()
    assert torch.allclose(plain / factors.double(), scaled, rtol=1e-6) and float(factors.max()) > 1 == float(
        factors.min()
    )


def test_header_and_tokenizer(result: Results, tmp_path: Path) -> None:
    source = result("W4A16_G32_SYM", "llama2")
    reader = exported(source, tmp_path / "out")
    fields = {key: field.contents() for key, field in reader.fields.items()}
    tokenizer = tiny_models.tokenizer()
    assert {tensor.tensor_type.name for tensor in reader.tensors} == {"Q4_0", "BF16", "F32"}
    assert fields["tokenizer.ggml.model"] == "gpt2" and fields["tokenizer.ggml.pre"] == "gpt-2"
    assert fields["tokenizer.ggml.tokens"] == tokenizer.convert_ids_to_tokens(range(tiny_models.VOCAB))
    assert fields["tokenizer.ggml.token_type"][:5] == [3, 3, 3, 3, 1]
    assert (fields["tokenizer.ggml.bos_token_id"], fields["tokenizer.ggml.eos_token_id"]) == (1, 2)
    assert not fields["tokenizer.ggml.add_bos_token"] and fields["general.file_type"] == 2
    assert fields["llama.attention.head_count_kv"] == 2 and fields["llama.rope.freq_base"] == 10000
    manifest = json.loads((tmp_path / "out/manifest.json").read_text())
    assert manifest["result"]["format"] == "gguf" and manifest["result"]["bits_per_weight"] == 4.5
    assert "llama-server -m DIR/model.gguf" in (tmp_path / "out/README.md").read_text()


@pytest.mark.fault("S15")
@pytest.mark.parametrize("model", ARCHES)
def test_a_round_trip_has_the_same_weights_config_and_tokens(result: Results, model: str, tmp_path: Path) -> None:
    """Exported, dequantized again, opened by transformers: bit for bit the weights of the result, and its logits."""
    source = result("W4A16_G32", model)
    exported(source, tmp_path / "out")
    gguf_source.dequantize(tmp_path / "out/model.gguf", tmp_path / "back")
    assert check_against_file(tmp_path / "out/model.gguf", tmp_path / "back") == []
    hf.utils.logging.disable_progress_bar()
    read, kept = (hf.AutoModelForCausalLM.from_pretrained(where, dtype=torch.float32).eval() for where in
                  (tmp_path / "back", source.parent / "source"))  # fmt: skip
    finished = ResultReader.verified(source)
    for name in finished.layers:
        codes, grid = finished.layer(name)
        kept.get_submodule(name).weight.data = (
            grid.dequantize(codes).to(torch.bfloat16).float()
        )  # blocks are read as bfloat16
    own = kept.state_dict()
    for name, tensor in read.state_dict().items():
        assert torch.equal(tensor, own[name]) or torch.allclose(tensor, own[name], rtol=0, atol=1e-7), name
    described, again = (
        describe(json.loads((where / "config.json").read_text()), "x").fields for where in (source, tmp_path / "back")
    )
    assert {k: f.value for k, f in again.items() if k in described} == {k: f.value for k, f in described.items()}
    window = min(12, getattr(kept.config, "sliding_window", None) or 12)
    tokens = tiny_models.tokens(2, window)
    with torch.no_grad():
        assert torch.allclose(read(tokens).logits, kept(tokens).logits, rtol=0, atol=2e-5)
    ours, theirs = tiny_models.tokenizer(), hf.AutoTokenizer.from_pretrained(tmp_path / "back", trust_remote_code=False)
    for text in ("The quick brown fox", "  1984 it's", "<bos>ÄÖ 東京", ""):
        assert theirs(text)["input_ids"] == ours(text)["input_ids"]


def test_like_takes_the_header_of_the_same_model_only(result: Results, tmp_path: Path) -> None:
    source = result("W4A16_G32", "llama2")
    first = exported(source, tmp_path / "first")
    second = exported(result("W4A16_G32_SYM", "llama2"), tmp_path / "second", like=tmp_path / "first" / "model.gguf")
    for key, field in first.fields.items():
        if key != "general.file_type" and not key.startswith("GGUF."):
            assert second.fields[key].contents() == field.contents(), key
    with pytest.raises(CheckpointError, match=r"head_count_kv is 2, this model's 4"):
        leangrid.export(result("W4A16_G32", "llama1"), tmp_path / "out", to="gguf", like=tmp_path / "first/model.gguf")
    with pytest.raises(CheckpointError, match=r"general\.architecture"):
        leangrid.export(result("W4A16_G32", "qwen2"), tmp_path / "out", to="gguf", like=tmp_path / "first/model.gguf")
    (tmp_path / "damaged.gguf").write_bytes((tmp_path / "first/model.gguf").read_bytes()[:200])
    with pytest.raises(CheckpointError, match="header cannot be read"):
        leangrid.export(source, tmp_path / "out", to="gguf", like=tmp_path / "damaged.gguf")
    assert not (tmp_path / "out").exists() and not partial_of(tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("scheme", "model", "error", "words"),
    [
        ("NU4", "llama2", FormatError, "q_proj.*non-uniform.*W4A16"),
        ("W8A16", "llama2", FormatError, "8 bits with a zero point"),
        ("W4A16_G16", "llama2", FormatError, "do not divide 16"),
        ("W4A16", "phi3", ArchitectureError, "does not know 'phi3'"),
        ("W4A16", "gemma2", ArchitectureError, "does not know 'gemma2'"),
        ("NU4", "gpt2", ArchitectureError, "does not know 'gpt2'"),
    ],
)
def test_what_llama_cpp_cannot_hold_is_refused(
    result: Results, scheme: str, model: str, error: type[LeangridError], words: str, tmp_path: Path
) -> None:
    with pytest.raises(error, match=words):
        leangrid.export(result(scheme, model), tmp_path / "out", to="gguf")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("model", "change", "words"),
    [
        ("llama2", {"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ("llama2", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, "type 'dynamic'"),
        ("qwen2", {"use_sliding_window": True}, "use_sliding_window"),
        ("gemma3", {"layer_types": ["sliding_attention", "full_attention"]}, "one full attention in 6"),
        ("gemma3", {"query_pre_attn_scalar": 256}, "query_pre_attn_scalar 256"),
    ],
)
def test_settings_without_a_field_are_refused(model: str, change: dict, words: str) -> None:
    config = CONFIGS.get(model, tiny_models.CONFIGS[model])().to_dict()
    describe(config, "x")
    with pytest.raises(ArchitectureError, match=words):
        describe({**config, **change}, "x")


def test_a_mistrals_window_is_its_context() -> None:
    described = describe(tiny_models.CONFIGS["mistral"]().to_dict(), "x")
    assert described.fields["llama.context_length"].value == 16 and "sliding window" in described.notices[0]
