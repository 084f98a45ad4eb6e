"""What people give instead of a checkpoint is refused with a message that names it, before anything is written."""

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
import transformers as hf
from safetensors.torch import load_file, save_file

import leangrid
from leangrid.errors import ArchitectureError, CheckpointError, LeangridError
from leangrid.evaluation.opened import load_model
from leangrid.inference.load import load
from leangrid.models.skeleton import Skeleton
from leangrid.models.tokenizer import load_tokenizer
from leangrid.storage.source import open_source

pytestmark = pytest.mark.fault("S16")
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:" + "ab" * 32 + "\nsize 250000\n"
Tensors = dict[str, torch.Tensor]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return tiny_models.save("llama2", tmp_path / "source", torch.bfloat16)


def refused(source: Path, *words: str) -> str:
    """The message with which every command refuses it; nothing is written, and no weights are read."""
    out = source.parent / "out"
    began = time.process_time()
    with pytest.raises((CheckpointError, ArchitectureError)) as caught:
        leangrid.quantize(source, out, leangrid.Recipe(scheme="W8A16", calibration="embedded", samples=2, length=32))
    assert time.process_time() - began < 5, "a refusal waits for nothing"
    message = str(caught.value)
    assert (
        not out.exists()
        and not out.with_name("out.partial").exists()
        and "\n" not in message
        and caught.value.exit_code == 2
    )
    for word in words:
        assert word.lower() in message.lower(), message
    with pytest.raises((CheckpointError, ArchitectureError)):
        load(source)
    return message


def change(source: Path, edit: Callable[[Tensors], None], **config: object) -> None:
    tensors = load_file(source / "model.safetensors")
    edit(tensors)
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    path = source / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))


@pytest.mark.parametrize(
    "name",
    [
        "model.safetensors",
        "config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "generation_config.json",
        "chat_template.jinja",
    ],
)
def test_a_git_lfs_pointer_in_place_of_a_file(source: Path, name: str) -> None:
    (source / name).write_text(POINTER)
    refused(source, "Git LFS pointer", name, "git lfs pull")


def test_a_git_lfs_pointer_in_place_of_the_index_or_of_one_shard(tmp_path: Path) -> None:
    for name in ("model.safetensors.index.json", "model-00002-of-00005.safetensors"):
        source = tiny_models.save("llama2", tmp_path / name, torch.bfloat16, sharded=True)
        shard = sorted(source.glob("model-00002-*"))[0]
        (source / name if name.endswith(".json") else shard).write_text(POINTER)
        refused(source, "Git LFS pointer")


def test_the_tokenizer_is_asked_for_pointers_wherever_it_is_opened(source: Path) -> None:
    (source / "tokenizer.json").write_text(POINTER)
    with pytest.raises(CheckpointError, match="Git LFS pointer"):
        load_tokenizer(source)


