"""Structure-aware damage to every file that is read gives only errors of leangrid, within 1 s and 512 MB each."""

import copy
import json
import os
import resource
import shutil
import struct
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import tiny_models
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny_run import tensors, write_source

import leangrid
from leangrid.errors import LeangridError
from leangrid.models.skeleton import Skeleton
from leangrid.recipe import Recipe
from leangrid.storage.manifest import list_differences
from leangrid.storage.source import open_source

Tiny = Callable[..., Path]
SECONDS, BYTES = 1.0, 512 << 20
SHARD, INDEX = "model.safetensors", "model.safetensors.index.json"

ODD: st.SearchStrategy[Any] = st.one_of(
    st.none(),
    st.booleans(),
    st.sampled_from([0, 1, -1, 2, 7, 65, 2**16, 2**31 - 1, 2**31, 2**40, 2**63, 2**70, 10**30, 0.5, 1e308, -1e-308]),
    st.sampled_from([float("nan"), float("inf"), -float("inf")]),
    st.sampled_from(
        ["", "0", "F8_E4M3", "../x", "/etc/passwd", "llama", "float16", "eager", "\x00", "é" * 300, "silu", "re:(a+)+$"]
    ),
    st.just([]),
    st.just({}),
    st.lists(st.integers(-3, 2**33), max_size=4),
    st.dictionaries(
        st.sampled_from(["rope_type", "type", "factor", "x"]),
        st.sampled_from(["linear", "yarn", -1, None, 1e30]),
        max_size=3,
    ),
)


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path of every item inside a JSON value."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield (*path, key)
        yield from places(item, (*path, key))


@st.composite
def damaged(draw: st.DrawFn, value: Any) -> Any:
    """``value`` with one to three items replaced, removed, added or moved."""
    result = copy.deepcopy(value)
    for _ in range(draw(st.integers(1, 3))):
        found = list(places(result))
        if not found:
            return result
        *way, key = draw(st.sampled_from(found))
        owner = result
        for step in way:
            owner = owner[step]
        action = draw(st.sampled_from(["replace", "replace", "replace", "remove", "swap", "add"]))
        if action == "remove":
            del owner[key]
        elif action == "swap":
            owner[key] = copy.deepcopy(
                draw(st.sampled_from([owner[k] for k in (owner if isinstance(owner, dict) else range(len(owner)))]))
            )
        elif action == "add" and isinstance(owner, dict):
            owner[draw(st.text(max_size=5))] = draw(ODD)
        else:
            owner[key] = draw(ODD)
    return result


@contextmanager
def refused_or_read() -> Iterator[None]:
    """Our own errors are an answer, others are not; within bounds."""
    with bounded():
        try:
            yield
        except LeangridError as error:
            assert error.exit_code in (2, 3) and str(error)


