"""Experts apart compute what transformers' fused modules compute, in every form that these have."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest
import tiny_models
import torch
import transformers as hf
import zoo_models
from torch import nn

from leangrid.models.expert_forms import FusedForm, form_of
from leangrid.models.experts import Experts, unfuse_experts

FORMS: dict[str, tuple[Callable[[], hf.PreTrainedConfig], FusedForm]] = {
    "mixtral": (tiny_models.CONFIGS["mixtral"], FusedForm(4, 64, 128)),
    "gpt_oss": (tiny_models.gpt_oss, FusedForm(4, 64, 128, interleaved=True, transposed=True, biased=True)),
    "llama4_text": (
        lambda: hf.Llama4TextConfig(
            **tiny_models._GQA | {"intermediate_size": 32, "tie_word_embeddings": False},
            intermediate_size_mlp=64,
            num_local_experts=4,
            num_experts_per_tok=2,
            head_dim=16,
        ),
        FusedForm(4, 64, 32, transposed=True, handed="batched"),
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


@torch.no_grad()
@pytest.mark.parametrize(
    ("kind", "sizes", "forms"),
    [
        (  # an expert of attention, and one of its MLP, are two matrices that its own code hands their rows
            "jetmoe",
            {},
            {
                "mlp.input_linear": FusedForm(4, 64, 256, gated=False, handed="split"),
                "mlp.output_linear": FusedForm(4, 128, 64, gated=False, handed="split"),
                "self_attention.experts.input_linear": FusedForm(4, 64, 32, gated=False, handed="split"),
                "self_attention.experts.output_linear": FusedForm(4, 32, 64, gated=False, handed="split"),
            },
        ),
        (  # beside routed ones
            "inkling_text",
            {"n_shared_experts": 2},
            {
                "mlp.shared_experts": FusedForm(2, 64, 32, parted=True, handed="shared"),
                "mlp.experts": FusedForm(4, 64, 32),
            },
        ),
    ],
)
def test_experts_told_by_what_they_compute(kind: str, sizes: dict[str, int], forms: dict[str, FusedForm]) -> None:
    config = zoo_models.config_of(kind, "causal")
    for name, size in sizes.items():
        setattr(config, name, size)
    torch.manual_seed(0)
    model: Any = zoo_models.model_class(kind, "causal")(config).eval()
    for parameter in model.parameters():
        parameter.copy_(0.1 * torch.randn_like(parameter))
    ids = zoo_models.tokens(config=config)
    expected = model(ids).logits
    apart, mixtures = _apart(model)
    torch.testing.assert_close(apart(ids).logits, expected, rtol=1e-4, atol=1e-5)
    assert {path.split(".", 3)[3]: mixture.form for path, mixture in mixtures.items()} == forms


@torch.no_grad()
def test_inputs_of_experts_that_are_handed_their_rows() -> None:
    """Their walk: each expert's rows before its matrix, and what shared experts read in both stages."""
    weight = torch.randn(2, 3, 4)
    split: Any = _with_linears(_Split(weight), [{"linear": one} for one in weight])
    seen: list[tuple[int, list[torch.Tensor]]] = []
    split.before_stage = lambda stage, inputs: seen.append((stage, inputs))
    x = torch.randn(5, 4)
    torch.testing.assert_close(split(x, torch.tensor([2, 3])), _Split(weight)(x, [2, 3]))
    assert len(seen) == 1 and seen[0][0] == 0 and torch.equal(torch.cat(seen[0][1]), x)
    assert [len(rows) for rows in seen[0][1]] == [2, 3]

    seen.clear()
    gate, up, down = torch.randn(2, 3, 4), torch.randn(2, 3, 4), torch.randn(2, 4, 3)
    linears: list[dict[str, torch.Tensor]] = [
        {"gate_proj": one[0], "up_proj": one[1], "down_proj": one[2]} for one in zip(gate, up, down, strict=True)
    ]
    shared: Any = _with_linears(_Shared(gate, up, down), linears)
    shared.before_stage = lambda stage, inputs: seen.append((stage, inputs))
    x, weights = torch.randn(1, 5, 4), torch.rand(1, 5, 2)
    torch.testing.assert_close(shared(x, gammas=weights), _Shared(gate, up, down)(x, weights))
    assert [stage for stage, _ in seen] == [0, 1] and all(torch.equal(read, x[0]) for read in seen[0][1])
    inner = torch.relu(x[0] @ gate[1].T) * (x[0] @ up[1].T) * weights[0, :, 1:]
    torch.testing.assert_close(seen[1][1][1], inner)


