"""The block that is read while another is quantized."""

from pathlib import Path

import pytest
import tiny_models
import torch

from leangrid.errors import LeangridError
from leangrid.models.prefetch import Prefetch
from leangrid.models.skeleton import Skeleton
from leangrid.storage.source import open_source


def test_a_prefetched_block_is_the_block(tmp_path: Path) -> None:
    skeleton = Skeleton(open_source(tiny_models.save("qwen2", tmp_path, sharded=True)))
    prefetch = Prefetch(skeleton, "cpu")
    assert prefetch.weights_of(0) is None
    prefetch.begin(1)
    weights = prefetch.weights_of(1)
    assert weights is not None and prefetch.weights_of(1) is None
    with skeleton.load_block(1, weights=weights) as block:
        model = tiny_models.build("qwen2")
        for name, parameter in block.named_parameters():
            assert torch.equal(parameter, model.get_parameter(f"{skeleton.block_name(1)}.{name}")), name
    assert all(p.is_meta for block in skeleton.blocks for p in block.parameters())
    prefetch.begin(2)  # there is no third block
    assert prefetch.weights_of(2) is None
    prefetch.begin(0)
    prefetch.close()


def test_an_error_of_prefetching_comes_when_the_block_is_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    skeleton = Skeleton(open_source(tiny_models.save("llama2", tmp_path)))

    def broken(_name: str) -> torch.Tensor:
        raise LeangridError("the disk is gone")

    prefetch = Prefetch(skeleton, "cpu")
    monkeypatch.setattr(skeleton, "read", broken)
    prefetch.begin(1)
    with pytest.raises(LeangridError, match="disk is gone"):
        prefetch.weights_of(1)
    prefetch.begin(1)
    prefetch.close()  # nobody asked: nothing is raised
