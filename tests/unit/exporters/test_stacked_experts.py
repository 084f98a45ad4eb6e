"""What the exports of a mixture of experts say of their readers, and experts stacked as mlx-lm asks for them."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from safetensors.torch import load_file

import leangrid
from leangrid.planning import mlx_lm

EXPERT = "model.layers.1.mlp.experts.{}.{}"
STACK = "model.layers.1.mlp.switch_mlp.{}"


@pytest.fixture(scope="module")
def mixture(tiny: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """``mixture("RTN4_G32")`` -> a finished result of a tiny Qwen3-MoE in bfloat16, made once."""
    made: dict[str, Path] = {}

    def result(scheme: str) -> Path:
        if scheme not in made:
            made[scheme] = tmp_path_factory.mktemp("mixture") / scheme
            source, windows = tiny("qwen3_moe", torch.bfloat16), tiny_models.tokens(2, 16)
            leangrid.quantize(source, made[scheme], leangrid.Recipe(scheme=scheme), windows=windows, max_kl=1e9)
        return made[scheme]

    return result


def opened_in(directory: Path) -> dict[str, str]:
    return json.loads((directory / "manifest.json").read_text())["opened_in"]


def test_an_export_says_what_opens_it_and_not_what_opens_its_source(
    mixture: Callable[[str], Path], tmp_path: Path
) -> None:
    said: list[str] = []
    source = mixture("RTN4_G32")
    no = "no: it takes no zero points of experts; it opens"
    assert opened_in(source)["transformers"] == f"{no} W4A16_G32_SYM" or opened_in(source)["transformers"].startswith(
        no
    )
    for to in ("dense", "gptq", "compressed-tensors"):
        leangrid.export(source, tmp_path / to, to=to, progress=lambda event: said.append(event.message or ""))
    assert opened_in(tmp_path / "dense") == {"leangrid.load": "yes", "transformers": "yes"}
    assert opened_in(tmp_path / "gptq") == {"leangrid.load": "yes"}
    assert opened_in(tmp_path / "compressed-tensors")["transformers"].startswith(
        f"{no} what leangrid export --to dense"
    )
    assert sum("transformers without leangrid does not" in one for one in said) == 1


def test_routers_are_named_as_not_quantized(mixture: Callable[[str], Path], tmp_path: Path) -> None:
    for to in ("gptq", "awq", "compressed-tensors"):
        leangrid.export(mixture("RTN4_G32"), tmp_path / to, to=to)
    gptq, awq, packed, before = (
        json.loads((directory / "config.json").read_text())["quantization_config"]
        for directory in (*(tmp_path / to for to in ("gptq", "awq", "compressed-tensors")), mixture("RTN4_G32"))
    )
    assert packed == before and {"lm_head", "model.layers.1.mlp.gate"} == set(before["ignore"]) - {
        "model.layers.0.mlp.gate"
    }
    assert set(gptq["dynamic"]) == {rf"-:^model\.layers\.{block}\.mlp\.gate$" for block in (0, 1)}
    assert {"self_attn.q_proj", "mlp.experts.3.down_proj"} < set(gptq["modules_in_block_to_quantize"][0])
    assert {"lm_head", "model.layers.0.mlp.gate"} <= set(awq["modules_to_not_convert"])


def only_stacked(config: dict[str, Any], tensors: Mapping[str, tuple[str, tuple[int, ...]]]) -> str | None:
    """An mlx-lm whose model has its experts in ``switch_mlp``."""
    lost = [name for name in tensors if ".experts." in name]
    return f"ValueError: Received {len(lost)} parameters" if lost else None


@pytest.mark.parametrize("asks", [only_stacked, lambda config, tensors: None, lambda config, tensors: "no such model"])
def test_experts_are_stacked_where_mlx_lm_opens_nothing_else(
    mixture: Callable[[str], Path], asks: Callable[..., str | None], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    source = mixture("RTN4_G32_SYM")
    monkeypatch.setattr(mlx_lm, "is_installed", lambda: False)
    leangrid.export(source, tmp_path / "apart", to="mlx")
    assert opened_in(tmp_path / "apart")["mlx-lm"].startswith("perhaps: ")
    monkeypatch.setattr(mlx_lm, "is_installed", lambda: True)
    monkeypatch.setattr(mlx_lm, "find_obstacle", asks)
    leangrid.export(source, tmp_path / "asked", to="mlx")
    apart, asked = (load_file(tmp_path / name / "model.safetensors") for name in ("apart", "asked"))
    assert leangrid.verify(tmp_path / "asked") == []
    if asks is not only_stacked:
        word = opened_in(tmp_path / "asked")["mlx-lm"]
        assert apart.keys() == asked.keys() and (
            word == "yes" or word.startswith("no: no such model; it may read what")
        )
        return
    assert opened_in(tmp_path / "asked") == {"mlx-lm": "yes"}
    for leaf in ("gate_proj", "up_proj", "down_proj"):
        for suffix in ("weight", "scales", "biases"):
            one_by_one = [apart.pop(f"{EXPERT.format(expert, leaf)}.{suffix}") for expert in range(4)]
            assert torch.equal(asked.pop(f"{STACK.format(leaf)}.{suffix}"), torch.stack(one_by_one))
    assert {name for name in apart if ".layers.0.mlp." not in name} == {
        name for name in asked if ".layers.0.mlp." not in name
    }
    assert not any(".experts." in name for name in asked)
