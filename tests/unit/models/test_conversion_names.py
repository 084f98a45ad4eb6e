"""Names in compressed-tensors results: plain transformers finds every tensor under them, with its own quantizer's
mapping."""

from pathlib import Path

import pytest
import torch
import transformers as hf
import zoo_models
from described_tensors import described, empty, saved

from leangrid.models.conversion import Conversion
from leangrid.models.conversion_names import Kept, ResultNames, experts_apart
from leangrid.schemes import Scheme

SYMMETRIC, ASYMMETRIC = Scheme.parse("W4A16_SYM"), Scheme.parse("W4A16")


def conversion_of(kind: str, family: str, directory: Path) -> Conversion:
    model = zoo_models.build(kind, family)
    twin = empty(model)
    return Conversion(twin, described(saved(model, directory)))


@pytest.mark.parametrize(
    ("kind", "family", "module", "name"),
    [
        ("llama", "causal", "model.layers.0.mlp.up_proj", "model.layers.0.mlp.up_proj"),
        # the source's name where only the path is another
        (
            "gemma3",
            "image-text",
            "model.language_model.layers.0.mlp.down_proj",
            "language_model.model.layers.0.mlp.down_proj",
        ),
        # the module's where it is cut from another tensor
        ("hrm_text", "causal", "model.H_module.layers.0.mlp.up_proj", "model.H_module.layers.0.mlp.up_proj"),
    ],
)
def test_packed_linears(kind: str, family: str, module: str, name: str, tmp_path: Path) -> None:
    conversion = conversion_of(kind, family, tmp_path)
    if f"{module}.weight" not in conversion.sources:
        module = name = next(
            one.removesuffix(".weight") for one in conversion.sources if one.endswith("mlp.up_proj.weight")
        )
    assert ResultNames(conversion).packed(module) == name


def takes_experts(conversion: Conversion, experts: str) -> list[bool]:
    """Whether transformers takes each matrix of the experts at this path, packed under the source's name."""
    found = [conversion.expert_parts(f"{experts}.{leaf}") or () for leaf in ("gate_up_proj", "down_proj")]
    names = [part.stored.removesuffix(".weight") for parts in found for part in parts]
    return [ResultNames(conversion).takes_expert(name, experts) for name in names]


def test_packed_experts_are_found_under_the_sources_names(tmp_path: Path) -> None:
    conversion = conversion_of("mixtral", "causal", tmp_path)
    taken = takes_experts(conversion, "model.layers.0.mlp.experts")
    assert len(taken) == 3 * 4 and all(taken)
    assert not ResultNames(conversion).takes_expert("model.layers.0.self_attn.q_proj", "model.layers.0.mlp.experts")


def test_experts_that_transformers_cannot_unpack_are_not_found(tmp_path: Path) -> None:
    """ERNIE's text and picture experts are split after they are unpacked as one tensor."""
    conversion = conversion_of("ernie4_5_vl_moe", "image-text", tmp_path)
    experts = next(one for one in conversion.sources if one.endswith("text_moe.experts.down_proj")).rpartition(".")[0]
    taken = takes_experts(conversion, experts)
    assert taken and not any(taken)


def test_what_a_converter_merges_is_kept_as_the_module_has_it(tmp_path: Path) -> None:
    """Kimi-Linear's three convolutions: beside packed tensors, transformers drops dense ones of such a converter."""
    names = ResultNames(conversion_of("kimi_linear", "causal", tmp_path))
    convolution = "model.layers.0.self_attn.conv1d.weight"
    assert names.kept(convolution) == Kept((convolution,), False)
    norm = "model.norm.weight"
    assert names.kept(norm) == Kept((norm,), True)


def test_a_fused_tensor_is_kept_whole_only_if_no_part_of_it_is_packed(tmp_path: Path) -> None:
    conversion = conversion_of("nomic_bert", "encoder", tmp_path)
    names = ResultNames(conversion)
    query, value = (f"layers.0.self_attn.{one}_proj" for one in "qv")
    kept = names.kept(f"{value}.weight")
    assert kept is not None and kept.as_stored and conversion.made_of(kept.names[0])[0] == f"{query}.weight"
    assert names.kept(f"{value}.weight", {query}) == Kept((f"{value}.weight",), False)


@pytest.mark.parametrize(
    ("kind", "family", "linears", "experts", "obstacle"),
    [
        ("mixtral", "causal", [SYMMETRIC], [SYMMETRIC], None),
        ("mixtral", "causal", [ASYMMETRIC], [SYMMETRIC], None),
        ("mixtral", "causal", [SYMMETRIC], [ASYMMETRIC], "no zero points of experts"),
        ("mixtral", "causal", [ASYMMETRIC, SYMMETRIC], [SYMMETRIC], "zero points only where"),
        ("mixtral", "causal", [], [SYMMETRIC, Scheme.parse("W8A16_SYM")], "one scheme for all experts"),
        ("llama", "causal", [ASYMMETRIC, SYMMETRIC], [], "zero points only where"),
        ("llama", "causal", [SYMMETRIC, Scheme.parse("W8A16_SYM")], [], None),
        ("hrm_text", "causal", [ASYMMETRIC], [], "none is cut from another"),
        ("qianfan_ocr", "image-text", [SYMMETRIC], [], "cannot cut 'attn.qkv.weight' apart"),
    ],
)
def test_what_plain_transformers_does_not_open_is_said(
    kind: str, family: str, linears: list[Scheme], experts: list[Scheme], obstacle: str | None, tmp_path: Path
) -> None:
    names = ResultNames(conversion_of(kind, family, tmp_path))
    said = names.obstacle({f"model.layers.{i}.mlp.up_proj": scheme for i, scheme in enumerate(linears)}, experts)
    assert said == obstacle if obstacle is None else said is not None and obstacle in said


def test_a_model_whose_fused_projections_are_packed_opens_without_dequantize(tmp_path: Path) -> None:
    conversion = conversion_of("hrm_text", "causal", tmp_path)
    names = ResultNames(conversion)
    packed = [one.removesuffix(".weight") for one in conversion.sources if one.endswith("_proj.weight")]
    assert names.obstacle(dict.fromkeys(packed, SYMMETRIC)) is None and not names.dequantize([SYMMETRIC])


def test_experts_that_transformers_replaces_when_it_opens_a_result() -> None:
    config = hf.Llama4TextConfig(hidden_size=64, intermediate_size=64, num_local_experts=2)
    with torch.device("meta"):
        experts = hf.models.llama4.modeling_llama4.Llama4TextExperts(config)
    assert experts_apart(experts) is not None and experts_apart(torch.nn.Linear(2, 2)) is None
