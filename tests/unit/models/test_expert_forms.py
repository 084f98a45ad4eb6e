"""Experts apart compute what transformers' fused modules compute, in every form that these have."""

from collections.abc import Callable
from typing import Any

import pytest
import tiny_models
import torch
import transformers as hf
from torch import nn

from leangrid.models.expert_forms import FusedForm, form_of
from leangrid.models.experts import Experts, unfuse_experts

_MOE = {**tiny_models._GQA, "num_experts_per_tok": 2, "tie_word_embeddings": False}
FORMS: dict[str, tuple[Callable[[], hf.PreTrainedConfig], FusedForm]] = {
    "mixtral": (tiny_models.CONFIGS["mixtral"], FusedForm(4, 64, 128)),
    "gpt_oss": (
        lambda: hf.GptOssConfig(**_MOE, num_local_experts=4, head_dim=16, layer_types=["full_attention"] * 2),
        FusedForm(4, 64, 128, interleaved=True, transposed=True, biased=True),
    ),
    "llama4_text": (
        lambda: hf.Llama4TextConfig(
            **tiny_models._GQA | {"intermediate_size": 32, "tie_word_embeddings": False},
            intermediate_size_mlp=64,
            num_local_experts=4,
            num_experts_per_tok=2,
            head_dim=16,
        ),
        FusedForm(4, 64, 32, transposed=True, batched=True),
    ),
}


def _apart(model: hf.PreTrainedModel) -> tuple[nn.Module, dict[str, Experts]]:
    """The model with experts apart that hold its weights, taken from its fused tensors by their form."""
    fused = {path: module for path, module in model.named_modules() if form_of(module) is not None}
    tensors = {path: dict(module.named_parameters(recurse=False)) for path, module in fused.items()}
    assert fused and unfuse_experts(model)
    mixtures: dict[str, Experts] = {}
    for path, parameters in tensors.items():
        module: Any = model.get_submodule(path)
        form = mixtures.setdefault(path, module).form
        for kind in ("weight", "bias") if form.biased else ("weight",):
            for leaf in (leaf for leaves in form.stages for leaf in leaves):
                whole, take = parameters[form.fused_name(leaf, kind)], form.taken(leaf, kind)
                for expert in range(form.count):
                    part = nn.Parameter(take(whole[expert]).contiguous(), requires_grad=False)
                    setattr(module.get_submodule(f"{expert}.{leaf}"), kind, part)
    return model, mixtures


@torch.no_grad()
@pytest.mark.parametrize("name", FORMS)
def test_experts_apart_give_the_logits_of_fused_ones(name: str) -> None:
    make, form = FORMS[name]
    torch.manual_seed(0)
    model: Any = hf.AutoModelForCausalLM.from_config(make()).eval()
    for parameter in model.parameters():
        parameter.copy_(0.1 * torch.randn_like(parameter))
    ids = tiny_models.tokens(2, 16)
    expected = model(ids).logits
    apart, mixtures = _apart(model)
    torch.testing.assert_close(apart(ids).logits, expected, rtol=1e-4, atol=1e-5)
    assert all(mixture.form == form for mixture in mixtures.values())


def _fused(**tensors: torch.Tensor) -> nn.Module:
    module = nn.Module()
    for name, tensor in tensors.items():
        module.register_parameter(name, nn.Parameter(tensor, requires_grad=False))
    return module


def test_what_holds_no_experts_has_no_form() -> None:
    assert form_of(nn.Linear(3, 4)) is None and form_of(nn.Embedding(3, 4)) is None
    assert form_of(_fused(down_proj=torch.zeros(2, 3, 4))) is None
    assert form_of(_fused(down_proj=torch.zeros(3, 4), gate_up_proj=torch.zeros(8, 3))) is None
    # Without a gate shapes do not tell which side is which, nor whether there is more (Inkling's shared experts).
    assert form_of(_fused(up_proj=torch.zeros(2, 3, 5), down_proj=torch.zeros(2, 5, 3))) is None


def test_a_form_that_is_not_declared_is_told_by_its_shapes() -> None:
    plain = form_of(_fused(gate_up_proj=torch.zeros(2, 6, 5), down_proj=torch.zeros(2, 5, 3)))
    turned = form_of(_fused(gate_up_proj=torch.zeros(2, 5, 6), down_proj=torch.zeros(2, 3, 5)))
    assert plain == FusedForm(2, 5, 3) and turned == FusedForm(2, 5, 3, transposed=True)
    ungated = FusedForm(2, 5, 3, gated=False)
    assert ungated.stages == (("up_proj",), ("down_proj",)) and ungated.fused_name("up_proj") == "up_proj"
    assert plain is not None and plain.shape("gate_proj") == (3, 5) and plain.shape("down_proj") == (5, 3)


def test_parts_of_a_fused_tensor() -> None:
    whole = torch.arange(24.0).view(6, 4)
    halves, turns = FusedForm(1, 4, 3), FusedForm(1, 4, 3, interleaved=True)
    turned = FusedForm(1, 4, 3, transposed=True, biased=True)
    assert torch.equal(halves.taken("gate_proj")(whole), whole[:3])
    assert torch.equal(halves.taken("up_proj")(whole), whole[3:])
    assert torch.equal(turns.taken("gate_proj")(whole), whole[::2])
    assert torch.equal(turns.taken("up_proj")(whole), whole[1::2])
    assert torch.equal(turned.taken("up_proj")(whole.t()), whole[3:])
    assert torch.equal(turned.taken("up_proj", "bias")(whole[:, 0]), whole[3:, 0])
    assert turned.fused_name("up_proj", "bias") == "gate_up_proj_bias" and turned.fused_name("down_proj") == "down_proj"


@torch.no_grad()
def test_a_token_of_no_expert_is_left_out() -> None:
    torch.manual_seed(0)
    _, mixtures = _apart(tiny_models.build("mixtral"))
    experts = next(iter(mixtures.values()))
    x, weights = torch.randn(3, 64), torch.full((3, 2), 0.5)
    seen: list[list[int]] = []
    experts.before_stage = lambda _stage, inputs: seen.append([len(one) for one in inputs])
    out = experts(x, torch.tensor([[0, 4], [4, 4], [0, 1]]), weights)  # 4 is no expert
    assert seen == [[2, 1, 0, 0], [2, 1, 0, 0]] and not out[1].any() and out[0].any()
