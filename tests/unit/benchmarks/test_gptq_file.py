"""Files of GPTQModel are read as their layout says."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file


def packed(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """The codes of the last dimension in int32 words, least significant bit first, bit by bit."""
    words = torch.zeros(*codes.shape[:-1], codes.shape[-1] * bits // 32, dtype=torch.int64)
    for i in range(codes.shape[-1] * bits):
        words[..., i // 32] |= (codes[..., i // bits].long() >> i % bits & 1) << i % 32
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)


@pytest.mark.parametrize("bits", [3, 4])
@pytest.mark.parametrize(("form", "offset"), [("gptq", 1), ("gptq_v2", 0)])
def test_a_gptq_file_is_read_as_its_layout_says(bench: Any, tmp_path: Path, form: str, offset: int, bits: int) -> None:
    g = torch.Generator().manual_seed(0)
    rows, cols, group = (
        32,
        96,
        torch.tensor([0, 2, 1] * 32, dtype=torch.int32),
    )  # an elimination order may mix the groups
    codes, zeros = (torch.randint(0, 2**bits, shape, generator=g) for shape in ((rows, cols), (rows, 3)))
    zeros[0, 0] = 0  # is the largest code in a file that holds zero - 1
    scales = torch.rand(rows, 3, generator=g).half()
    wanted = torch.empty(rows, cols)
    for r in range(rows):
        for c in range(cols):
            wanted[r, c] = scales[r, group[c]].float() * (codes[r, c] - zeros[r, group[c]])
    stored = {
        "a.qweight": packed(codes, bits).T.contiguous(),  # the codes of a row go down its column of words
        "a.qzeros": packed(((zeros - offset) % 2**bits).T.contiguous(), bits),
        "a.scales": scales.T.contiguous(),
        "a.g_idx": group,
        "norm.weight": torch.ones(3, dtype=torch.bfloat16),
    }
    packed_dir, out = tmp_path / "packed", tmp_path / "dense"
    packed_dir.mkdir()
    save_file(stored, packed_dir / "model.safetensors")
    quantization = {"bits": bits, "checkpoint_format": form}
    (packed_dir / "config.json").write_text(
        json.dumps({"model_type": "llama", "quantization_config": quantization}), encoding="utf-8"
    )
    bench("common.gptq_file").dequantize(packed_dir, out)
    from leangrid.storage import safetensors

    found = safetensors.load(out / "model.safetensors")
    assert found.keys() == {"a.weight", "norm.weight"} and found["norm.weight"].dtype == torch.float32
    assert torch.equal(found["a.weight"], wanted)
    config = json.loads((out / "config.json").read_text(encoding="utf-8"))
    assert config == {"model_type": "llama", "dtype": "float32"}


def test_other_layouts_are_refused(bench: Any, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(
        json.dumps({"quantization_config": {"bits": 5, "checkpoint_format": "gptq"}}), encoding="utf-8"
    )
    with pytest.raises(SystemExit, match="5 bits"):
        bench("common.gptq_file").dequantize(tmp_path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_agreement_is_the_mean_divergence(bench: Any) -> None:
    theirs = torch.tensor([[0.0, 0.0], [1.0, 1.0]])
    assert bench("common.gptq_file").agreement(theirs + 3.0, theirs) == pytest.approx(0.0, abs=1e-12)
    ours = torch.tensor([[0.0, 0.0], [0.0, torch.log(torch.tensor(3.0))]])
    expected = (0.5 * torch.log(torch.tensor(0.5 / 0.25)) + 0.5 * torch.log(torch.tensor(0.5 / 0.75))) / 2
    assert bench("common.gptq_file").agreement(ours, theirs) == pytest.approx(float(expected), rel=1e-6)
