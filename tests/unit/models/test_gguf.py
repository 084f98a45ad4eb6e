"""A GGUF file read as a checkpoint: every architecture gives the logits of the model that it was written from; what
cannot be carried over is refused by name, from the header."""

import json
from pathlib import Path
from typing import Any

import gguf
import gguf_models
import numpy as np
import pytest
import tiny_models
import torch
import transformers as hf
from live_bytes import LiveBytes

from leangrid.models.gguf import dequantize, dequantizing_bytes, describe
from leangrid.models.gguf_check import check_against_file
from leangrid.models.gguf_fields import can_dequantize, read_rows
from leangrid.storage.gguf_header import StoredTensor
from leangrid.storage.source import open_source

pytestmark = pytest.mark.fault("S15")
C = tiny_models.CONFIGS
_LLAMA3: dict[str, Any] = tiny_models._LLAMA3_ROPE


def config(name: str, **changes: Any) -> Any:
    """A tiny config, changed."""
    given = C[name]().to_dict()
    if "rope_parameters" in changes:
        given.pop("rope_parameters", None)
    return type(C[name]()).from_dict({**given, **changes})


def read_back(path: Path, directory: Path) -> Any:
    """The directory that the file becomes, opened by transformers alone."""
    dequantize(path, directory)
    assert check_against_file(path, directory) == []
    hf.utils.logging.disable_progress_bar()
    return hf.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()


def gemma3(**changes: Any) -> Any:
    layers = ["sliding_attention"] * 5 + ["full_attention"]
    given = C["gemma3"]().to_dict() | {"layer_types": layers, "num_hidden_layers": 6} | changes
    return hf.Gemma3TextConfig(**{key: value for key, value in given.items() if key != "transformers_version"})


