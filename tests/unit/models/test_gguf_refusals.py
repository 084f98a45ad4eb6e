"""What of a GGUF file is refused, by name and from its header: no weight is read, nothing is written."""

import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import gguf_models
import numpy as np
import pytest
import tiny_models
import torch
import transformers as hf

import leangrid
from leangrid.errors import CheckpointError, LeangridError
from leangrid.models.gguf import all_files, dequantize, is_gguf, open_gguf
from leangrid.recipe import Recipe
from leangrid.storage.gguf_header import read_header
from leangrid.storage.hub import locate_source

pytestmark = pytest.mark.fault("S15")
C = tiny_models.CONFIGS


@pytest.fixture(scope="module")
def llama() -> hf.PreTrainedModel:
    return gguf_models.build(C["llama2"]())


def refused(path: Path, words: str, at_most: float = 1.0) -> None:
    """One sentence with these words, in time, and nothing written."""
    before = sorted(path.parent.iterdir())
    start = time.perf_counter()
    with pytest.raises(CheckpointError, match=words) as error:
        dequantize(path, path.parent / "out")
    assert time.perf_counter() - start < at_most and "\n" not in str(error.value) and error.value.way_out
    assert sorted(path.parent.iterdir()) == before


@pytest.mark.parametrize(
    ("fields", "tensors", "words"),
    [
        ({"logit_scale": 0.5}, {}, r"llama\.logit_scale = 0\.5"),
        ({"embedding_scale": 12.0}, {}, r"llama\.embedding_scale"),
        ({"residual_scale": 0.2}, {}, r"llama\.residual_scale"),
        ({"attention.scale": 0.5}, {}, r"llama\.attention\.scale"),
        ({"attention.causal": False}, {}, r"attention\.causal"),
        ({"attention.temperature_length": 4096}, {}, r"temperature_length"),
        ({"attn_logit_softcapping": 50.0}, {}, r"attn_logit_softcapping"),
        ({"pooling_type": 3}, {}, r"pooling_type"),
        ({"something.new": 3}, {}, r"llama\.something\.new = 3"),
        ({"rope.dimension_count": 8}, {}, r"rope\.dimension_count = 8 of 16"),
        ({"attention.value_length": 32}, {}, r"attention\.value_length = 32"),
        ({"rope.scaling.type": "dynamic"}, {}, r"rope\.scaling\.type = 'dynamic'"),
        ({"rope.dimension_sections": [1, 2, 3, 4]}, {}, r"dimension_sections"),
        (
            {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0, "rope.scaling.yarn_ext_factor": 0.5},
            {},
            r"yarn_ext_factor",
        ),
        ({"attention.head_count_kv": [2, 4]}, {}, r"head_count_kv = one value a block"),
        ({"attention.head_count": None}, {}, r"the field llama\.attention\.head_count is missing"),
        ({"attention.layer_norm_rms_epsilon": None}, {}, r"layer_norm_rms_epsilon is missing"),
        ({"block_count": 3}, {}, r"missing.*blk\.2\.attn"),
        ({"block_count": 1}, {}, r"no place.*blk\.1\."),
        ({"block_count": 4_000_000_000}, {}, r"block_count"),
        ({"block_count": 1_000_000}, {}, r"announces 1000000 blocks, and the file holds"),
        (
            {"embedding_length": 32},
            {},
            r"disagree: token_embd\.weight has shape \[512, 64\], the header asks for \[512, 32\]",
        ),
        ({"expert_count": 8}, {}, r"expert_count|expert_used_count"),
        ({"general.type": "adapter"}, {}, "LoRA adapter.*Merge"),
        ({"general.type": "mmproj"}, {}, "no language model"),
        ({"tokenizer.ggml.model": "rwkv"}, {}, "kind 'rwkv'"),
        ({"tokenizer.ggml.pre": "deepseek-llm"}, {}, "rule 'deepseek-llm'"),
        ({"tokenizer.ggml.eos_token_id": 9999}, {}, "eos_token_id is 9999"),
        ({"tokenizer.ggml.merges": None}, {}, "merges is missing"),
        ({}, {"blk.1.ffn_up.weight": None}, r"missing from the GGUF file: blk\.1\.ffn_up\.weight"),
        ({}, {"token_embd.weight": None}, r"missing.*token_embd"),
        ({}, {"blk.0.attn_q_norm.weight": np.ones(16)}, r"no place in a LlamaForCausalLM: blk\.0\.attn_q_norm"),
        ({}, {"blk.0.attn_q.scale": np.ones(1)}, r"no place.*blk\.0\.attn_q\.scale"),
        ({}, {"blk.0.attn_q.bias": np.ones(64)}, r"missing.*blk\.1\.attn_q\.bias"),
        ({}, {"output_norm.bias": np.ones(64)}, r"no place.*output_norm\.bias"),
        ({}, {"rope_freqs.weight": np.ones(4)}, r"rope_freqs\.weight = \[4\] factors"),
        ({}, {"rope_freqs.weight": np.zeros(8)}, r"rope_freqs\.weight = factors that are not positive"),
        (
            {"rope.scaling.factor": 8.0},
            {"rope_freqs.weight": np.ones(8)},
            r"rope\.scaling\.factor = 8\.0 beside a tensor",
        ),
        ({"rope.scaling.type": "longrope"}, {}, r"rope\.scaling\.type = 'longrope' without rope_factors"),
        ({}, {"rope_factors_long.weight": np.ones(8)}, r"one list of factors without the other"),
        ({}, {"blk.0.ffn_up.weight": np.ones((64, 64))}, r"disagree: blk\.0\.ffn_up\.weight has shape \[64, 64\]"),
    ],
)
def test_what_cannot_be_carried_over(llama: Any, fields: dict, tensors: dict, words: str, tmp_path: Path) -> None:
    gguf_models.write(tmp_path / "m.gguf", llama, fields=fields, tensors=tensors)
    refused(tmp_path / "m.gguf", words)


