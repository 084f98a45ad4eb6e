"""Row O11 of the fault table: what our own reader does wrong, on both sides of the gate, is seen by it
(gate/original.py)."""

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf_models
import pytest
import tiny_models
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from leangrid.gate import side_by_side
from leangrid.models import skeleton as skeletons
from leangrid.models.original import open_original, tensors_of
from leangrid.models.skeleton import Skeleton
from leangrid.recipe import Recipe
from leangrid.run import inputs, publish
from leangrid.run.quantize import quantize
from leangrid.run.result import QuantizeResult
from leangrid.storage.source import Checkpoint, open_source

Tiny = Callable[..., Path]
WINDOWS = tiny_models.tokens(4, 48)
EVERY = (*tiny_models.NAMES, *tiny_models.MIXTURES)
pytestmark = [pytest.mark.fault("O11"), pytest.mark.filterwarnings("ignore:leangrid runs without its C")]


def quantized(source: Path, tmp_path: Path, scheme: str = "NU4") -> QuantizeResult:
    result = quantize(source, tmp_path / "out", Recipe(scheme=scheme, steps=1), windows=WINDOWS)
    assert json.loads((tmp_path / "out/manifest.json").read_text())["quality"].get("error") == result.quality.get(
        "error"
    )
    return result


def opened(source: Path, dtype: torch.dtype = torch.float32) -> Skeleton:
    return Skeleton(open_source(source), dtype)


