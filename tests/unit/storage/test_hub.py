"""storage/hub.py: hub ids are found in the cache of the hub's client, without a network."""

import os
from pathlib import Path

import pytest
import tiny_models
import torch

from leangrid.errors import CheckpointError
from leangrid.recipe import Recipe
from leangrid.run.quantize import quantize
from leangrid.storage.hub import locate_source
from leangrid.storage.source import open_source

REVISION = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """``org/tiny`` in the layout of the hub's cache: blobs by hash, snapshots of links, refs that name a revision."""
    import huggingface_hub.constants as constants

    plain = tiny_models.save("llama2", tmp_path / "plain")
    repo = tmp_path / "hub" / "models--org--tiny"
    snapshot = repo / "snapshots" / REVISION
    for directory in (repo / "blobs", repo / "refs", snapshot):
        directory.mkdir(parents=True)
    (repo / "refs" / "main").write_text(REVISION)
    for number, path in enumerate(sorted(plain.iterdir())):
        blob = repo / "blobs" / f"{number:040x}"
        blob.write_bytes(path.read_bytes())
        (snapshot / path.name).symlink_to(os.path.relpath(blob, snapshot))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub._snapshot_download.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return snapshot


@pytest.mark.parametrize("name", ["org/tiny", f"org/tiny@{REVISION}", "org/tiny@main"])
def test_a_hub_id_is_found_in_the_cache(hub: Path, name: str) -> None:
    assert locate_source(name).resolve() == hub.resolve()
    side_files = open_source(locate_source(name)).side_files()
    assert "tokenizer.json" in side_files, "links into the cache's blobs are the checkpoint's own"


def test_a_hub_id_quantizes(hub: Path, tmp_path: Path) -> None:
    windows = torch.randint(4, 512, (2, 16), generator=torch.Generator().manual_seed(0))
    result = quantize("org/tiny", tmp_path / "out", Recipe(scheme="NU4"), windows=windows)
    tokenizer = tmp_path / "out" / "tokenizer.json"
    assert result.layers == 14 and tokenizer.is_file() and not tokenizer.is_symlink()


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("org/absent", "hub cannot be reached"),
        ("org/tiny@feature", "hub cannot be reached"),
        ("no-such-directory", "no such directory"),
        ("a/b/c", "no such directory"),
    ],
)
def test_what_is_nowhere_is_refused_with_what_was_tried(hub: Path, name: str, expected: str) -> None:
    with pytest.raises(CheckpointError, match=expected):
        locate_source(name)