def test_fields_that_change_nothing_are_no_reason(llama: Any, tmp_path: Path) -> None:
    harmless = {
        "logit_scale": 1.0,
        "attention.causal": True,
        "pooling_type": 0,
        "rope.scaling.finetuned": True,
        "expert_count": 0,
        "other.tool.version": "3",
        "general.sampling.temp": 0.7,
        "attention.key_length": 16,
        "attention.value_length": 16,
        "general.quantization_version": 2,
        "final_logit_softcapping": 0.0,
        "attention.sliding_window": 0,
    }
    gguf_models.write(tmp_path / "m.gguf", llama, fields=harmless)
    assert open_gguf(tmp_path / "m.gguf").config["model_type"] == "llama"


def test_an_architecture_that_is_not_read_is_named(llama: Any, tmp_path: Path) -> None:
    gguf_models.write(tmp_path / "m.gguf", llama)
    raw = (tmp_path / "m.gguf").read_bytes()
    (tmp_path / "m.gguf").write_bytes(raw.replace(b"\x05\0\0\0\0\0\0\0llama", b"\x05\0\0\0\0\0\0\0mamba", 1))
    refused(tmp_path / "m.gguf", "architecture 'mamba'.*It reads: llama, qwen2")


def test_yarn_that_the_class_does_not_compute_is_refused(tmp_path: Path) -> None:
    yarn = {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0}
    gguf_models.write(tmp_path / "m.gguf", gguf_models.build(C["phi3"]()), fields=yarn)
    refused(tmp_path / "m.gguf", r"phi3\.rope\.scaling\.type = 'yarn'")
    gguf_models.write(tmp_path / "m.gguf", gguf_models.build(C["qwen2"]()), fields={"attention.sliding_window": 64})
    refused(tmp_path / "m.gguf", r"qwen2\.attention\.sliding_window = 64")


