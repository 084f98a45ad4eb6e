"""Tiny models of many types in every container, unpacked by code that is not leangrid's and judged by transformers
(tests/support/zoo_exports.py)."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import zoo_exports
from zoo_server import Server

pytestmark = pytest.mark.interop

# A model that initialises a packed weight.
QUICK = (("causal", "mamba2"),)
ALL = (
    *QUICK,
    *(("image-text", name) for name in ("gemma3", "gemma4", "llama4", "qwen3_5", "qwen3_5_moe", "qwen3_vl", "gemma3n")),
    *(("causal", name) for name in ("llama", "qwen2", "qwen3", "qwen3_moe", "mixtral", "gemma3_text", "qwen3_next")),
    *(("causal", name) for name in ("gpt_oss", "deepseek_v3", "glm4_moe", "granitemoehybrid", "nemotron_h", "rwkv")),
    *(("causal", name) for name in ("falcon_h1", "lfm2", "jamba", "phi3", "bloom", "gpt2")),
    ("encoder", "bert"),
)
QUICK_NAMES = ["affine", "to_awq", "gptq", "awq", "mlx", "dense"]


@pytest.fixture(scope="module")
def sides() -> Iterator[tuple[Server, Server]]:
    both = Server("zoo_exports"), Server("zoo_exporters")
    yield both
    for side in both:
        side.close()


@pytest.mark.parametrize(
    ("family", "model_type"),
    [pytest.param(*one, marks=() if one in QUICK else pytest.mark.zoo, id="-".join(one)) for one in ALL],
)
def test_a_type_in_every_container(family: str, model_type: str, sides: tuple[Server, Server], tmp_path: Path) -> None:
    only = QUICK_NAMES if (family, model_type) in QUICK else []
    record = zoo_exports.trial(sides, model_type, family, tmp_path, only)
    assert "error" not in record and record["faults"] == [], record
    assert all(not refusal.get("left") for refusal in record["written"].values()), record["written"]
