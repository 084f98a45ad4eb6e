"""Damaged and hostile sources: each row of the fault table is refused with a message that names what and where."""

import json
import os
import pickle
import resource
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from tiny_run import CONFIG, tensors, write_source

from leangrid.errors import CheckpointError, Interrupted
from leangrid.storage.source import Checkpoint, open_source

SHARD = "model.safetensors"
F32 = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_source(tmp_path / "source")


def refused(directory: Path, *words: str) -> str:
    """The message with which a directory is refused; each word must be in it."""
    with pytest.raises(CheckpointError) as caught:
        open_source(directory)
    message = str(caught.value)
    assert caught.value.exit_code == 2
    for word in words:
        assert word in message, message
    return message


def raw(header: Any, data: bytes = bytes(8), announce: int | None = None) -> bytes:
    """A safetensors file with any header at all."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if announce is None else announce) + text + data


def test_a_sound_source_is_read_exactly(source: Path) -> None:
    with open_source(source) as checkpoint:
        for name, expected in tensors().items():
            got = checkpoint.read(name)
            assert got.dtype == expected.dtype and torch.equal(got, expected)


# S1, S2: the container
# ----------------------------------------------------------------------------------------------------------------


@pytest.mark.fault("S1")
@pytest.mark.parametrize("cut", [0, 5, 8, 40, -1, -300])
def test_truncated_shard(source: Path, cut: int) -> None:
    data = (source / SHARD).read_bytes()
    (source / SHARD).write_bytes(data[:cut])
    refused(source, SHARD, "truncated", str(len(data[:cut]) - (8 if cut == 40 else 0)))


@pytest.mark.fault("S1")
def test_trailing_bytes(source: Path) -> None:
    data = (source / SHARD).read_bytes()
    (source / SHARD).write_bytes(data + b"x")
    refused(source, SHARD, "trailing bytes", str(len(data)), str(len(data) + 1))


@pytest.mark.fault("S1")
@pytest.mark.parametrize(
    ("header", "data", "words"),
    [
        ({"a": F32, "b": {**F32, "data_offsets": [12, 20]}}, bytes(20), ["hole", "'b'", "140"]),
        ({"a": F32, "b": {**F32, "data_offsets": [4, 12]}}, bytes(12), ["overlap", "'b'"]),
        ({"a": {**F32, "data_offsets": [4, 12]}}, bytes(12), ["hole", "'a'"]),
        ({"a": {**F32, "shape": [3]}}, bytes(8), ["'a'", "8 bytes", "12"]),
        ({"a": {**F32, "dtype": "F64"}}, bytes(8), ["'a'", "8 bytes", "16"]),
        ({"a": {**F32, "dtype": "F31"}}, bytes(8), ["'a'", "F31"]),
        ({"a": {**F32, "dtype": ["F32"]}}, bytes(8), ["'a'"]),
        ({"a": {**F32, "shape": [-2]}}, bytes(8), ["'a'", "-2"]),
        ({"a": {**F32, "shape": [True, 2]}}, bytes(8), ["'a'"]),
        ({"a": {**F32, "shape": [2.0]}}, bytes(8), ["'a'", "2.0"]),
        ({"a": {**F32, "shape": [2**62, 2**62, 0]}}, bytes(8), ["'a'", "8 bytes"]),
        ({"a": {**F32, "shape": [10**30]}}, bytes(8), ["'a'"]),
        ({"a": {**F32, "data_offsets": [8, 0]}}, bytes(8), ["'a'"]),
        ({"a": {**F32, "data_offsets": [0, 8, 8]}}, bytes(8), ["'a'"]),
        ({"a": {"dtype": "F32", "shape": [2]}}, bytes(8), ["'a'", "data_offsets"]),
        ({"a": {**F32, "more": 1}}, bytes(8), ["'a'"]),
        ({"a": 3}, bytes(8), ["'a'"]),
        ({"a\x1b[31m": F32}, bytes(8), ["unprintable"]),
        ({"__metadata__": {"x": 1}, "a": F32}, bytes(8), ["__metadata__"]),
        ([], b"", ["not a JSON object"]),
    ],
)
def test_headers_that_lie(source: Path, header: Any, data: bytes, words: list[str]) -> None:
    (source / SHARD).write_bytes(raw(header, data))
    refused(source, SHARD, *words)


@pytest.mark.fault("S1")
@given(position=st.integers(0, 400), value=st.integers(0, 255), insert=st.booleans())
def test_any_changed_header_byte_is_harmless(
    tmp_path_factory: pytest.TempPathFactory, position: int, value: int, insert: bool
) -> None:
    """Our own refusal, or tensors that lie wholly inside of the file: never another exception, never a byte from
    elsewhere."""
    directory = write_source(tmp_path_factory.mktemp("mutated"))
    data = bytearray((directory / SHARD).read_bytes())
    at = position % (8 + struct.unpack("<Q", data[:8])[0])
    data[at : at if insert else at + 1] = bytes([value])
    (directory / SHARD).write_bytes(data)
    try:
        checkpoint = open_source(directory)
    except CheckpointError:
        return
    for info in checkpoint.tensors.values():
        assert 8 <= info.start <= info.end <= len(data)
    for name in checkpoint.tensors:
        checkpoint.read(name, check=False)


@pytest.mark.fault("S2")
@pytest.mark.parametrize(
    ("content", "words"),
    [
        (raw({"a": F32}, announce=2**63), ["header", str(2**63)]),
        (raw({"a": F32}, announce=100_000_001), ["header", "100000001"]),
        (raw({"a": F32}, announce=5000), ["truncated", "5000"]),
        (raw(b"no json at all"), ["valid JSON"]),
        (raw(b"\xff\xfe{}"), ["valid JSON"]),
        (raw(b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, NaN]}}'), ["NaN"]),
        (raw(b'{"a": ' + b"9" * 5000 + b"}"), ["valid JSON"]),
        (raw(b'{"a": ' + json.dumps(F32).encode() + b', "a": ' + json.dumps(F32).encode() + b"}"), ["'a'", "twice"]),
        (raw(b'{"a": {"dtype":"F32","shape":[2],"shape":[1],"data_offsets":[0,8]}}'), ["'shape'", "twice"]),
        (raw(b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}"), ["nested"]),
        (raw(b'{"a":' * 50_000 + b"1" + b"}" * 50_000), ["nested"]),
        (raw(b"[" + b"{}," * 3_000_000 + b"{}]"), ["entries"]),
    ],
)  # fmt: skip
def test_hostile_headers(source: Path, content: bytes, words: list[str]) -> None:
    (source / SHARD).write_bytes(content)
    refused(source, SHARD, *words)


@pytest.mark.fault("S2")
def test_hostile_headers_take_little_memory(source: Path) -> None:
    """99 MB of brackets, or a header of 2^40 bytes in a sparse file: refused with less than 512 MB more than at the
    start."""
    program = """
