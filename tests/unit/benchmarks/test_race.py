"""The race's pure parts: what is read from a peer's file, which tokens count as seen, and what a line says."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file


def packed(codes: torch.Tensor) -> torch.Tensor:
    """4-bit codes of the last dimension, eight in an int32 word, least significant first: a literal loop."""
    words = torch.zeros(*codes.shape[:-1], codes.shape[-1] // 8, dtype=torch.int64)
    for i in range(codes.shape[-1]):
        words[..., i // 8] |= codes[..., i].long() << 4 * (i % 8)
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)


@pytest.mark.parametrize(("form", "offset"), [("gptq", 1), ("gptq_v2", 0)])
def test_a_gptq_file_is_read_as_its_layout_says(bench: Any, tmp_path: Path, form: str, offset: int) -> None:
    g = torch.Generator().manual_seed(0)
    rows, cols, group = (
        16,
        24,
        torch.tensor([0, 2, 1] * 8, dtype=torch.int32),
    )  # an elimination order may mix the groups
    codes, zeros = (torch.randint(0, 16, shape, generator=g) for shape in ((rows, cols), (rows, 3)))
    zeros[0, 0] = 0  # is 15 in a file that holds zero - 1
    scales = torch.rand(rows, 3, generator=g).half()
    wanted = torch.empty(rows, cols)
    for r in range(rows):
        for c in range(cols):
            wanted[r, c] = scales[r, group[c]].float() * (codes[r, c] - zeros[r, group[c]])
    stored = {
        "a.qweight": packed(codes).T.contiguous(),
        "a.qzeros": packed(((zeros - offset) % 16).T.contiguous()),
        "a.scales": scales.T.contiguous(),
        "a.g_idx": group,
        "norm.weight": torch.ones(3, dtype=torch.bfloat16),
    }
    packed_dir, out = tmp_path / "packed", tmp_path / "dense"
    packed_dir.mkdir()
    # eight codes of a column go down the rows of qweight
    stored["a.qweight"] = packed(codes).T.contiguous()
    save_file(stored, packed_dir / "model.safetensors")
    quantization = {"bits": 4, "checkpoint_format": form}
    (packed_dir / "config.json").write_text(
        json.dumps({"model_type": "llama", "quantization_config": quantization}), encoding="utf-8"
    )
    bench("gptq_file").dequantize(packed_dir, out)
    from leangrid.storage import safetensors

    found = safetensors.load(out / "model.safetensors")
    assert found.keys() == {"a.weight", "norm.weight"} and found["norm.weight"].dtype == torch.float32
    assert torch.equal(found["a.weight"], wanted)
    config = json.loads((out / "config.json").read_text(encoding="utf-8"))
    assert config == {"model_type": "llama", "dtype": "float32"}


def test_other_layouts_are_refused(bench: Any, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(
        json.dumps({"quantization_config": {"bits": 3, "checkpoint_format": "gptq"}}), encoding="utf-8"
    )
    with pytest.raises(SystemExit, match="3 bits"):
        bench("gptq_file").dequantize(tmp_path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_agreement_is_the_mean_divergence(bench: Any) -> None:
    theirs = torch.tensor([[0.0, 0.0], [1.0, 1.0]])
    assert bench("gptq_file").agreement(theirs + 3.0, theirs) == pytest.approx(0.0, abs=1e-12)
    ours = torch.tensor([[0.0, 0.0], [0.0, torch.log(torch.tensor(3.0))]])
    expected = (0.5 * torch.log(torch.tensor(0.5 / 0.25)) + 0.5 * torch.log(torch.tensor(0.5 / 0.75))) / 2
    assert bench("gptq_file").agreement(ours, theirs) == pytest.approx(float(expected), rel=1e-6)


@pytest.fixture
def tokens(bench: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(torch.nn.Embedding, "forward", torch.nn.Embedding.forward)  # what Tokens replaces comes back
    return bench("peers/seen").Tokens()


WINDOWS = torch.tensor([[1, 2, 3], [4, 5, 6], [1, 2, 3]])


def test_the_same_windows_in_any_order_and_often_are_the_same_tokens(tokens: Any) -> None:
    layer = torch.nn.Embedding(9, 2)
    for batch in (WINDOWS[1:2], WINDOWS[:1], WINDOWS[2:], WINDOWS):
        layer(batch)
    assert tokens.check(WINDOWS) == 18


@pytest.mark.parametrize(
    "seen",
    [
        [],
        [[[1, 2, 3, 0], [4, 5, 6, 0], [1, 2, 3, 0]]],  # padded
        [[[1, 2], [4, 5], [1, 2]]],  # cut
        [[[1, 2, 3], [4, 5, 6]]],  # a window less
        [[[1, 2, 3], [4, 5, 6], [4, 5, 6]]],  # another one instead
        [[[1, 2, 3], [4, 5, 7], [1, 2, 3]]],  # other tokens
        [[[1, 2, 3], [4, 5, 6], [1, 2, 3]], [[4, 5, 6]]],  # one of them once more
    ],
)
def test_other_tokens_are_noticed(tokens: Any, seen: list[list[list[int]]]) -> None:
    layer = torch.nn.Embedding(9, 2)
    for batch in seen:
        layer(torch.tensor(batch))
    with pytest.raises(RuntimeError):
        tokens.check(WINDOWS)


def measured(seconds: float, cpu: float, peak: int) -> dict[str, Any]:
    return {
        "seconds": seconds,
        "with_files": seconds + 1,
        "process_seconds": seconds + 2,
        "cpu_seconds": cpu,
        "peak_ram_bytes": peak,
    }


def test_ratios_are_those_within_a_round(bench: Any) -> None:
    ours = [measured(10.0, 20.0, 5), measured(20.0, 22.0, 7), measured(10.0, 21.0, 6)]
    peer = [measured(30.0, 60.0, 10), measured(80.0, 66.0, 10), measured(20.0, 63.0, 14)]
    found = bench("race").summary(ours, {"other": peer})
    assert found["seconds"] == 10.0 and found["rounds_seconds"] == [10.0, 20.0, 10.0]
    assert found["speedup_over"] == {"other": 3.0}  # 3, 4, 2: not 30 / 10 of the medians by chance
    assert found["speedup_over_cpu_seconds"] == {"other": 3.0}
    assert found["peak_ram_bytes"] == 7 and found["peak_ram_share_of"] == {"other": 0.5}


def test_every_peer_has_its_packages_and_its_runner(bench: Any) -> None:
    race, here = bench("race"), bench("peer").HERE
    for name, _ in race.PEERS.values():
        pinned = (here / f"{name}.txt").read_text(encoding="utf-8").split()
        assert all("==" in line for line in pinned) and any(line.startswith("torch==") for line in pinned)
        compile((here / f"run_{name}.py").read_text(encoding="utf-8"), name, "exec")


def test_a_failed_peer_shows_its_last_words(bench: Any, tmp_path: Path) -> None:
    peer = bench("peer").Peer("gptqmodel", tmp_path)
    peer.python.parent.mkdir(parents=True)
    peer.python.write_text("#!/bin/sh\necho broken; exit 3\n", encoding="utf-8")
    peer.python.chmod(0o755)
    with pytest.raises(SystemExit, match=r"(?s)gptqmodel ended with 3.*broken"):
        peer.quantize({"out": str(tmp_path / "out"), "threads": 1}, tmp_path)