class _Split(nn.Module):
    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)

    def forward(self, x: torch.Tensor, sizes: list[int]) -> torch.Tensor:
        return torch.cat([part @ one.T for part, one in zip(x.split(sizes), self.weight, strict=True)])


class _Scaled(_Split):
    def forward(self, x: torch.Tensor, sizes: list[int]) -> torch.Tensor:
        return 2 * super().forward(x, sizes)


class _Shared(nn.Module):
    def __init__(self, gate: torch.Tensor, up: torch.Tensor, down: torch.Tensor) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = (nn.Parameter(w, requires_grad=False) for w in (gate, up, down))
        self.act_fn = nn.ReLU()

    def forward(self, x: torch.Tensor, gammas: torch.Tensor) -> torch.Tensor:
        inner = self.act_fn(torch.einsum("bth,eih->ebti", x, self.gate_proj))
        inner = inner * torch.einsum("bth,eih->ebti", x, self.up_proj) * gammas.permute(2, 0, 1)[..., None]
        return torch.einsum("ebti,ehi->bth", inner, self.down_proj)


class _Unweighted(_Shared):
    def forward(self, x: torch.Tensor, gammas: torch.Tensor) -> torch.Tensor:
        return super().forward(x, torch.ones_like(gammas))


def _with_linears(module: nn.Module, weights: Sequence[Mapping[str, torch.Tensor]]) -> nn.Module:
    """The module's experts apart, each with these weights."""
    holder = nn.ModuleDict({"experts": module})
    assert unfuse_experts(holder)
    for expert, leaves in enumerate(weights):
        for leaf, weight in leaves.items():
            linear: Any = holder.get_submodule(f"experts.{expert}.{leaf}")
            linear.weight = nn.Parameter(weight, requires_grad=False)
    return holder["experts"]


def test_modules_that_compute_something_else_have_no_form() -> None:
    matrices = torch.zeros(2, 3, 4), torch.zeros(2, 3, 4), torch.zeros(2, 4, 3)
    assert form_of(_Split(matrices[0])) is not None and form_of(_Shared(*matrices)) is not None
    assert form_of(_Scaled(matrices[0])) is None and form_of(_Unweighted(*matrices)) is None
    assert form_of(nn.Conv1d(3, 2, 4, bias=False)) is None
    assert form_of(_Shared(matrices[0], torch.zeros(2, 5, 4), matrices[2])) is None
    with torch.device("meta"):  # under which transformers loads
        assert form_of(_Split(matrices[0])) is not None


def _fused(**tensors: torch.Tensor) -> nn.Module:
    module = nn.Module()
    for name, tensor in tensors.items():
        module.register_parameter(name, nn.Parameter(tensor, requires_grad=False))
    return module


def test_what_holds_no_experts_has_no_form() -> None:
    assert form_of(nn.Linear(3, 4)) is None and form_of(nn.Embedding(3, 4)) is None
    assert form_of(_fused(down_proj=torch.zeros(2, 3, 4))) is None
    assert form_of(_fused(down_proj=torch.zeros(3, 4), gate_up_proj=torch.zeros(8, 3))) is None
    # Without a gate shapes do not tell which side is which, nor whether there is more.
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