@pytest.fixture(scope="module")
def file(llama: Any, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("gguf") / "m.gguf"
    gguf_models.write(path, llama, kind="Q8_0")
    return path.read_bytes()


def _counts(tensors: int, fields: int) -> Callable[[bytes], bytes]:
    return lambda raw: raw[:8] + struct.pack("<QQ", tensors, fields) + raw[24:]


def _header(*parts: bytes) -> Callable[[bytes], bytes]:
    return lambda raw: b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + b"".join(parts)


def _key(text: str) -> bytes:
    return struct.pack("<Q", len(text)) + text.encode()


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda raw: b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n", "Git LFS pointer"),
        (lambda raw: b"", "does not begin with 'GGUF'"),
        (lambda raw: b"<!DOCTYPE html>", "does not begin with 'GGUF'"),
        (lambda raw: raw[:6], "truncated"),
        (lambda raw: raw[:1000], "truncated"),
        (lambda raw: raw[: len(raw) // 2], "truncated"),
        (lambda raw: raw[:-1], "truncated"),
        (lambda raw: raw[:4] + struct.pack("<I", 1) + raw[8:], "version 1"),
        (lambda raw: raw[:4] + struct.pack("<I", 77) + raw[8:], "version 77"),
        (lambda raw: raw[:4] + struct.pack(">I", 3) + raw[8:], "big-endian"),
        (_counts(2**60, 5), "announces"),
        (_counts(5, 2**60), "announces"),
        (_counts(5, 60_000), "cannot be read"),
        (_header(_key("k"), struct.pack("<IIQ", 9, 8, 2**50)), "announces"),
        (_header(_key("k"), struct.pack("<IIQ", 9, 4, 15_000_000)), "truncated"),
        (_header(_key("k"), struct.pack("<IIQ", 9, 9, 1)), "array of arrays"),
        (_header(_key("k"), struct.pack("<I", 44)), "unknown type 44"),
        (_header(_key("k"), struct.pack("<IQ", 8, 2**62)), "announces|truncated"),
        (_header(struct.pack("<Q", 2**63)), "announces"),
        (_header(struct.pack("<Q", 1) + b"\xff"), "not UTF-8"),
        (lambda raw: raw.replace(_key("blk.1.ffn_up.weight"), _key("blk.0.ffn_up.weight")), "twice"),
        (lambda raw: raw.replace(b"llama.block_count", b"llama.embedding_c", 1), "missing|cannot carry"),
    ],
)
def test_damage_is_one_sentence_in_no_time(
    file: bytes, damage: Callable[[bytes], bytes], words: str, tmp_path: Path
) -> None:
    (tmp_path / "m.gguf").write_bytes(damage(file))
    refused(tmp_path / "m.gguf", words)


def test_tensors_that_lie_over_one_another_or_nowhere(file: bytes, tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    name = _key("blk.1.ffn_up.weight")
    at = file.index(name) + len(name) + 4 + 16 + 4
    for offset, words in ((0, "overlap"), (7, "not aligned"), (2**62, "truncated")):
        path.write_bytes(file[:at] + struct.pack("<Q", offset) + file[at + 8 :])
        refused(path, words)
    path.write_bytes(file[: at - 4] + struct.pack("<I", 24) + file[at:])
    refused(path, r"blk\.1\.ffn_up\.weight is stored as I8|overlap|truncated")
    path.write_bytes(file[: at - 4] + struct.pack("<I", 999) + file[at:])
    refused(path, "ggml's type 999")


def test_every_cut_of_the_header_is_refused(file: bytes, tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    end = min(tensor.start for tensor in _read(file, path).tensors.values())
    for cut in range(0, end, 997):
        path.write_bytes(file[:cut])
        with pytest.raises(CheckpointError):
            read_header(path)


def _read(file: bytes, path: Path) -> Any:
    path.write_bytes(file)
    return read_header(path)


def test_the_header_is_what_gguf_py_reads(file: bytes, tmp_path: Path) -> None:
    header = _read(file, tmp_path / "m.gguf")
    reader = gguf.GGUFReader(tmp_path / "m.gguf")
    expected = {key: field.contents() for key, field in reader.fields.items() if not key.startswith("GGUF.")}
    assert {key: field.value for key, field in header.fields.items()} == expected
    assert {t.name: (tuple(t.shape[::-1]), t.tensor_type.name, t.data_offset, t.n_bytes) for t in reader.tensors} == {
        name: (t.shape, t.kind, t.start, t.nbytes) for name, t in header.tensors.items()
    }


def test_parts_are_joined_or_named(llama: Any, tmp_path: Path) -> None:
    files = gguf_models.write(tmp_path / "m.gguf", llama, shards=3)
    whole = open_gguf(files[0]).tensors
    for part in files[1:]:
        assert open_gguf(part).tensors == whole
    raw = files[1].read_bytes()
    files[1].unlink()
    for part in (files[0], files[2]):
        refused(part, r"split into 3 files, and the part m-00002-of-00003\.gguf is missing")
    files[1].write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    refused(files[0], r"'m-00002-of-00003\.gguf' is a Git LFS pointer")
    files[1].write_bytes(files[2].read_bytes())
    refused(files[0], r"part 'm-00002-of-00003\.gguf' is not of this model")
    files[1].write_bytes(raw)
    other = gguf_models.write(tmp_path / "other.gguf", gguf_models.build(C["qwen2"]()), shards=3)
    for number, words in (
        (1, "not of this model|parts of this split model|missing|announced"),
        (0, "not of this model|announced"),
    ):
        kept = files[number].read_bytes()
        files[number].write_bytes(other[number].read_bytes())
        refused(files[0], words)
        files[number].write_bytes(kept)
    (tmp_path / "renamed.gguf").write_bytes(files[0].read_bytes())
    refused(tmp_path / "renamed.gguf", "part 1 of a model split into 3 files, and its name does not say so")


def test_a_name_in_capitals_is_a_gguf_file(file: bytes, tmp_path: Path) -> None:
    (tmp_path / "M.GGUF").write_bytes(file)
    assert locate_source(str(tmp_path / "M.GGUF")) == tmp_path / "M.GGUF"
    with pytest.raises(CheckpointError, match=r"no such directory or \.gguf file"):
        locate_source(str(tmp_path / "absent.GGUF"))


def test_a_file_of_any_name_is_a_gguf_file_by_its_first_bytes(file: bytes, tmp_path: Path) -> None:
    (tmp_path / "sha256-ab12").write_bytes(file)
    assert is_gguf(locate_source(str(tmp_path / "sha256-ab12")))
    (tmp_path / "sha256-ab12").write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:ab\nsize 5\n")
    with pytest.raises(CheckpointError, match="Git LFS pointer"):
        locate_source(str(tmp_path / "sha256-ab12"))


def test_code_beside_the_file_is_not_asked_for(file: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "m.gguf").write_bytes(file)
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'canary')!r}, 'w')\n")
    (tmp_path / "config.json").write_text(
        '{"model_type": "evil", "auto_map": {"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M"}}'
    )
    (tmp_path / "tokenizer_config.json").write_text(
        '{"auto_map": {"AutoTokenizer": ["evil.T", null]}, "tokenizer_class": "EvilTokenizer"}'
    )
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    dequantize(tmp_path / "m.gguf", tmp_path / "out")
    assert not (tmp_path / "canary").exists() and "auto_map" not in (tmp_path / "out/tokenizer_config.json").read_text()