def tied_with_another_head(source: Path, directory: Path) -> Path:
    directory.mkdir()
    for file in source.iterdir():
        (directory / file.name).write_bytes(file.read_bytes())
    tensors = load_file(directory / "model.safetensors")
    head = torch.randn(tiny_models.VOCAB, tiny_models.HIDDEN, generator=torch.Generator().manual_seed(9)) * 0.2
    save_file(tensors | {"lm_head.weight": head}, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


def test_a_stored_head_that_is_thrown_away_ends_with_4(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tied_with_another_head(tiny("llama3_tied"), tmp_path / "source")
    assert quantized(source, tmp_path).exit_code == 0
    monkeypatch.setattr(
        Checkpoint, "tensors_equal", lambda *_: True
    )  # the fault of issue 16: the config's word is taken for it
    result = quantize(source, tmp_path / "out", Recipe(scheme="NU4", steps=1), windows=WINDOWS, overwrite=True)
    assert result.exit_code == 4 and "otherwise than transformers: lm_head.weight is another" in result.quality["error"]


def _without_rope(directory: Path) -> None:
    config = json.loads((directory / "config.json").read_text())
    assert config["rope_parameters"].pop("factor") == 4.0
    config["rope_parameters"]["rope_type"] = "default"
    (directory / "config.json").write_text(json.dumps(config))


def _without_biases(directory: Path) -> None:
    config = json.loads((directory / "config.json").read_text())
    config["attention_bias"] = False
    (directory / "config.json").write_text(json.dumps(config))
    for shard in directory.glob("*.safetensors"):
        kept = {name: tensor for name, tensor in load_file(shard).items() if not name.endswith(".bias")}
        save_file(kept, shard, metadata={"format": "pt"})
    for index in directory.glob("*.index.json"):
        listed = json.loads(index.read_text())
        listed["weight_map"] = {
            name: shard for name, shard in listed["weight_map"].items() if not name.endswith(".bias")
        }
        index.write_text(json.dumps(listed))


@pytest.mark.parametrize(("lost", "said"), [(None, ""), (_without_rope, "rotary"), (_without_biases, "bias")])
def test_what_the_gguf_importer_drops_ends_with_4(
    lost: Any, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rope = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}
    given = {**tiny_models.CONFIGS["llama2"]().to_dict(), "rope_parameters": rope, "attention_bias": True}
    config = type(tiny_models.CONFIGS["llama2"]()).from_dict(given)
    fields = {"rope.scaling.type": "linear", "rope.scaling.factor": 4.0}
    gguf_models.write(tmp_path / "m.gguf", gguf_models.build(config), fields=fields)
    real = inputs.dequantize

    def dequantize(path: Path, directory: Path) -> Any:
        dtype = real(path, directory)
        lost(directory)
        return dtype

    if lost is not None:
        monkeypatch.setattr(inputs, "dequantize", dequantize)
    result = quantized(tmp_path / "m.gguf", tmp_path)
    if lost is None:
        assert result.exit_code == 0, result.quality
    else:
        assert result.exit_code == 4 and ".gguf" in result.quality["error"] and said in result.quality["error"].lower()


def _other_values(monkeypatch: pytest.MonkeyPatch, _source: Path) -> str:
    real = Skeleton.read

    def stored(self: Skeleton, name: str) -> Tensor:
        return real(self, name).roll(1, 0) if name.endswith("layers.1.self_attn.o_proj.weight") else real(self, name)

    monkeypatch.setattr(Skeleton, "read", stored)
    return "model.layers.1.self_attn.o_proj.weight is another"


def _other_config(monkeypatch: pytest.MonkeyPatch, _source: Path) -> str:
    real = skeletons.read_model_config

    def read(checkpoint: Any) -> Any:
        config: Any = real(checkpoint)
        config.rope_parameters = {"rope_type": "default", "rope_theta": 777.0}
        return config

    monkeypatch.setattr(skeletons, "read_model_config", read)
    return "inv_freq is another"


def _other_pass(monkeypatch: pytest.MonkeyPatch, _source: Path) -> str:
    real = side_by_side._Walker.through

    def through(self: Any, index: int, block: torch.nn.Module) -> None:
        real(self, index, block)
        self._states = [1.1 * hidden.roll(1, -1) for hidden in self._states]

    monkeypatch.setattr(side_by_side._Walker, "through", through)
    return "its outputs differ by"


@pytest.mark.parametrize(
    ("fault", "name"),
    [(_other_values, "llama3"), (_other_config, "llama3"), (_other_pass, "llama3"), (_other_values, "mixtral")],
)
def test_a_fault_that_both_walks_share_ends_with_4(
    fault: Any, name: str, tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = fault(monkeypatch, tiny(name))
    result = quantized(tiny(name), tmp_path)
    assert (
        result.exit_code == 4
        and said in result.quality["error"]
        and "otherwise than transformers" in result.quality["error"]
    )


@pytest.mark.parametrize("kind", ["lone shard", "index without metadata", "other name", "adapter beside", "code"])
def test_transformers_finds_what_our_reader_accepts(kind: str, tiny: Tiny, tmp_path: Path) -> None:
    directory = tmp_path / "m"
    directory.mkdir()
    for file in tiny("llama3", sharded=kind == "index without metadata").iterdir():
        (directory / file.name).write_bytes(file.read_bytes())
    single, config = directory / "model.safetensors", json.loads((directory / "config.json").read_text())
    if kind == "lone shard":
        single.rename(directory / "model-00001-of-00001.safetensors")
    elif kind == "other name":
        single.rename(directory / "weights.safetensors")
    elif kind == "index without metadata":
        index = directory / "model.safetensors.index.json"
        index.write_text(json.dumps({"weight_map": json.loads(index.read_text())["weight_map"]}))
    elif kind == "adapter beside":
        (directory / "adapter_config.json").write_text(
            '{"base_model_name_or_path": "nobody/nothing", "peft_type": "LORA"}'
        )
    else:
        (directory / "config.json").write_text(
            json.dumps(config | {"auto_map": {"AutoModelForCausalLM": "stranger.Model"}})
        )
        (directory / "stranger.py").write_text(f"open({str(tmp_path / 'CANARY')!r}, 'w')")
    source = open_source(directory)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model, unexpected = open_original(source, type(Skeleton(source).model))
    wanted = dict(tiny_models.build("llama3").named_parameters())
    found = dict(tensors_of(model))
    assert unexpected == [] and not (tmp_path / "CANARY").exists()
    assert all(torch.equal(found[name], tensor) for name, tensor in wanted.items())


def test_a_source_that_transformers_cannot_open_ends_with_4(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_: Any, **__: Any) -> Any:
        raise ValueError("what only transformers knows")

    real = publish.judge_result

    def judge(original: Skeleton, *rest: Any) -> Any:
        monkeypatch.setattr(type(original.model), "from_pretrained", refused)
        return real(original, *rest)

    monkeypatch.setattr(publish, "judge_result", judge)
    result = quantized(tiny("llama2"), tmp_path)
    assert result.exit_code == 4 and "what only transformers knows" in result.quality["error"]