@pytest.mark.parametrize("with_config", [True, False])
def test_a_lora_directory(source: Path, with_config: bool) -> None:
    (source / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA"}))
    save_file(
        {"base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight": torch.ones(4, 64)},
        source / "adapter_model.safetensors",
    )
    (source / "model.safetensors").unlink()
    if not with_config:
        (source / "config.json").unlink()
    refused(source, "LoRA adapter", "Merge")


def test_a_lora_beside_the_weights_is_left_out_aloud(source: Path) -> None:
    expected = Skeleton(open_source(source)).parameter_names()
    save_file({"a.lora_A.weight": torch.ones(4, 64)}, source / "adapter_model.safetensors")
    (source / "adapter_config.json").write_text("{}")
    checkpoint = open_source(source)
    assert Skeleton(checkpoint).parameter_names() == expected
    assert any("adapter" in notice for notice in checkpoint.notices)


def _gptq(tensors: Tensors) -> None:
    for name in [name for name in tensors if "proj" in name]:
        rows, cols = tensors.pop(name).shape
        owner = name.removesuffix(".weight")
        tensors |= {
            f"{owner}.qweight": torch.zeros(cols // 8, rows, dtype=torch.int32),
            f"{owner}.scales": torch.ones(1, rows).half(),
        }


def _mlx(tensors: Tensors) -> None:
    for name in [name for name in tensors if "proj" in name]:
        rows, cols = tensors[name].shape
        tensors[name] = torch.zeros(rows, cols // 8, dtype=torch.uint32)
        tensors |= {
            f"{name.removesuffix('.weight')}.{end}": torch.ones(rows, cols // 64) for end in ("scales", "biases")
        }


def _bitsandbytes(tensors: Tensors) -> None:
    for name in [name for name in tensors if "proj" in name]:
        count = tensors[name].numel()
        tensors |= {name: torch.zeros(count // 2, 1, dtype=torch.uint8), f"{name}.absmax": torch.ones(count // 64)}


def _fp8(tensors: Tensors) -> None:
    tensors |= {
        name: tensor.to(torch.float8_e4m3fn)
        for name, tensor in tensors.items()
        if "layers.1" in name and "proj" in name
    }


def _scaled_fp8(tensors: Tensors) -> None:
    _fp8(tensors)
    tensors |= {f"{name}_scale_inv": torch.ones(1, 1) for name in list(tensors) if "proj" in name}


def _int8(tensors: Tensors) -> None:
    tensors |= {
        name: (tensor * 99).to(torch.int8) for name, tensor in tensors.items() if "layers.1" in name and "proj" in name
    }


@pytest.mark.parametrize(
    ("edit", "told"),
    [
        (_gptq, "GPTQ"),
        (_mlx, "MLX"),
        (_bitsandbytes, "bitsandbytes"),
        (_fp8, "fp8"),
        (_scaled_fp8, "fp8"),
        (_int8, "I8"),
    ],
)
def test_quantized_weights_whose_config_does_not_say_so(
    source: Path, edit: Callable[[Tensors], None], told: str
) -> None:
    change(source, edit)
    refused(source, "quantized", told)


@pytest.mark.parametrize(
    ("end", "dtype"), [("weight", torch.uint8), ("int_weight", torch.int8), ("codes", torch.int32)]
)
def test_integer_matrices_of_a_quantizer_that_nobody_knows(source: Path, end: str, dtype: torch.dtype) -> None:
    def edit(tensors: Tensors) -> None:
        for name in [name for name in tensors if "up_proj" in name]:
            tensors[name.removesuffix("weight") + end] = torch.zeros(tensors.pop(name).shape[0], 32, dtype=dtype)

    change(source, edit)
    refused(source, "integers", "quantized")


@pytest.mark.parametrize("name", ["generation_config.json", "special_tokens_map.json", "added_tokens.json"])
def test_json_beside_the_weights_that_is_no_object(source: Path, name: str) -> None:
    (source / name).write_text("[]")
    with pytest.raises(CheckpointError, match=f"'{name}' is no JSON object"):
        leangrid.quantize(
            source, source.parent / "out", leangrid.Recipe(scheme="W8A16", calibration="embedded", samples=2, length=32)
        )
    assert not (source.parent / "out.partial").exists()


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "base_model.model.", "language_model.", "policy."])
def test_a_prefix_before_every_name_is_named(source: Path, prefix: str) -> None:
    def edit(tensors: Tensors) -> None:
        for name in list(tensors):
            tensors[prefix + name] = tensors.pop(name)

    change(source, edit)
    refused(source, f"'{prefix}'")


def test_a_fine_tune_saved_without_merging(source: Path) -> None:
    def edit(tensors: Tensors) -> None:
        name = "model.layers.0.self_attn.q_proj"
        tensors[f"{name}.base_layer.weight"] = tensors.pop(f"{name}.weight")
        tensors |= {
            f"{name}.lora_A.default.weight": torch.ones(4, 64),
            f"{name}.lora_B.default.weight": torch.ones(64, 4),
        }

    change(source, edit)
    refused(source, "LoRA", "Merge")


def test_a_few_of_the_missing_and_of_the_unexpected_names_are_shown(source: Path) -> None:
    def edit(tensors: Tensors) -> None:
        for name in [name for name in tensors if "proj" in name]:
            tensors[name.replace("_proj", "_linear")] = tensors.pop(name)

    change(source, edit)
    message = refused(
        source,
        "q_proj.weight is missing",
        "_linear.weight is not part of the model",
        "and 10 more missing",
        "and 10 more not part",
    )
    assert len(message) < 900


@pytest.mark.parametrize(("kind", "told"), [("walrus", "walrus"), ("mrope", "mrope"), ("su", "longrope")])
@pytest.mark.parametrize("key", ["type", "rope_type"])
def test_a_rotary_embedding_that_transformers_does_not_compute(source: Path, kind: str, told: str, key: str) -> None:
    change(source, lambda tensors: None, rope_parameters=None, rope_scaling={key: kind, "factor": 2.0})
    refused(source, "rope_scaling", told)


def test_the_way_out_of_a_directory_without_config(source: Path, tmp_path: Path) -> None:
    refused(tmp_path, "no config.json", str(source))
    (source / "config.json").unlink()
    (source / "a.GGUF").write_bytes(b"GGUF")
    refused(source, "no config.json", "a.GGUF")


def test_only_meta_s_own_format(source: Path) -> None:
    (source / "config.json").unlink()
    (source / "params.json").write_text("{}")
    refused(source, "own format")


@pytest.mark.parametrize("names", [("model-00001-of-00001.safetensors",), ("weights.safetensors",)])
def test_a_single_file_of_any_name_is_the_checkpoint(source: Path, names: tuple[str, ...]) -> None:
    expected = load(source)[0](tiny_models.tokens()).logits
    (source / "model.safetensors").rename(source / names[0])
    assert torch.equal(load(source)[0](tiny_models.tokens()).logits, expected)


def test_numbered_shards_without_an_index(tmp_path: Path) -> None:
    source = tiny_models.save("llama2", tmp_path / "source", torch.float32, sharded=True)
    expected = load(source)[0](tiny_models.tokens()).logits
    (source / "model.safetensors.index.json").unlink()
    assert torch.equal(load(source)[0](tiny_models.tokens()).logits, expected)
    sorted(source.glob("model-00003-*"))[0].unlink()
    refused(source, "missing", "model-00003")


def test_an_index_without_metadata(tmp_path: Path) -> None:
    source = tiny_models.save("llama2", tmp_path / "source", torch.float32, sharded=True)
    expected = load(source)[0](tiny_models.tokens()).logits
    path = source / "model.safetensors.index.json"
    path.write_text(json.dumps({"weight_map": json.loads(path.read_text())["weight_map"]}))
    assert torch.equal(load(source)[0](tiny_models.tokens()).logits, expected)


def test_a_checkpoint_with_auto_map_is_read_as_the_plain_model_of_its_type(source: Path) -> None:
    expected = load(source)[0](tiny_models.tokens()).logits
    canary = source.parent / "canary"
    (source / "evil.py").write_text(f"open({str(canary)!r}, 'w')\n")
    change(source, lambda tensors: None, auto_map={"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M"})
    assert torch.equal(load(source)[0](tiny_models.tokens()).logits, expected) and not canary.exists()


def test_a_gguf_file_and_a_hub_id_load_too(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """``load`` takes what ``quantize`` takes; the hub's cache is laid out as the hub's client does."""
    cache = source.parent / "hub"
    snapshot = cache / "models--org--name" / "snapshots" / ("a" * 40)
    snapshot.parent.mkdir(parents=True)
    shutil.copytree(source, snapshot)
    (cache / "models--org--name" / "refs").mkdir()
    (cache / "models--org--name" / "refs" / "main").write_text("a" * 40)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    model, tokenizer = load("org/name")
    assert isinstance(model, hf.LlamaForCausalLM) and tokenizer is not None


@pytest.mark.parametrize(
    ("kind", "told"), [("LORA", "LoRA adapter"), ("IA3", "IA3 adapter"), ("PROMPT_TUNING", "cannot be merged")]
)
def test_the_kind_of_an_adapter_is_named(source: Path, kind: str, told: str) -> None:
    (source / "model.safetensors").unlink()
    (source / "adapter_config.json").write_text(json.dumps({"peft_type": kind}))
    refused(source, "adapter", told)


@pytest.mark.parametrize("part", ["lora_magnitude_vector", "vera_lambda_b", "ia3_l", "oft_r"])
def test_tensors_of_every_kind_of_adapter_are_recognised(source: Path, part: str) -> None:
    name = f"model.layers.0.self_attn.q_proj.{part}.default.weight"
    change(source, lambda tensors: tensors.update({name: torch.ones(4)}))
    refused(source, "adapter", "Merge")


def test_an_empty_quantization_config(source: Path) -> None:
    change(source, lambda tensors: None, quantization_config={})
    refused(source, "empty quantization_config", "Remove")
    change(source, lambda tensors: None, quantization_config=None)
    assert load(source)[0] is not None


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"torch_dtype": "auto", "dtype": "auto"}, "'auto'"),
        ({"hidden_act": "swish_foo"}, "swish_foo"),
        ({"num_attention_heads": 3}, "heads"),
        ({"rope_parameters": {"rope_type": "linear", "factor": "4"}}, "rope_parameters.factor = 4"),
        ({"rope_parameters": {"rope_type": "linear", "factor": 0.0}}, "rope_parameters.factor = 0.0"),
    ],
)
def test_what_a_config_says_wrongly_is_named(source: Path, fields: dict[str, object], told: str) -> None:
    change(source, lambda tensors: None, **fields)
    refused(source, told)


def test_the_name_of_the_source_is_empty(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="name of the source is empty"):
        leangrid.quantize("", tmp_path / "out")


def test_a_model_of_nan_neither_answers_nor_measures(source: Path) -> None:
    change(source, lambda tensors: tensors["model.norm.weight"].fill_(float("nan")))
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight.*NaN"):
        load_model(source)


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("special_tokens_map.json", "{not json", "'special_tokens_map.json' is no JSON"),
        (
            "tokenizer_config.json",
            '{"auto_map": {"AutoTokenizer": ["ev.Tk", null]}, "tokenizer_class": "Tk"}',
            "code of its own",
        ),
        ("tokenizer_config.json", '{"auto_map": "ev.Tk", "tokenizer_class": "Tk"}', "code of its own"),
    ],
)
def test_the_file_of_a_tokenizer_that_is_at_fault_is_named(source: Path, name: str, content: str, told: str) -> None:
    (source / name).write_text(content)
    with pytest.raises(CheckpointError, match=told):
        load_tokenizer(source)


