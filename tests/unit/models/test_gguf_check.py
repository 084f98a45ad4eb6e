"""The second look at a dequantized GGUF file: every kind of loss that the reader could have is noticed without asking
the reader."""

import json
from pathlib import Path
from typing import Any

import gguf_models
import pytest
import tiny_models
import torch
from safetensors.torch import load_file, save_file

from leangrid.models.gguf import dequantize
from leangrid.models.gguf_check import check_against_file

pytestmark = pytest.mark.fault("S15")
C = tiny_models.CONFIGS
_LLAMA3 = [1.0, 1.0, 1.0, 4.0, 8.0, 8.0, 8.0, 8.0]


def biased() -> Any:
    config = C["llama2"]()
    config.attention_bias = True
    return config


MADE = {
    "llama": (C["llama2"], {}, {}),
    "scaled": (C["llama2"], {"rope.scaling.type": "linear", "rope.scaling.factor": 4.0}, {}),
    "yarn": (
        C["llama2"],
        {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0, "rope.scaling.original_context_length": 64},
        {},
    ),
    "llama3": (C["llama2"], {}, {"rope_freqs.weight": torch.tensor(_LLAMA3).numpy()}),
    "biased": (biased, {}, {}),
    "mixtral": (C["mixtral"], {}, {}),
    "gemma2": (C["gemma2"], {}, {}),
    "gpt2": (C["gpt2"], {}, {}),
}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    base = tmp_path_factory.mktemp("gguf")
    for name, (config, fields, tensors) in MADE.items():
        gguf_models.write(
            base / f"{name}.gguf", gguf_models.build(config()), fields=fields, tensors=tensors, kind="Q8_0"
        )
    return {name: base / f"{name}.gguf" for name in MADE}


def _config(**changes: Any) -> Any:
    def change(directory: Path) -> None:
        path = directory / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return change


def _weights(change: Any) -> Any:
    def changed(directory: Path) -> None:
        held = load_file(directory / "model.safetensors")
        change(held)
        save_file(held, directory / "model.safetensors")

    return changed


def _swap(held: dict) -> None:
    one, other = (
        name for name in held if "up_proj" in name or "c_fc.weight" in name or (".w3." in name and ".0." in name)
    )
    held[one], held[other] = held[other], held[one].clone()


def _one(part: str) -> Any:
    def change(held: dict) -> None:
        name = next(name for name in held if part in name)
        held[name] = held[name] + held[name].abs().mean()

    return _weights(change)


def _drop(part: str) -> Any:
    return _weights(lambda held: [held.pop(name) for name in list(held) if part in name])


PLAIN = {"rope_type": "default", "rope_theta": 10000.0}


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        ("scaled", _config(rope_parameters=PLAIN), "frequencies"),
        ("yarn", _config(rope_parameters=PLAIN), "frequencies"),
        ("llama3", _config(rope_parameters=PLAIN), "frequencies"),
        ("llama", _config(rope_parameters=PLAIN | {"rope_theta": 500000.0}), "frequencies"),
        ("biased", _drop("q_proj.bias"), "attn_q.bias of the file is not in the directory"),
        ("llama", _config(head_dim=32), "dimensions"),
        ("llama", _config(rms_norm_eps=1e-5), "epsilon"),
        ("llama", _config(num_key_value_heads=4), "head_count_kv"),
        ("llama", _one("q_proj"), "other numbers"),
        ("llama", _one("norm.weight"), "other numbers"),
        ("llama", _weights(_swap), "other numbers"),
        ("llama", _drop("layers.1.mlp.up_proj"), "ffn_up.weight of the file is not in the directory"),
        (
            "llama",
            _weights(lambda held: held.update({"model.layers.0.mlp.extra.weight": torch.ones(2, 2)})),
            "no place|not in the file",
        ),
        ("mixtral", _one("experts.1.w2"), "block 0"),
        ("mixtral", _config(num_experts_per_tok=1), "expert_used_count"),
        ("gemma2", _one("o_proj"), "block 0"),
        ("gemma2", _config(attn_logit_softcapping=None), "softcapping"),
        ("gpt2", _one("wpe"), "outside of the blocks"),
        ("gpt2", _drop("h.1.attn.c_attn.bias"), "block 1"),
    ],
)
def test_what_was_lost_is_noticed(files: dict[str, Path], name: str, change: Any, words: str, tmp_path: Path) -> None:
    dequantize(files[name], tmp_path / "out")
    assert check_against_file(files[name], tmp_path / "out") == []
    change(tmp_path / "out")
    found = check_against_file(files[name], tmp_path / "out")
    assert (found and words.split("|")[0] in "; ".join(found)) or words.split("|")[-1] in "; ".join(found)
