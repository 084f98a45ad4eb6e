"""Names and layouts of checkpoints that are not the modules': every tensor of the model read through transformers' own
conversion mapping equals what transformers wrote, and the rows of stored tensors are found."""

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
import transformers as hf
import zoo_models
from described_tensors import Shaped, described, empty, saved

from leangrid.models.conversion import Conversion, _Converted

# A type for each kind of conversion: none, renamed with a prefix inside, experts merged, fused projections cut in equal
# and in unequal parts, rotary pairs, gate and up in turn, experts transposed, experts of text and pictures together,
# convolutions one after the other.
TYPES = [
    ("llama", "causal"),
    ("gemma3", "image-text"),
    ("mixtral", "causal"),
    ("hrm_text", "causal"),
    ("molmo2", "image-text"),
    ("step3p7", "image-text"),
    ("inkling_mm_model", "image-text"),
    ("qwen3_vl_moe", "image-text"),
    ("ernie4_5_vl_moe", "image-text"),
    ("kimi_linear", "causal"),
    ("nomic_bert", "encoder"),
]


def missing(model: hf.PreTrainedModel, conversion: Conversion) -> list[str]:
    tied = set(model.all_tied_weights_keys)
    return [name for name in model.state_dict() if name not in conversion.sources and name not in tied]


@pytest.mark.parametrize(("kind", "family"), TYPES, ids=[kind for kind, _ in TYPES])
def test_every_tensor_is_read_as_the_model_has_it(kind: str, family: str, tmp_path: Path) -> None:
    model = zoo_models.build(kind, family)
    twin = empty(model)
    stored = saved(model, tmp_path)
    conversion = Conversion(twin, described(stored))
    assert not missing(model, conversion) and not conversion.unread and not conversion.failed
    for name, value in model.state_dict().items():
        if name not in conversion.sources:
            continue
        assert conversion.shapes[name] == tuple(value.shape)
        assert torch.equal(conversion.read(name, stored.__getitem__), value), name
        placed = conversion.placements(name)
        assert placed is not None, name
        rebuilt = torch.full_like(value, float("nan")) if value.is_floating_point() else torch.zeros_like(value)
        for one in placed if value.ndim else ():
            one.put(stored[one.stored], rebuilt)
        assert not value.ndim or torch.equal(rebuilt, value), name


@pytest.mark.parametrize("kind", ["llama", "mixtral", "deepseek_v3", "qwen3_next"])
def test_a_checkpoint_of_the_base_class_has_the_base_model(kind: str, tmp_path: Path) -> None:
    model = zoo_models.build(kind, "causal")
    twin = empty(model)
    body: hf.PreTrainedModel = model.base_model  # pyright: ignore[reportAssignmentType]
    stored = saved(body, tmp_path)
    assert not any(name.startswith("model.") for name in stored)
    conversion = Conversion(twin, described(stored))
    assert set(missing(model, conversion)) <= {"lm_head.weight"} and not conversion.unread
    values = model.state_dict()
    assert all(torch.equal(conversion.read(name, stored.__getitem__), values[name]) for name in conversion.sources)


def test_names_of_the_modules_are_read_as_they_are(tmp_path: Path) -> None:
    model = zoo_models.build("mixtral", "causal")
    conversion = Conversion(empty(model), described(model.state_dict()))
    assert all(source.stored == (name,) and not source.converted for name, source in conversion.sources.items())
    assert not missing(model, conversion)


def test_rows_of_a_fused_projection_are_found(tmp_path: Path) -> None:
    """q, k and v of Molmo2 are unequal parts of one stored matrix, and gate is its other half."""
    model = zoo_models.build("molmo2", "image-text")
    twin = empty(model)
    stored = saved(model, tmp_path)
    conversion = Conversion(twin, described(stored))
    attention = "model.language_model.layers.0.self_attn."
    names = [f"{attention}{one}_proj.weight" for one in "qkv"]
    fused = conversion.sources[names[0]].stored
    assert len(fused) == 1 and conversion.made_of(fused[0]) == tuple(names)
    ends = []
    for name in names:
        found = conversion.placements(name)
        assert found is not None and len(found) == 1
        (rows, columns), place = found[0].taken, found[0]
        assert place.stored == fused[0] and place.order == (0, 1) and len(columns) == stored[fused[0]].shape[1]
        assert torch.equal(model.get_parameter(name)[place.at[0]], stored[fused[0]][rows])
        ends.append((int(rows[0]), int(rows[-1]) + 1))
    assert ends[0][1] == ends[1][0] and ends[1][1] == ends[2][0] and ends[2][1] == len(stored[fused[0]])
    assert conversion.stored_module_name(names[0].removesuffix(".weight")) is None