@pytest.mark.parametrize(
    ("made", "fields"),
    [
        (lambda: config("llama2"), {}),
        (lambda: config("llama2", head_dim=32, tie_word_embeddings=True), {}),
        (lambda: config("llama2", attention_bias=True, mlp_bias=True), {}),
        (lambda: config("mistral", sliding_window=None), {}),
        (lambda: config("mistral"), {"attention.sliding_window": 16}),
        (lambda: config("mixtral"), {}),
        (lambda: config("qwen2"), {}),
        (lambda: config("qwen3", tie_word_embeddings=True), {}),
        (lambda: config("qwen3", attention_bias=True), {}),
        (lambda: config("qwen2_moe", mlp_only_layers=[]), {}),
        (lambda: config("qwen3_moe"), {}),
        (lambda: config("olmoe"), {}),
        (lambda: config("gemma2"), {}),
        (lambda: gemma3(), {"rope.freq_base_swa": 10000.0}),
        (lambda: gemma3(final_logit_softcapping=30.0), {"final_logit_softcapping": 30.0}),
        (lambda: config("phi3"), {}),
        (lambda: config("phi3", sliding_window=16), {"attention.sliding_window": 16}),
        (
            lambda: config(
                "phi3", rope_parameters={"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.75}
            ),
            {},
        ),
        (lambda: config("gpt2"), {}),
        (lambda: config("gpt2", tie_word_embeddings=False), {}),
    ],
)
def test_every_architecture_gives_the_logits_of_the_model_it_was_written_from(
    made: Any, fields: dict, tmp_path: Path
) -> None:
    model = gguf_models.build(made())
    gguf_models.write(tmp_path / "m.gguf", model, fields=fields)
    got = gguf_models.logits(read_back(tmp_path / "m.gguf", tmp_path / "out"))
    assert torch.equal(got, gguf_models.logits(model)) or float((got - gguf_models.logits(model)).abs().max()) < 2e-5
    described = describe(tmp_path / "m.gguf")
    source = open_source(tmp_path / "out")
    assert {n: t.shape for n, t in described.tensors.items()} == {n: t.shape for n, t in source.tensors.items()}
    assert described.config == json.loads((tmp_path / "out/config.json").read_text())


@pytest.mark.parametrize(
    ("rope", "fields", "kind"),
    [
        ({"rope_type": "linear", "factor": 4.0}, {"rope.scaling.type": "linear", "rope.scaling.factor": 4.0}, "linear"),
        ({"rope_type": "linear", "factor": 4.0}, {"rope.scaling.factor": 4.0}, "linear"),  # llama.cpp's default type
        ({"rope_type": "linear", "factor": 2.5}, {"rope.scale_linear": 2.5}, "linear"),  # the key of 2023
        ({"rope_type": "default"}, {"rope.scaling.type": "none", "rope.scaling.factor": 4.0}, "default"),
        ({"rope_type": "default", "rope_theta": 10000.0}, {"rope.freq_base": None}, "default"),
        (
            {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
            {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0, "rope.scaling.original_context_length": 64},
            "yarn",
        ),
        (
            {
                "rope_type": "yarn",
                "factor": 4.0,
                "original_max_position_embeddings": 64,
                "beta_fast": 16.0,
                "beta_slow": 2.0,
                "mscale": 1.0,
                "mscale_all_dim": 0.7,
            },
            {
                "rope.scaling.type": "yarn",
                "rope.scaling.factor": 4.0,
                "rope.scaling.original_context_length": 64,
                "rope.scaling.yarn_beta_fast": 16.0,
                "rope.scaling.yarn_beta_slow": 2.0,
                "rope.scaling.yarn_log_multiplier": 0.7,
            },
            "yarn",
        ),
        (
            {
                "rope_type": "longrope",
                "short_factor": [1.0] * 8,
                "long_factor": [1.0] * 8,
                "attention_factor": 1.3,
                "factor": 1.0,
                "original_max_position_embeddings": 512,
            },
            {"rope.scaling.attn_factor": 1.3},
            "longrope",
        ),
    ],
)
def test_rotary_scaling_in_fields(rope: dict, fields: dict, kind: str, tmp_path: Path) -> None:
    model = gguf_models.build(config("llama2", rope_parameters={"rope_theta": 500000.0, **rope}))
    gguf_models.write(tmp_path / "m.gguf", model, fields=fields)
    back = read_back(tmp_path / "m.gguf", tmp_path / "out")
    assert back.config.rope_parameters["rope_type"] == kind
    assert float((gguf_models.logits(back) - gguf_models.logits(model)).abs().max()) < 2e-5


def llama3_factors(
    dims: int, factor: float, low: float, high: float, length: int, base: float = 500000.0
) -> np.ndarray:
    """As convert_hf_to_gguf.py computes them."""
    made = []
    for turn in 1 / base ** (np.arange(0, dims, 2) / dims):
        wavelength = 2 * np.pi / turn
        smooth = (length / wavelength - low) / (high - low)
        made.append(
            1.0
            if wavelength < length / high
            else factor
            if wavelength > length / low
            else 1 / ((1 - smooth) / factor + smooth)
        )
    return np.array(made, dtype=np.float32)


@pytest.mark.parametrize(
    ("head_dim", "values"),
    [
        (16, (8.0, 1.0, 4.0, 64)),  # the tiny models'
        (128, (8.0, 1.0, 4.0, 8192)),  # Llama 3.1
        (64, (32.0, 1.0, 4.0, 8192)),  # Llama 3.2
        (64, (16.0, 1.0, 4.0, 4096)),
        (128, (8.0, 2.0, 16.0, 8192)),
        (128, (8.0, 1.0, 1.5, 1000)),
    ],
)
def test_llama3s_factors_are_recovered_exactly(head_dim: int, values: tuple, tmp_path: Path) -> None:
    keys = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
    rope = {"rope_type": "llama3", "rope_theta": 500000.0, **dict(zip(keys, values, strict=True))}
    model = gguf_models.build(config("llama2", head_dim=head_dim, rope_parameters=rope))
    gguf_models.write(tmp_path / "m.gguf", model, tensors={"rope_freqs.weight": llama3_factors(head_dim, *values)})
    back = read_back(tmp_path / "m.gguf", tmp_path / "out")
    found = back.config.rope_parameters
    assert found["rope_type"] == "llama3" and found["factor"] == values[0]
    assert found["original_max_position_embeddings"] / found["low_freq_factor"] == pytest.approx(
        values[3] / values[1], rel=1e-3
    )
    assert torch.allclose(back.model.rotary_emb.inv_freq, model.model.rotary_emb.inv_freq, rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("factors", "kind"),
    [
        (np.linspace(1, 9, 8), "longrope"),  # no parameters of Llama 3's give a line
        (np.ones(8), "default"),
        (np.full(8, 3.0), "linear"),
    ],
)
def test_other_factors_of_frequencies(factors: np.ndarray, kind: str, tmp_path: Path) -> None:
    model = gguf_models.build(config("llama2"))
    gguf_models.write(tmp_path / "m.gguf", model, tensors={"rope_freqs.weight": factors})
    back = read_back(tmp_path / "m.gguf", tmp_path / "out")
    assert back.config.rope_parameters["rope_type"] == kind
    plain = 1.0 / 10000.0 ** (torch.arange(0, 16, 2).double() / 16)
    assert torch.allclose(back.model.rotary_emb.inv_freq.double(), plain / torch.tensor(factors), rtol=1e-6)
    gguf_models.logits(back)
    assert torch.allclose(back.model.rotary_emb.inv_freq.double(), plain / torch.tensor(factors), rtol=1e-6)


def test_phi3s_long_and_short_factors(tmp_path: Path) -> None:
    short, long = [1.0 + 0.1 * i for i in range(8)], [2.0 + 0.5 * i for i in range(8)]
    rope = {"rope_type": "longrope", "rope_theta": 10000.0, "short_factor": short, "long_factor": long, "factor": 8.0}
    model = gguf_models.build(config("phi3", rope_parameters=rope, original_max_position_embeddings=64))
    attention = float(np.sqrt(1 + np.log(8.0) / np.log(64)))
    gguf_models.write(
        tmp_path / "m.gguf",
        model,
        fields={"rope.scaling.original_context_length": 64, "rope.scaling.attn_factor": attention},
        tensors={"rope_factors_long.weight": np.array(long), "rope_factors_short.weight": np.array(short)},
    )
    back = read_back(tmp_path / "m.gguf", tmp_path / "out")
    for tokens in (tiny_models.tokens(1, 40)[0].tolist(), tiny_models.tokens(1, 80)[0].tolist()):  # below and above 64
        assert float((gguf_models.logits(back, tokens) - gguf_models.logits(model, tokens)).abs().max()) < 2e-5


def test_gemma3s_two_bases_and_linear_scaling(tmp_path: Path) -> None:
    rope = {"sliding_attention": {"rope_type": "default", "rope_theta": 20000.0},
            "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0}}  # fmt: skip
    model = gguf_models.build(gemma3(rope_parameters=rope))
    fields = {
        "rope.freq_base_swa": 20000.0,
        "rope.freq_base": 1e6,
        "rope.scaling.type": "linear",
        "rope.scaling.factor": 8.0,
    }
    gguf_models.write(tmp_path / "m.gguf", model, fields=fields)
    back = read_back(tmp_path / "m.gguf", tmp_path / "out")
    assert float((gguf_models.logits(back) - gguf_models.logits(model)).abs().max()) < 2e-5


def test_biases_of_some_kinds_only_and_fused_queries_keys_and_values(tmp_path: Path) -> None:
    model = gguf_models.build(config("llama2", attention_bias=True))
    for layer in model.model.layers:
        layer.self_attn.o_proj.bias.zero_()
    held = gguf_models.tensors_of(model)
    fused = {
        f"blk.{i}.attn_qkv.weight": np.concatenate([held[f"blk.{i}.attn_{part}.weight"] for part in "qkv"])
        for i in (0, 1)
    }
    gone = {
        name: None
        for name in held
        if name.endswith(("attn_output.bias", "attn_q.weight", "attn_k.weight", "attn_v.weight"))
    }
    gguf_models.write(tmp_path / "m.gguf", model, tensors=fused | gone)
    back = read_back(tmp_path / "m.gguf", tmp_path / "out")
    assert float((gguf_models.logits(back) - gguf_models.logits(model)).abs().max()) < 2e-5


def test_experts_in_tensors_of_their_own(tmp_path: Path) -> None:
    model = gguf_models.build(config("mixtral"))
    held = gguf_models.tensors_of(model)
    own: dict[str, np.ndarray | None] = {}
    for name in [name for name in held if "_exps." in name]:
        own |= {name.replace("_exps.", f".{e}."): held[name][e] for e in range(4)} | {name: None}
    gguf_models.write(tmp_path / "m.gguf", model, tensors=own)
    back = read_back(tmp_path / "m.gguf", tmp_path / "out")
    assert float((gguf_models.logits(back) - gguf_models.logits(model)).abs().max()) < 2e-5


def test_a_large_model_is_written_in_files_that_are_held_one_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = gguf_models.build(config("llama2", num_hidden_layers=14))
    gguf_models.write(tmp_path / "m.gguf", model, kind="F16")
    dequantize(tmp_path / "m.gguf", tmp_path / "whole")
    monkeypatch.setattr("leangrid.models.gguf._SHARD", 1 << 17)
    with LiveBytes() as live:
        dequantize(tmp_path / "m.gguf", tmp_path / "out")
    files = sorted(path.name for path in (tmp_path / "out").glob("*.safetensors"))
    assert len(files) > 3 and files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    total = sum(parameter.numel() for parameter in model.parameters())
    assert live.peak < 1.1 * dequantizing_bytes([512 * 64]) + (1 << 17) < 4 * total / 3
    one, several = open_source(tmp_path / "whole"), open_source(tmp_path / "out")
    assert one.tensors.keys() == several.tensors.keys()
    assert all(torch.equal(one.read(name), several.read(name)) for name in one.tensors)


@pytest.mark.parametrize("kind", [kind.name for kind in gguf.GGML_QUANT_SIZES if can_dequantize(kind.name)])
def test_every_type_of_blocks_is_read_as_gguf_py_reads_it(kind: str, tmp_path: Path) -> None:
    number = gguf.GGMLQuantizationType[kind]
    block, size = gguf.GGML_QUANT_SIZES[number]
    raw = np.random.default_rng(0).integers(0, 60, (6, 2 * size), dtype=np.uint8)
    (tmp_path / "t").write_bytes(raw.tobytes())
    stored = StoredTensor(tmp_path / "t", (6, 2 * block), kind, 0, raw.nbytes)
    expected = raw.view(np.float64) if kind == "F64" else gguf.quants.dequantize(raw, number).astype(np.float32)
    for first, count in ((0, 6), (2, 3), (5, 1)):
        assert np.array_equal(read_rows(stored, first, count).numpy(), expected[first : first + count], equal_nan=True)