@pytest.mark.parametrize("wrong", [{"threads": 0}, {"threads": -2}, {"device": "cuda:9"}, {"device": "walrus"}])
def test_threads_and_devices_that_are_not_there(source: Path, wrong: dict[str, Any]) -> None:
    with pytest.raises(LeangridError, match=r"threads|CUDA|device"):
        leangrid.quantize(source, source.parent / "out", leangrid.Recipe(scheme="W8A16"), **wrong)
    assert not (source.parent / "out.partial").exists()
    if "device" in wrong:
        with pytest.raises(LeangridError, match=r"CUDA|device"):
            load(source, device=wrong["device"])


WRONG = """
import sys, leangrid
for wrong in ({"recipe": "W8A16"}, {"recipe": {"scheme": "NU4"}}, {"windows": [[1, 2]]}):
    try:
        leangrid.quantize(sys.argv[1], sys.argv[1] + "-out", **wrong)
    except leangrid.errors.LeangridError as error:
        print(type(error).__name__)
"""


def test_arguments_of_another_type_from_python(source: Path) -> None:
    """In a process of its own: here the tests' checks of types come first."""
    done = subprocess.run([sys.executable, "-c", WRONG, source], capture_output=True, text=True, check=False)
    assert done.stdout.split() == ["RecipeError", "RecipeError", "CalibrationError"], done.stderr[-500:]