def test_the_matrices_of_experts_are_found(tmp_path: Path) -> None:
    model = zoo_models.build("mixtral", "causal")
    twin = empty(model)
    stored = saved(model, tmp_path)
    conversion = Conversion(twin, described(stored))
    experts = "model.layers.1.mlp.experts."
    disk = "model.layers.1.block_sparse_moe.experts."
    parts = conversion.expert_parts(f"{experts}gate_up_proj")
    assert parts is not None and {(part.expert, part.part): part.stored for part in parts} == {
        (expert, part): f"{disk}{expert}.{'w1' if part == 0 else 'w3'}.weight" for expert in range(4) for part in (0, 1)
    }
    assert not any(part.transposed for part in parts) and int(parts[1].rows[0]) == len(parts[0].rows)
    down = conversion.expert_parts(f"{experts}down_proj") or ()
    assert [part.stored for part in down] == [f"{disk}{expert}.w2.weight" for expert in range(4)]
    assert conversion.expert_parts("model.layers.1.self_attn.q_proj.weight") is None


def test_modules_have_the_checkpoints_names(tmp_path: Path) -> None:
    model = zoo_models.build("gemma3", "image-text")
    twin = empty(model)
    conversion = Conversion(twin, described(saved(model, tmp_path)))
    ours, disk = "model.language_model.layers.0.mlp.down_proj", "language_model.model.layers.0.mlp.down_proj"
    assert conversion.stored_module_name(ours) == disk and conversion.rename_to_module(disk) == ours
    assert conversion.stored_module_name("model.no.such.module") is None


def test_a_transposed_matrix_has_its_axes_in_turn(tmp_path: Path) -> None:
    model = zoo_models.build("ernie4_5_vl_moe", "image-text")
    twin = empty(model)
    stored = saved(model, tmp_path)
    conversion = Conversion(twin, described(stored))
    name = next(name for name, source in conversion.sources.items() if source.operations == ("Transpose",))
    (place,) = conversion.placements(name) or ()
    assert place.order == (1, 0) and torch.equal(stored[place.stored].T, model.get_parameter(name))


def test_an_expert_too_few_has_another_shape_and_half_an_expert_fails(tmp_path: Path) -> None:
    model = zoo_models.build("mixtral", "causal")
    twin = empty(model)
    stored = described(saved(model, tmp_path))
    fewer = {name: one for name, one in stored.items() if ".experts.3." not in name}
    conversion = Conversion(twin, fewer)
    name = "model.layers.0.mlp.experts.down_proj"
    assert conversion.shapes[name][0] == 3 and twin.get_parameter(name).shape[0] == 4
    other = dict(stored)
    other["model.layers.0.block_sparse_moe.experts.2.w2.weight"] = Shaped((1, 2), "F32")
    failed = Conversion(twin, other).failed
    assert list(failed) == [name] and "w2.weight' and 3 more cannot be converted (MergeModulelist)" in failed[name]


def test_of_45000_tensors_those_of_one_block_are_converted(monkeypatch: pytest.MonkeyPatch) -> None:
    """The names of DeepSeek-V3: 58 layers of 256 experts. What its blocks have in common is worked out once."""
    converted: list[str] = []
    convert = _Converted.convert

    def counted(self: _Converted, tensors: Sequence[torch.Tensor]) -> dict[str, torch.Tensor]:
        converted.append(self.target)
        return convert(self, tensors)

    monkeypatch.setattr(_Converted, "convert", counted)
    config = hf.DeepseekV3Config()
    with torch.device("meta"):
        model = hf.DeepseekV3ForCausalLM(config)
    stored: dict[str, Shaped] = {}
    for name, value in model.state_dict().items():
        owner, _, leaf = name.rpartition(".")
        shape = tuple(value.shape)
        parts = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}.get(leaf, ())
        for expert in range(shape[0] if parts else 0):
            for part in parts:
                stored[f"{owner}.{expert}.{part}.weight"] = Shaped((shape[1] // len(parts), shape[2]), "BF16")
        if not parts:
            stored[name] = Shaped(shape, "BF16")
    conversion = Conversion(model, stored)
    assert len(converted) == 2
    parts = [conversion.expert_parts(f"model.layers.{block}.mlp.experts.gate_up_proj") for block in (3, 60)]
    assert not conversion.unread and len(conversion.sources) == len(model.state_dict())
    assert [len(each or ()) for each in parts] == [512, 512] and len(converted) == 3
