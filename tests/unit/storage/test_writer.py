"""storage/writer.py and manifest.py: a finished directory, read with the reference library."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from leangrid.errors import FormatError, OutputError
from leangrid.storage.journal import Journal, partial_of
from leangrid.storage.manifest import list_differences
from leangrid.storage.writer import finish_interrupted_rename, write_result

WEIGHTS = {f"blocks.{i}.weight": torch.full((4, 4), float(i)) for i in range(3)}


def published(tmp_path: Path, **changes: Any) -> tuple[Path, dict[str, Any]]:
    out = tmp_path / "out"
    journal = Journal.for_output(out).start_or_resume({})
    for index, (name, weight) in enumerate(WEIGHTS.items()):
        journal.commit_block(index, {name: weight}, {})
    options: dict[str, Any] = {
        "outside_tensors": [("embed", torch.ones(2, 4)), ("norm", torch.zeros(4))],
        "config": {"model_type": "x"},
        "side_files": {},
        "texts": {"README.md": "# é"},
        "manifest": {"recipe": {}},
        **changes,
    }
    with journal:
        return out, write_result(journal, out, **options)


def read_all(out: Path) -> dict[str, torch.Tensor]:
    """Every tensor, through the index if there is one, as any reader would."""
    index = out / "model.safetensors.index.json"
    if not index.exists():
        return load_file(out / "model.safetensors")
    listed = json.loads(index.read_text())
    shards = {name: load_file(out / name) for name in set(listed["weight_map"].values())}
    tensors = {tensor: shards[shard][tensor] for tensor, shard in listed["weight_map"].items()}
    assert sum(len(shard) for shard in shards.values()) == len(tensors)
    assert listed["metadata"]["total_size"] == sum(t.numel() * t.element_size() for t in tensors.values())
    return tensors


@pytest.mark.parametrize(("shard_bytes", "shards"), [(1 << 30, 1), (240, 1), (239, 2), (128, 2), (64, 4), (1, 5)])
def test_shards_hold_every_tensor_once(tmp_path: Path, shard_bytes: int, shards: int) -> None:
    out, manifest = published(tmp_path, shard_bytes=shard_bytes)
    files = sorted(p.name for p in out.glob("*.safetensors"))
    assert len(files) == shards
    assert files == (
        ["model.safetensors"]
        if shards == 1
        else [f"model-{i:05d}-of-{shards:05d}.safetensors" for i in range(1, shards + 1)]
    )
    expected = {**WEIGHTS, "embed": torch.ones(2, 4), "norm": torch.zeros(4)}
    got = read_all(out)
    assert set(got) == set(expected) and all(torch.equal(got[name], expected[name]) for name in expected)
    assert list_differences(out) == [] and not partial_of(out).exists()
    assert set(manifest["files"]) == {p.name for p in out.iterdir()} - {"manifest.json"}
    assert (out / "README.md").read_text(encoding="utf-8") == "# é"


def test_tensors_outside_the_blocks_are_asked_for_one_at_a_time(tmp_path: Path) -> None:
    """Each is on disk before the next is made, so memory holds one."""

    def head() -> Any:
        for index in range(4):
            assert len(list((tmp_path / "out.partial" / "head").glob("*.safetensors"))) == index
            yield f"head.{index}", torch.ones(2)

    out, _ = published(tmp_path, outside_tensors=head())
    assert {"head.0", "head.3"} < set(read_all(out))


def test_the_same_run_gives_the_same_bytes(tmp_path: Path) -> None:
    manifests = [published(tmp_path / name)[1] for name in ("a", "b")]
    assert manifests[0] == manifests[1]


@pytest.mark.parametrize(
    "name", ["../x", "/x", "a/b/c/d/e/f/g", "manifest.json", "config\n", ".hidden", "model.safetensors", "a\\b", ""]
)
def test_texts_with_impossible_names(tmp_path: Path, name: str) -> None:
    with pytest.raises(OutputError, match="cannot hold a file called"):
        published(tmp_path, texts={name: "text"})
    assert not (tmp_path / "out").exists()


def test_two_tensors_of_one_name(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match=r"two tensors .* 'blocks\.1\.weight'"):
        published(tmp_path, outside_tensors=[("blocks.1.weight", torch.ones(1))])


def test_settle_leaves_an_unfinished_run_alone(tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert finish_interrupted_rename(out) is None
    with Journal.for_output(out).start_or_resume({}) as journal:
        journal.commit_block(0, {}, {})
    assert finish_interrupted_rename(out) is None
    assert (partial_of(out) / "blocks" / "0000.json").exists()
    (partial_of(out) / "sealed.json").write_text('{"manifest": "0"}')
    assert finish_interrupted_rename(out) is None
    assert (partial_of(out) / "blocks" / "0000.json").exists()
