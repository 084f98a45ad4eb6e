"""One type in every container: what leangrid writes of a tiny source, judged by code that never imports leangrid.

python tests/support/zoo_exports.py [--only NAME ...] [--keep FOLDER] [FAMILY:]TYPE ...

What is judged of each directory (zoo_exporters.RUNS and EXPORTS), against the source and transformers:

* names: with the quantized weights unpacked by zoo_layouts, every tensor of the source is there under its own name, the
  others byte for byte;
* values: the source with these weights put in answers as leangrid.load of the affine result does;
* config: nothing of the source's config.json is lost, and the linears that stay are named where readers ask for it;
* opened: plain transformers opens what ``opened_in`` of the manifest says it opens, and nothing else;
* files: a GGUF file, or an ONNX model, answers as the affine result, where transformers or ONNX Runtime reads it.
"""

import argparse
import json
import shutil
import sys
import tempfile
import traceback
from functools import partial
from pathlib import Path
from typing import Any

import torch
import zoo_files
import zoo_layouts
import zoo_models as zoo
import zoo_plain
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from zoo_server import Server

LIMIT = 400  # seconds for each of the three parts
SAME, ROUNDED = 1e-4, 2e-2  # relative distances of logits: of the same weights, of weights rounded once more or less
SCHEME = "RTN4_G32_SYM"
EXPORTS = dict.fromkeys(("gptq", "gptq_v1", "awq", "mlx", "dense"), "affine")  # those that leangrid.load opens


def make(model_type: str, family: str, work: str) -> dict[str, Any]:
    """The source of a trial, in bfloat16, whose scales every container holds, and beside it the same in float32."""
    place = Path(work)
    record = zoo_plain.make(model_type, family, work, schemes=[SCHEME])
    for file in (place / "source").glob("*.safetensors"):
        stored = load_file(file)
        short = {n: x.bfloat16() if x.is_floating_point() else x for n, x in stored.items()}
        save_file(short, file, {"format": "pt"})
    path = place / "source" / "config.json"
    path.write_text(json.dumps(_in_bfloat16(json.loads(path.read_text(encoding="utf-8")))), encoding="utf-8")
    shutil.copytree(place / "source", place / "wide")
    for file in (place / "wide").glob("*.safetensors"):
        save_file(zoo_layouts.widened(load_file(file)), file, {"format": "pt"})
    return record


def _in_bfloat16(config: Any) -> Any:
    """A config and its parts with another dtype."""
    if not isinstance(config, dict):
        return config
    return {key: "bfloat16" if key in ("dtype", "torch_dtype") and value == "float32" else _in_bfloat16(value)
            for key, value in config.items()}  # fmt: skip


def judge(work: str) -> dict[str, Any]:
    """Every directory that was written: its figures by name, and all faults as sentences."""
    if "leangrid" in sys.modules:
        raise RuntimeError("leangrid is imported where plain transformers judges")
    place = Path(work)
    written = json.loads((place / "written.json").read_text(encoding="utf-8"))
    faults, figures = [], {}
    for name, refusal in written.items():
        if refusal:
            faults += [f"{name}: refused with {refusal['left']} left"] if refusal["left"] else []
            continue
        try:
            seen, wrong = _judge(place, name)
        except Exception as error:  # whatever is wrong with it, the others are judged too
            traceback.print_exc()
            seen, wrong = {}, [f"cannot be judged: {type(error).__name__}: {str(error)[:200]}"]
        figures[name] = seen
        faults += [f"{name}: {fault}" for fault in wrong]
    return {"figures": figures, "faults": faults}


def _judge(place: Path, name: str) -> tuple[dict[str, float], list[str]]:
    directory, ids = place / name, zoo_plain.windows(place)
    if (directory / "model.gguf").is_file():
        return _judge_file(place, name, _answer_of_gguf(directory, ids))
    if (directory / "model.onnx").is_file():
        return _judge_file(place, name, _answer_of_onnx(directory, ids))
    refilled, filled = _refilled(place, name, _reader_dtype(name))
    source = zoo.open_plain(place / "source")
    if name == "dense":
        refilled.changed = []  # those that were quantized
    faults = zoo_plain._name_faults(refilled, source) + zoo_plain._config_faults(place, name)
    faults += _stays_faults(place, name, source) + _side_faults(place, name)
    stored = zoo.run(filled, ids)
    figures = {"reopened": zoo_plain.distance(_logits(place, name), stored)}
    if EXPORTS.get(name) == "affine":  # the same codes, rounded to the model's dtype
        _, filled = _refilled(place, name, torch.bfloat16)
        figures["values"] = zoo_plain.distance(zoo.run(filled, ids), _logits(place, "affine"))
    faults += [fault for what, value in figures.items() for fault in zoo_plain._far(what, value, SAME)]
    seen, wrong = _opened(directory, name, ids, stored)
    return figures | seen, faults + wrong


def _refilled(place: Path, name: str, dtype: torch.dtype) -> tuple[zoo_files.Refilled, Any]:
    """The source with the weights of the directory ``name``, rounded to ``dtype``, and transformers' model of it."""
    transposed = json.loads((place / "facts.json").read_text(encoding="utf-8"))["transposed"]
    unpack = partial(zoo_layouts.unpack, dtype=dtype)
    refilled = zoo_files.refill(place / "wide", place / name, transposed, unpack)
    shutil.rmtree(place / "refilled", ignore_errors=True)
    return refilled, zoo.open_plain(zoo_files.write(refilled, place / "source", place / "refilled"))


def _reader_dtype(name: str) -> torch.dtype:
    """To what leangrid.load in float32 rounds the weights of a bfloat16 result in this container."""
    return torch.float32 if "mlx" in name or "blocks" in name else torch.bfloat16