def test_plain_floats_stay_what_they_are(llama: Any, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    for kind, dtype in (
        ("F16", torch.float16),
        ("BF16", torch.bfloat16),
        ("F32", torch.float32),
        ("F64", torch.float32),
    ):
        gguf_models.write(tmp_path / f"{kind}.gguf", llama, kind=kind)
        assert dequantize(tmp_path / f"{kind}.gguf", tmp_path / kind) == dtype
        held, own = load_file(tmp_path / kind / "model.safetensors"), llama.state_dict()
        for name, tensor in held.items():
            if tensor.ndim == 1:  # float32 in the file: no common dtype holds it exactly
                assert torch.equal(tensor, own[name].float())
            else:
                assert tensor.dtype == dtype and torch.equal(tensor, own[name].to(dtype))


def test_a_run_that_cannot_be_leaves_nothing(llama: Any, tmp_path: Path) -> None:
    gguf_models.write(tmp_path / "m.gguf", llama, fields={"logit_scale": 0.5})
    gguf_models.write(tmp_path / "odd.gguf", llama)
    windows = tiny_models.tokens(2, 16)
    for name, scheme, words in (("m", "W4A16", "logit_scale"), ("odd", "W4A16_G48", "48")):
        with pytest.raises(LeangridError, match=words):
            leangrid.quantize(tmp_path / f"{name}.gguf", tmp_path / "out", Recipe(scheme=scheme), windows=windows)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m.gguf", "odd.gguf"]


def test_another_part_is_another_source(llama: Any, tmp_path: Path) -> None:
    """The journal of an unfinished run knows all parts, not only the one that was named."""
    files = gguf_models.write(tmp_path / "m.gguf", llama, shards=2)
    assert all_files(files[0]) == all_files(files[1]) == files
    assert all_files(tmp_path / "one.gguf") == [tmp_path / "one.gguf"]