@contextmanager
def bounded() -> Iterator[None]:
    """Half a gigabyte more than now, and a second of this process's time."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * os.sysconf("SC_PAGE_SIZE") + BYTES, hard))
    started = time.process_time()
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
    assert time.process_time() - started < SECONDS


def shard_of(header: Any, data: bytes) -> bytes:
    text = json.dumps(header).encode("utf-8", "surrogatepass")
    return struct.pack("<Q", len(text)) + text + data


def parts(path: Path) -> tuple[dict[str, Any], bytes]:
    """The header and the data of a safetensors file."""
    raw = path.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    return json.loads(raw[8 : 8 + length]), raw[8 + length :]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuzzed")


reused = settings(suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
heavy = settings(reused, max_examples=max(8, settings().max_examples // 3))  # each builds a model


@pytest.mark.fault("S1")
@pytest.mark.fault("S2")
@reused
@given(data=st.data())
def test_shard_headers(folder: Path, data: st.DataObject) -> None:
    source = write_source(folder / "shard")
    header, content = parts(source / SHARD)
    (source / SHARD).write_bytes(shard_of(data.draw(damaged(header)), content))
    with refused_or_read(), open_source(source) as checkpoint:
        for name in checkpoint.tensors:
            checkpoint.read(name, check=False)


@pytest.mark.fault("S3")
@pytest.mark.fault("S4")
@reused
@given(data=st.data())
def test_indexes(folder: Path, data: st.DataObject) -> None:
    source = write_source(folder / "indexed")
    (source / SHARD).rename(source / "model-00001-of-00001.safetensors")
    index = {"metadata": {"total_size": 1}, "weight_map": dict.fromkeys(tensors(), "model-00001-of-00001.safetensors")}
    (source / INDEX).write_text(json.dumps(data.draw(damaged(index))))
    try:
        with refused_or_read(), open_source(source) as checkpoint:
            assert all(info.file.parent == source for info in checkpoint.tensors.values())
    finally:
        shutil.rmtree(source)


@pytest.mark.fault("S7")
@pytest.mark.fault("S8")
@pytest.mark.parametrize(
    "name",
    ["llama3_tied", "gpt2", "bert", *(pytest.param(n, marks=pytest.mark.slow) for n in ("gemma3", "opt", "phi3"))],
)
@heavy
@given(data=st.data())
def test_configs(name: str, tiny: Tiny, folder: Path, data: st.DataObject) -> None:
    source = folder / name
    if not source.exists():
        shutil.copytree(tiny(name), source)
    config = json.loads((tiny(name) / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(data.draw(damaged(config))))
    with refused_or_read(), open_source(source) as checkpoint:
        Skeleton(checkpoint)


@pytest.mark.fault("S7")
@pytest.mark.fault("S8")
@pytest.mark.parametrize(
    ("name", "field"),
    [("gpt2", "n_positions"), ("bert", "max_position_embeddings"), ("opt", "max_position_embeddings")],
)
@pytest.mark.parametrize("value", [10**6, 2**31])
def test_tables_that_a_config_only_claims_are_not_made(
    name: str, field: str, value: int, tiny: Tiny, tmp_path: Path
) -> None:
    """GPT-2 keeps a mask of n_positions^2 bytes, BERT a list of positions: the tensors are asked first."""
    source = shutil.copytree(tiny(name), tmp_path / name)
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, field: value}))
    with (
        open_source(source) as checkpoint,
        pytest.raises(LeangridError, match=f"asks for .{str(value)[:5]}"),
        bounded(),
    ):
        Skeleton(checkpoint)


@pytest.mark.fault("O5")
@pytest.mark.parametrize("part", ["header", "config", "data"])
@heavy
@given(data=st.data())
def test_results(part: str, finished: Path, folder: Path, data: st.DataObject) -> None:
    """A damaged result of ours (look-up tables) is refused, or is whole: no other exception, nothing that runs on bad
    codes."""
    copied = folder / part
    if not copied.exists():
        shutil.copytree(finished, copied)
    header, content = parts(finished / SHARD)
    if part == "header":
        (copied / SHARD).write_bytes(shard_of(data.draw(damaged(header)), content))
    elif part == "config":
        config = json.loads((finished / "config.json").read_text())
        (copied / "config.json").write_text(json.dumps(data.draw(damaged(config))))
    else:
        at, byte = data.draw(st.integers(0, len(content) - 1)), data.draw(st.integers(0, 255))
        (copied / SHARD).write_bytes(shard_of(header, content[:at] + bytes([byte]) + content[at + 1 :]))
    with refused_or_read():
        list_differences(copied)
        leangrid.load(copied)


@pytest.fixture(scope="module")
def finished(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("finished") / "out"
    leangrid.quantize(tiny("llama2"), out, Recipe(scheme="NU3"), windows=tiny_models.tokens(2, 16))
    return out


@reused
@given(data=st.data())
def test_recipes(folder: Path, data: st.DataObject) -> None:
    good = {key: value for key, value in Recipe().model_dump().items() if value is not None}
    lines = []
    for key, value in data.draw(damaged(good)).items():
        text = json.dumps(value).replace("Infinity", "inf").replace("NaN", "nan").replace("null", "''")
        lines.append(f"{key} = {text if not isinstance(value, dict) else '{ x = 1 }'}")
    raw = "\n".join(lines).encode("utf-8", "surrogatepass")
    at = data.draw(st.integers(0, max(len(raw) - 1, 0)))
    if data.draw(st.booleans()):
        raw = raw[:at] + bytes([data.draw(st.integers(0, 255))]) + raw[at + 1 :]
    (folder / "recipe.toml").write_bytes(raw)
    with refused_or_read():
        Recipe.from_file(folder / "recipe.toml").resolved("W4A16")
