"""The de-duplicated affine search against the enumeration it stands for: every candidate (a, c), every weight."""

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from leangrid import kernels
from leangrid.kernels import plain

SHRINK = {4: 0.2, 3: 0.3, 2: 0.4, 8: 0.2}
MINIMUM = {None: 2.0**-126, torch.float32: 2.0**-126, torch.bfloat16: 2.0**-126, torch.float16: 2.0**-24}


def cost(weight: Tensor, share: Tensor, scale: Tensor, zero_point: Tensor, levels: int) -> Tensor:
    """sum g (quant(w) - w)^2 for many (S, Z) at once: weight, share f64 [n]; scale, zero_point f64 [c] -> [c]."""
    grid = scale[:, None] * (torch.arange(levels, dtype=torch.float64) - zero_point[:, None])
    distance = (weight[None, :, None] - grid[:, None, :]).abs().amin(2)
    return (share * distance**2).sum(1)


def literal(weight: Tensor, share: Tensor, bits: int, steps: int, symmetric: bool, dtype: torch.dtype | None) -> float:
    """The least objective over the paper's candidates, each tried on each weight."""
    t, levels, w = round(SHRINK[bits] * steps), 2**bits, weight.double()
    lo, hi = min(0.0, float(w.min())), max(0.0, float(w.max()))
    best = float("inf")
    if symmetric:
        s = torch.arange(2 * t - 1, dtype=torch.float64)
        size = (
            (2 * max(-lo, hi) * (1 - s / steps) / (levels - 1))
            .float()
            .to(dtype or torch.float32)
            .double()
            .clamp(min=MINIMUM[dtype])
        )
        middle = torch.full_like(size, levels // 2)
        return min(float(cost(w, share, sign * size, middle, levels).min()) for sign in (1.0, -1.0))
    for a in range(t):
        low = lo + a * (hi - lo) / steps
        high = hi - torch.arange(t, dtype=torch.float64) * (hi - lo) / steps
        scale = ((high - low) / (levels - 1)).float().to(dtype or torch.float32).double().clamp(min=MINIMUM[dtype])
        zero_point = torch.round(-low / scale).clamp(0, levels - 1)
        best = min(best, float(cost(w, share, scale, zero_point, levels).min()))
    return best


def rows(count: int, n: int, seed: int) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    weight = torch.randn(count, n, generator=g) * torch.exp(0.5 * torch.randn(count, n, generator=g)) * 0.05
    weight[0] = weight[0].abs() + 0.01  # one-sided: the range is extended to 0
    return weight, 10.0 ** (-3 * torch.rand(n, generator=g, dtype=torch.float64))


def check(weight: Tensor, share: Tensor, bits: int, steps: int, symmetric: bool, dtype: torch.dtype | None) -> None:
    n = weight.shape[1]
    scale, zero_point, reached = kernels.affine_search(weight, share, bits, steps, SHRINK[bits], n, symmetric, dtype)
    for r, row in enumerate(weight):
        want = literal(row, share, bits, steps, symmetric, dtype)
        mine = float(cost(row.double(), share, scale[r].double(), zero_point[r].double(), 2**bits))
        assert mine == pytest.approx(want, rel=1e-9)
        assert float(reached[r, 0]) == pytest.approx(mine, rel=1e-9)
    assert torch.equal(scale, scale.to(dtype or torch.float32).float())
    assert (scale != 0).all()
    assert symmetric or (scale > 0).all()
    assert int(zero_point.max()) < 2**bits
    assert not symmetric or (zero_point == 2 ** (bits - 1)).all()


@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", [4, 3, 2])
def test_equals_the_literal_enumeration(bits: int, symmetric: bool, dtype: torch.dtype | None) -> None:
    check(*rows(3, 48, seed=bits), bits, 256, symmetric, dtype)


@pytest.mark.parametrize("bits", [4, 3, 2])
def test_equals_the_literal_enumeration_on_real_rows(bits: int, minilm: Path) -> None:
    with safe_open(minilm / "model.safetensors", "pt") as file:
        names = [n for n in file.keys() if n.endswith("weight") and ".layer." in n and "LayerNorm" not in n]  # noqa: SIM118
        weight = torch.stack([file.get_tensor(n)[11, :384] for n in names[::12]])
    check(weight, rows(1, 384, seed=1)[1], bits, 256, False, None)


@pytest.mark.parametrize(("bits", "steps"), [(4, 5), (4, 16), (4, 24), (3, 6), (2, 3), (8, 100), (8, 300)])
def test_zero_points_may_skip_values_when_steps_are_few(bits: int, steps: int) -> None:
    """Where one step moves -lo/S by more than 1, not every integer between the extremes is a candidate."""
    check(*rows(4, 40, seed=steps), bits, steps, False, None)


def test_both_paths_pick_the_same_pair(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, share = rows(6, 128, seed=2)
    mine = kernels.affine_search(weight, share, 4, 2048, 0.2, 32, False, torch.bfloat16)
    monkeypatch.setenv("LEANGRID_KERNELS", "torch")
    for ours, twin in zip(
        mine, kernels.affine_search(weight, share, 4, 2048, 0.2, 32, False, torch.bfloat16), strict=True
    ):
        assert ours.shape == (6, 4)
        assert torch.equal(ours, twin)


def test_groups_are_searched_one_by_one() -> None:
    weight, share = rows(3, 96, seed=4)
    whole = kernels.affine_search(weight, share, 3, 512, 0.3, 32)
    for group in range(3):
        part = slice(32 * group, 32 * (group + 1))
        alone = kernels.affine_search(weight[:, part], share[part], 3, 512, 0.3, 32)
        assert torch.equal(whole[0][:, group], alone[0][:, 0])
        assert torch.equal(whole[1][:, group], alone[1][:, 0])
        assert torch.allclose(whole[2][:, group], alone[2][:, 0], rtol=1e-12)


def test_importance_of_each_row_is_used() -> None:
    weight, share = rows(2, 64, seed=8)
    each = torch.stack([share, share.flip(0)])
    both = kernels.affine_search(weight, each, 3, 256, 0.3, 64)
    for r in range(2):
        alone = kernels.affine_search(weight[r : r + 1], each[r], 3, 256, 0.3, 64)
        assert all(torch.equal(x[r], y[0]) for x, y in zip(both[:2], alone[:2], strict=True))


ODD = {
    "zeros": torch.zeros(1, 32),
    "constant": torch.full((1, 32), 0.3),
    "negative_constant": torch.full((1, 32), -0.3),
    "one_weight": torch.tensor([[0.0] * 31 + [1.0]]),
    "huge": torch.linspace(-1, 1, 32)[None] * 3e38,
    "tiny": torch.linspace(-1e-7, 2e-7, 32)[None],
    "subnormal": torch.linspace(-1e-40, 1e-40, 32)[None],
    "outlier": torch.cat([torch.linspace(-1, 1, 31)[None], torch.tensor([[1e6]])], dim=1),
}


@pytest.mark.fault("N11")
@pytest.mark.parametrize("path", ["native", "torch"])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", sorted(ODD))
def test_odd_groups_have_a_finite_scale_that_is_not_zero(
    name: str, dtype: torch.dtype | None, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if path == "torch":
        monkeypatch.setenv("LEANGRID_KERNELS", "torch")
    row = ODD[name]
    for symmetric in (False, True):
        for share in (torch.ones(32, dtype=torch.float64), torch.zeros(32, dtype=torch.float64)):
            scale, zero_point, reached = kernels.affine_search(row, share, 4, 256, 0.2, 32, symmetric, dtype)
            stored = scale.to(dtype or torch.float32)
            assert stored.isfinite().all()
            assert (stored != 0).all()
            assert (reached >= 0).all()
            if name == "zeros":
                assert float(scale) == 1.0
                assert float(reached) == 0.0
            if name.endswith("constant") and share.any():
                code = torch.round(row / scale + zero_point).clamp(0, 15)
                assert torch.allclose(scale * (code - zero_point), row, rtol=0.01)


def test_a_negative_scale_is_chosen_where_the_longer_side_is_positive() -> None:
    weight = torch.tensor([[8.0, 7.0, -7.0, 1.0, -3.0]])  # integers: S = -1 reaches +8 exactly
    scale, zero_point, reached = kernels.affine_search(weight, torch.ones(5, dtype=torch.float64), 4, 16, 0.2, 5, True)
    assert float(scale) == -1.0
    assert int(zero_point) == 8
    assert float(reached) == 0.0


def test_torch_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, share = rows(9, 64, seed=3)
    each = share.expand(9, -1).contiguous()
    whole = plain.affine_search(weight, each, 4, 256, 0.2, 32, False, None)
    monkeypatch.setattr("leangrid.kernels.plain.affine.CHUNK_CANDIDATES", 1)
    for one, many in zip(plain.affine_search(weight, each, 4, 256, 0.2, 32, False, None), whole, strict=True):
        assert torch.equal(one, many)