def _logits(place: Path, name: str) -> Tensor:
    return load_file(place / f"{name}.logits.safetensors")["logits"]


def _opened(directory: Path, name: str, ids: Tensor, stored: Tensor) -> tuple[dict[str, float], list[str]]:
    """Whether plain transformers opens what it is said to open, and nothing else."""
    dense = name.endswith("dense")
    says = "yes" if dense else json.loads((directory / "manifest.json").read_text())["opened_in"].get("transformers")
    if name not in ("affine", "asymmetric") and not dense:
        return {}, []
    try:
        # transformers leaves packed experts in bfloat16, and computes with them in it
        value = zoo_plain.distance(zoo.run(zoo.open_plain(directory).float(), ids), stored)
    except Exception as error:
        known = str(says).startswith("no")
        return {"opens": 0.0}, [] if known else [f"does not open: {type(error).__name__}: {str(error)[:300]}"]
    faults = zoo_plain._far("plain", value, SAME)
    return {"opens": 1.0, "plain": value}, faults if says == "yes" else [f"it opens ({value:.1g}), but it says {says}"]


def _stays_faults(place: Path, name: str, source: nn.Module) -> list[str]:
    """Linears of transformers' model that stay and are not named where awq's readers ask by their paths."""
    config = json.loads((place / name / "config.json").read_text(encoding="utf-8")).get("quantization_config") or {}
    if config.get("quant_method") != "awq":
        return []
    wanted = {name.removesuffix(".weight") for name, _ in json.loads((place / "facts.json").read_text())["wanted"]}
    linears = {path for path, module in source.named_modules() if isinstance(module, nn.Linear)}
    lost = sorted(linears - wanted - set(config.get("modules_to_not_convert") or ()))
    return [f"{len(lost)} linears stay that its config does not name: {lost[:3]}"] if lost else []


def _side_faults(place: Path, name: str) -> list[str]:
    """Files of the source beside the weights that are not there."""
    files = {path.name for path in (place / "source").iterdir() if path.suffix != ".safetensors"}
    lost = sorted(files - {path.name for path in (place / name).iterdir()} - {"model.safetensors.index.json"})
    return [f"files of the source are lost: {lost}"] if lost else []


def _judge_file(place: Path, name: str, answer: Tensor) -> tuple[dict[str, float], list[str]]:
    value = zoo_plain.distance(answer, _logits(place, "blocks" if name.startswith("blocks") else "affine"))
    return {"values": value}, zoo_plain._far("values", value, ROUNDED)


def _answer_of_gguf(directory: Path, ids: Tensor) -> Tensor:
    import transformers

    model: Any = transformers.AutoModelForCausalLM.from_pretrained(
        directory, gguf_file="model.gguf", dtype=torch.float32
    )
    return zoo.run(model.eval(), ids)


def _answer_of_onnx(directory: Path, ids: Tensor) -> Tensor:
    import numpy as np
    import onnxruntime

    opened = onnxruntime.InferenceSession(str(directory / "model.onnx"), providers=["CPUExecutionProvider"])
    decoder = json.loads((directory / "genai_config.json").read_text(encoding="utf-8"))["model"]["decoder"]
    sizes = {"batch_size": len(ids), "past_sequence_length": 0, "kv_cache_dim": decoder["head_size"]}
    feeds: dict[str, Any] = {}
    for value in opened.get_inputs():
        if value.name == "input_ids":
            feeds[value.name] = ids.numpy()
        elif value.name == "attention_mask":
            feeds[value.name] = np.ones(tuple(ids.shape), dtype=np.int64)
        else:
            feeds[value.name] = np.zeros([sizes.get(n, n) for n in value.shape], dtype=np.float32)
    return torch.from_numpy(opened.run(["logits"], feeds)[0])


def trial(sides: tuple[Server, Server], model_type: str, family: str, place: Path, only: list[str]) -> dict[str, Any]:
    """One type; its record, with ``error`` where a part of the trial failed."""
    plain, ours = sides
    record: dict[str, Any] = {"type": model_type, "family": family}
    jobs = ((plain, "zoo_exports.make", {"model_type": model_type, "family": family}),
            (ours, "zoo_exporters.write", {"names": only or None}), (plain, "zoo_exports.judge", {}))  # fmt: skip
    for number, (side, job, more) in enumerate(jobs):
        done = side.run(job, place / f"{number}.log", LIMIT, work=str(place), **more)
        if "error" in done:
            return record | {"stage": job, "error": done["error"], "where": done.get("where")}
        record |= {key: done[key] for key in ("written", "figures", "faults") if key in done}
    return record


def main() -> None:
    """Try the types that are named."""
    parser = argparse.ArgumentParser()
    parser.add_argument("types", nargs="+", help="such as llama, or image-text:gemma3")
    parser.add_argument("--only", nargs="+", default=[], help="directories of zoo_exporters.RUNS and EXPORTS")
    parser.add_argument("--keep", type=Path, help="where the files of each type stay")
    given = parser.parse_args()
    sides = Server("zoo_exports"), Server("zoo_exporters")
    for named in given.types:
        family, _, model_type = named.rpartition(":")
        family = family or zoo.family_of(model_type)
        place = Path(tempfile.mkdtemp()) if given.keep is None else given.keep / f"{family}.{model_type}"
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir(parents=True)
        print(json.dumps(trial(sides, model_type, family, place, given.only)), flush=True)
        if given.keep is None:
            shutil.rmtree(place, ignore_errors=True)
    for side in sides:
        side.close()


if __name__ == "__main__":
    main()