def test_a_recipe_copied_past_its_door(source: Path) -> None:
    with pytest.raises(LeangridError, match="samples"):
        leangrid.quantize(source, source.parent / "out", leangrid.Recipe().model_copy(update={"samples": 0}))
    assert not (source.parent / "out.partial").exists()


def test_a_state_directory_that_cannot_be_made_leaves_nothing(source: Path) -> None:
    (source.parent / "file").write_text("")
    with pytest.raises(LeangridError):
        leangrid.quantize(
            source,
            source.parent / "out",
            leangrid.Recipe(scheme="W8A16"),
            windows=tiny_models.tokens(2, 32),
            state_dir=source.parent / "file",
        )
    assert not (source.parent / "out.partial").exists()


def test_pickled_weights_that_are_a_pointer(source: Path) -> None:
    (source / "model.safetensors").unlink()
    (source / "pytorch_model.bin").write_text(POINTER)
    refused(source, "Git LFS pointer")


def test_a_damaged_sentencepiece_model_is_named(source: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (source / name).unlink(missing_ok=True)
    (source / "tokenizer_config.json").write_text('{"tokenizer_class": "LlamaTokenizer"}')
    (source / "tokenizer.model").write_bytes(b"no model at all")
    with pytest.raises(CheckpointError, match=r"tokenizer\.model"):
        load_tokenizer(source)


def test_masks_of_old_checkpoints_are_no_quantized_weights(tmp_path: Path) -> None:
    source = tiny_models.save("gpt2", tmp_path / "source")
    change(
        source,
        lambda tensors: tensors.update({"transformer.h.0.attn.bias": torch.ones(1, 1, 8, 8, dtype=torch.uint8)}),
        n_embd=32,
    )
    assert "quantized" not in refused(source, "has shape")


def test_weights_that_are_a_broken_link(source: Path) -> None:
    (source / "model.safetensors").unlink()
    (source / "model.safetensors").symlink_to("nowhere")
    refused(source, "link to one that is not there")