import json, os, resource, struct, sys
from pathlib import Path
from leangrid.storage.safetensors import read_header
from leangrid.errors import CheckpointError
pages = int(Path("/proc/self/statm").read_text().split()[0])
resource.setrlimit(resource.RLIMIT_AS, (pages * os.sysconf("SC_PAGE_SIZE") + (512 << 20),) * 2)
path = Path(sys.argv[1])
nested = struct.pack("<Q", 99_000_000) + b"[" + b"[]," * 32_999_999
for content, size in ((nested, 8 + 99_000_000), (struct.pack("<Q", 2**40), 2**41)):
    with path.open("wb") as file:
        file.write(content)
        file.truncate(size)
    del content
    try:
        read_header(path)
    except CheckpointError as error:
        print(error.what)
"""
    done = subprocess.run(
        [sys.executable, "-c", program, str(source / SHARD)],
        capture_output=True,
        text=True,
        env=environment(),
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    assert "entries" in done.stdout and "announces a header of 1099511627776" in done.stdout


@pytest.mark.fault("S2")
def test_a_fifo_does_not_hang(source: Path) -> None:
    (source / SHARD).unlink()
    os.mkfifo(source / SHARD)
    refused(source, SHARD, "not a regular file")


# S3, S4: the index
# --------------------------------------------------------------------------------------------------------------------


def sharded(directory: Path, weight_map: dict[str, Any] | None = None) -> Path:
    """Two shards and an index."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(CONFIG))
    true_map = {}
    for number, part in enumerate((["embed.weight"], ["blocks.0.weight", "blocks.1.weight"]), 1):
        name = f"model-{number:05d}-of-00002.safetensors"
        save_file({key: tensors()[key] for key in part}, directory / name)
        true_map.update(dict.fromkeys(part, name))
    index = {"metadata": {}, "weight_map": true_map if weight_map is None else weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    return directory


@pytest.mark.fault("S3")
@pytest.mark.parametrize(
    "name",
    [
        "../x.safetensors",
        "/etc/passwd",
        "C:\\x.safetensors",
        "a/../../b.safetensors",
        "a\0.safetensors",
        "pytorch_model.bin",
        "",
        ".safetensors",
        ".hidden.safetensors",
        "sub/x.safetensors",
        "x.safetensors\n",
        7,
        None,
        "~/x.safetensors",
        "a..safetensors",
    ],
)
def test_index_that_leads_elsewhere(tmp_path: Path, name: Any) -> None:
    save_file({"a": torch.ones(1)}, tmp_path / "x.safetensors")  # what ../x.safetensors would find
    directory = sharded(tmp_path / "source", {"blocks.0.weight": name})
    refused(directory, "index", "blocks.0.weight", "plain")


@pytest.mark.fault("S3")
@pytest.mark.parametrize(
    "index",
    ["[]", "{}", '{"weight_map": []}', '{"weight_map": {}}', "nonsense", '{"weight_map": {"a": "x", "a": "y"}}'],
)
def test_index_that_is_none(tmp_path: Path, index: str) -> None:
    directory = sharded(tmp_path)
    (directory / "model.safetensors.index.json").write_text(index)
    refused(directory, "index")


@pytest.mark.fault("S3")
def test_hub_cache_links_are_followed(tmp_path: Path) -> None:
    """models--x/snapshots/<revision>/name -> ../../blobs/<hash>, as the hub's cache lies on disk."""
    real = sharded(tmp_path / "real")
    (real / "tokenizer.json").write_text('{"version": "1.0"}')
    blobs, snapshot = tmp_path / "models--x" / "blobs", tmp_path / "models--x" / "snapshots" / "abc"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for number, path in enumerate(sorted(real.iterdir())):
        path.rename(blobs / f"{number:064x}")
        (snapshot / path.name).symlink_to(Path("../../blobs") / f"{number:064x}")
    with open_source(snapshot) as checkpoint:
        assert torch.equal(checkpoint.read("blocks.1.weight"), tensors()["blocks.1.weight"])
        assert set(checkpoint.side_files()) == {"tokenizer.json"}


@pytest.mark.fault("S4")
def test_shards_and_index_disagree(tmp_path: Path) -> None:
    first, second = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
    complete = sharded(tmp_path / "complete")
    with open_source(complete) as checkpoint:
        assert set(checkpoint.tensors) == set(tensors()) and not checkpoint.notices

    missing = sharded(tmp_path / "missing")
    (missing / second).unlink()
    refused(missing, second, "missing", "1 of 2")

    absent = sharded(tmp_path / "absent", {"embed.weight": first, "blocks.0.weight": second, "blocks.9.weight": second})
    refused(absent, "blocks.9.weight")

    swapped = sharded(tmp_path / "swapped", {"embed.weight": second, "blocks.0.weight": first})
    refused(swapped, "embed.weight")

    double = sharded(tmp_path / "double")
    save_file(
        {"embed.weight": torch.ones(1), "blocks.0.weight": torch.ones(1), "blocks.1.weight": torch.ones(1)},
        double / second,
    )
    refused(double, "'embed.weight'", "two shards", first, second)


@pytest.mark.fault("S4")
def test_what_the_index_does_not_list_is_ignored_aloud(tmp_path: Path) -> None:
    directory = sharded(tmp_path)
    save_file({"embed.weight": torch.zeros(1)}, directory / "stale.safetensors")
    index = json.loads((directory / "model.safetensors.index.json").read_text())
    del index["weight_map"]["blocks.1.weight"]
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    with open_source(directory) as checkpoint:
        assert set(checkpoint.tensors) == {"embed.weight", "blocks.0.weight"}
        assert any("stale.safetensors" in notice for notice in checkpoint.notices)
        assert any("blocks.1.weight" in notice for notice in checkpoint.notices)


@pytest.mark.fault("S4")
def test_several_files_without_an_index(source: Path) -> None:
    (source / SHARD).rename(source / "a.safetensors")
    with open_source(source) as checkpoint:
        assert len(checkpoint.tensors) == 3
    save_file({"x": torch.ones(1)}, source / "b.safetensors")
    refused(source, "2 safetensors files", "index")


# S5, S6: nothing is executed
# ----------------------------------------------------------------------------------------------------------


class Payload:
    """Unpickling this writes a file."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[Callable, tuple]:
        return Path.write_text, (self.canary, "executed")


@pytest.mark.fault("S5")
@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.ckpt", "model.pth"])
def test_pickles_are_refused_unread(source: Path, tmp_path: Path, name: str) -> None:
    (source / SHARD).unlink()
    (source / name).write_bytes(pickle.dumps(Payload(tmp_path / "canary")))
    refused(source, name, "pickled", "save_pretrained")
    assert not (tmp_path / "canary").exists()
    pickle.loads((source / name).read_bytes())  # noqa: S301  the payload does work
    assert (tmp_path / "canary").exists()


@pytest.mark.fault("S5")
def test_no_weights_at_all(source: Path) -> None:
    (source / SHARD).unlink()
    refused(source, "no safetensors weights")


@pytest.mark.fault("S6")
def test_custom_code_is_reported_never_run_never_copied(source: Path, tmp_path: Path) -> None:
    (source / "config.json").write_text(
        json.dumps({**CONFIG, "auto_map": {"AutoConfig": "evil.Config", "AutoModel": "evil.Model"}})
    )
    (source / "evil.py").write_text(f"open({str(tmp_path / 'canary')!r}, 'w').close()")
    with open_source(source) as checkpoint:
        assert checkpoint.custom_code == ("AutoConfig", "AutoModel")
        assert any("neither run nor copied" in notice for notice in checkpoint.notices)
        assert set(checkpoint.side_files()) == {"tokenizer.json"}
    assert not (tmp_path / "canary").exists()


# S7, S8, S11: the config
# --------------------------------------------------------------------------------------------------------------


@pytest.mark.fault("S7")
def test_more_layers_than_tensors(source: Path) -> None:
    (source / "config.json").write_text(json.dumps({**CONFIG, "num_hidden_layers": 9000}))
    refused(source, "num_hidden_layers = 9000", "3 tensors")


@pytest.mark.fault("S8")
@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"hidden_size": 1000000000000}', ["hidden_size = 1000000000000"]),
        ('{"hidden_size": -4}', ["hidden_size = -4"]),
        ('{"hidden_size": 0}', ["hidden_size = 0"]),
        ('{"hidden_size": 8.0}', ["hidden_size = 8.0"]),
        ('{"hidden_size": true}', ["hidden_size = True"]),
        ('{"hidden_size": "8"}', ["hidden_size = 8"]),
        ('{"hidden_size": [8, -1]}', ["hidden_size = -1"]),
        ('{"vocab_size": 1e99}', ["vocab_size"]),
        ('{"rms_norm_eps": NaN}', ["NaN"]),
        ('{"unheard_of": NaN}', ["NaN"]),
        ('{"rms_norm_eps": Infinity}', ["rms_norm_eps = inf"]),
        ('{"rope_theta": -1.0}', ["rope_theta"]),
        ('{"text_config": {"num_hidden_layers": 100000000}}', ["text_config.num_hidden_layers"]),
        ('{"hidden_size": -1, "vocab_size": -2}', ["hidden_size", "vocab_size"]),
        ('{"hidden_size": ' + "9" * 5000 + "}", ["valid JSON"]),
        ("[" * 100_000, ["nested"]),
        ("[]", ["not a JSON object"]),
        ("", ["valid JSON"]),
    ],
)
def test_absurd_configs(source: Path, text: str, words: list[str]) -> None:
    (source / "config.json").write_text(text)
    refused(source, "config.json", *words)


@pytest.mark.fault("S8")
def test_a_config_of_a_gigabyte_is_not_read(source: Path) -> None:
    with (source / "config.json").open("wb") as file:
        file.truncate(1 << 30)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    refused(source, "config.json", str(1 << 30))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # KiB


@pytest.mark.fault("S8")
def test_configs_of_real_models_pass(tiny: Callable[..., Path]) -> None:
    for name in ("llama3", "gpt2", "opt", "gemma3", "bert"):
        with open_source(tiny(name)) as checkpoint:
            assert checkpoint.tensors


@pytest.mark.fault("S8")
@pytest.mark.parametrize("field", ["num_local_experts", "num_experts", "n_routed_experts", "moe_intermediate_size"])
def test_a_dense_model_of_a_type_with_experts_has_none(source: Path, field: str) -> None:  # such as Granite 4's micro
    (source / "config.json").write_text(json.dumps({**CONFIG, field: 0}))
    with open_source(source) as checkpoint:
        assert checkpoint.tensors
    (source / "config.json").write_text(json.dumps({**CONFIG, field: -1}))
    refused(source, f"{field} = -1 (a whole number from 0 to")


@pytest.mark.fault("S8")
def test_no_config(source: Path) -> None:
    (source / "config.json").unlink()
    refused(source, "no config.json")
    refused(source / "nowhere", "no such directory")


@pytest.mark.fault("S11")
@pytest.mark.parametrize(
    ("method", "name", "dtype"),
    [
        ("gptq", "a.qweight", torch.int32),
        ("awq", "a.qweight", torch.int32),
        ("bitsandbytes", "a.weight", torch.uint8),
        ("quark", "a.weight", torch.float8_e4m3fn),
    ],
)
def test_sources_in_layouts_that_are_not_read_are_refused(
    source: Path, method: str, name: str, dtype: torch.dtype
) -> None:
    write_source(
        source,
        {**CONFIG, "quantization_config": {"quant_method": method}},
        tensors() | {name: torch.zeros(8, 8).to(dtype)},
    )
    refused(source, "already quantized", method)
    assert open_source(source, allow_quantized=True).tensors


@pytest.mark.fault("S11")
@pytest.mark.parametrize("key", ["quantization_config", "compression_config"])
def test_a_config_that_calls_plain_weights_quantized_is_refused_with_what_to_remove(source: Path, key: str) -> None:
    (source / "config.json").write_text(json.dumps({**CONFIG, key: {"quant_method": "bitsandbytes"}}))
    refused(source, "plain BF16 and F32", f"remove {key}", "bitsandbytes")


# S10: the values
# ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.fault("S10")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_nan_and_infinite_weights(tmp_path: Path, dtype: torch.dtype) -> None:
    weight = torch.randn(8, 8).to(dtype)
    weight[0, :3], weight[1, 0] = torch.nan, -torch.inf
    source = write_source(tmp_path / "source", weights={**tensors(), "blocks.0.weight": weight})
    with open_source(source) as checkpoint:
        checkpoint.read("blocks.1.weight")
        assert (
            torch.equal(checkpoint.read("blocks.0.weight", check=False), weight) is False
        )  # NaN is not equal to itself
        with pytest.raises(CheckpointError, match=r"'blocks.0.weight' holds 3 NaN and 1 infinite of 64"):
            checkpoint.read("blocks.0.weight")


@pytest.mark.fault("S10")
def test_denormals_zeros_and_outliers_are_read_as_they_are(tmp_path: Path) -> None:
    weight = torch.zeros(8, 8)
    weight[1], weight[2, 0], weight[3] = 1e-42, 3e38, 0.5
    source = write_source(
        tmp_path / "source", weights={**tensors(), "blocks.0.weight": weight, "counts": torch.arange(4)}
    )
    with open_source(source) as checkpoint:
        assert torch.equal(checkpoint.read("blocks.0.weight"), weight)
        assert torch.equal(checkpoint.read("counts"), torch.arange(4))


# S13: it changes under us
# -------------------------------------------------------------------------------------------------------------


def rewrite_in_place(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def replace_with_another(path: Path) -> None:
    write_source(path.parent / "other", weights={name: tensor + 1 for name, tensor in tensors().items()})
    os.replace(path.parent / "other" / SHARD, path)


def disguise(path: Path) -> None:
    """Another header of the same length, same size, same times: only the header's hash can tell."""
    status = path.stat()
    data = path.read_bytes().replace(b"blocks.0.weight", b"blocks.9.weight")
    with path.open("r+b") as file:
        file.write(data)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


@pytest.mark.fault("S13")
@pytest.mark.parametrize(
    "change", [rewrite_in_place, replace_with_another, disguise, Path.unlink, lambda path: os.truncate(path, 300)]
)
@pytest.mark.parametrize("held_open", [False, True])
def test_a_shard_that_changes_during_the_run_stops_it(
    source: Path, change: Callable[[Path], None], held_open: bool
) -> None:
    with open_source(source) as checkpoint:
        if held_open:
            checkpoint.read("blocks.0.weight")
            if change is disguise:
                checkpoint.close()  # the header is checked when a shard is reopened
        change(source / SHARD)
        with pytest.raises(Interrupted) as caught:
            checkpoint.read("blocks.1.weight")
    assert caught.value.exit_code == 3
    assert SHARD in str(caught.value) and "changed" in str(caught.value) and "--restart" in str(caught.value)


@pytest.mark.fault("S13")
def test_another_fine_tune_is_another_checkpoint(source: Path) -> None:
    def fingerprint() -> str:
        with open_source(source) as checkpoint:
            return checkpoint.fingerprint

    first = fingerprint()
    assert fingerprint() == first
    os.utime(source / SHARD)  # a copy with other times is the same checkpoint
    assert fingerprint() == first
    rewrite_in_place(source / SHARD)
    assert fingerprint() != first


@pytest.mark.fault("S13")
def test_unreadable_disk(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(self: Checkpoint, path: Path) -> None:
        raise OSError(5, "Input/output error")

    with open_source(source) as checkpoint:
        monkeypatch.setattr(Checkpoint, "_check_unchanged", broken)
        with pytest.raises(CheckpointError, match=r"blocks\.0\.weight.*Input/output error.*model\.safetensors"):
            checkpoint.read("blocks.0.weight")


def environment() -> dict[str, str]:
    root = Path(__file__).resolve().parents[2]
    return {
        **os.environ,
        "PYTHONPATH": f"{root / 'src'}{os.pathsep}{root / 'tests' / 'support'}",
        "OMP_NUM_THREADS": "1",
    }
