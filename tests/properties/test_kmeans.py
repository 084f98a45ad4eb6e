"""Weighted one-dimensional k-means: the optimum is the optimum, and no row is too odd for K sorted finite levels."""

import itertools
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from torch import Tensor

from leangrid import kernels
from leangrid.kernels import plain

Fit = Callable[[Tensor, Tensor, int], tuple[Tensor, Tensor]]
PATHS: dict[str, Fit] = {"dispatched": kernels.kmeans_dp, "torch": plain.kmeans_dp}
both = pytest.mark.parametrize("path", sorted(PATHS))


def objective(row: Tensor, share: Tensor, levels: Tensor) -> float:
    """sum g (nearest level - w)^2 in float64, every weight against every level."""
    distance = (row.double()[:, None] - levels.double()[None, :]).abs().amin(1)
    return float((share * distance**2).sum())


def brute_force(row: np.ndarray, share: np.ndarray, k: int) -> float:
    """The least cost over EVERY assignment of weights to k clusters, contiguous or not."""
    labels = np.array(list(itertools.product(range(k), repeat=len(row))))
    cost = np.zeros(len(labels))
    for cluster in range(k):
        g = np.where(labels == cluster, share, 0.0)
        mass = g.sum(1)
        mean = (g * row).sum(1) / np.where(mass > 0, mass, 1.0)
        cost += (g * (row - mean[:, None]) ** 2).sum(1)
    return float(cost.min())


values = st.one_of(st.floats(-4, 4, width=32), st.sampled_from([-1.0, 0.0, -0.0, 0.5, 1.0, 1000.0]))
weights = st.one_of(st.floats(1e-3, 10), st.sampled_from([0.0, 1.0]))


@pytest.mark.fault("N8")
@both
@given(pairs=st.lists(st.tuples(values, weights), min_size=1, max_size=6), k=st.integers(1, 4))
def test_the_dynamic_program_equals_brute_force(path: str, pairs: list[tuple[float, float]], k: int) -> None:
    row, share = torch.tensor([[v for v, _ in pairs]]), torch.tensor([g for _, g in pairs], dtype=torch.float64)
    levels, reached = PATHS[path](row, share, k)
    best = brute_force(row[0].double().numpy(), share.numpy(), k)
    energy = float((share * row[0].double() ** 2).sum())
    assert abs(objective(row[0], share, levels[0]) - float(reached[0])) <= 1e-12 * energy
    assert float(reached[0]) <= best * (1 + 1e-9) + 1e-12 * energy  # levels are rounded to float32
    assert float(reached[0]) >= best * (1 - 1e-9) - 1e-12 * energy
    assert levels.isfinite().all()
    assert (levels.diff(dim=1) >= 0).all()


def heavy_rows(rows: int, n: int, seed: int) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, n, generator=g) * torch.exp(0.6 * torch.randn(rows, n, generator=g)) * 0.05
    return weight, 10.0 ** (-3 * torch.rand(n, generator=g, dtype=torch.float64))


def never_worse_than_scikit_learn(weight: Tensor, share: Tensor, k: int) -> None:
    cluster = pytest.importorskip("sklearn.cluster")
    levels, reached = kernels.kmeans_dp(weight, share, k)
    for row, level, ours in zip(weight, levels, reached, strict=True):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            theirs = (
                cluster.KMeans(k, n_init=10, random_state=0)
                .fit(row.double().numpy()[:, None], sample_weight=share.numpy())
                .inertia_
            )
        assert float(ours) <= theirs * (1 + 1e-9)
        assert objective(row, share, level) == pytest.approx(float(ours), rel=1e-12)


@pytest.mark.parametrize("k", [4, 8, 16])
def test_never_worse_than_scikit_learn_on_heavy_tails(k: int) -> None:
    never_worse_than_scikit_learn(*heavy_rows(4, 300, seed=k), k)


def real_rows(directory: Path, count: int) -> Tensor:
    """``count`` rows of 384 columns spread over the encoder's linear layers."""
    with safe_open(directory / "model.safetensors", "pt") as file:
        names = [n for n in file.keys() if n.endswith("weight") and ".layer." in n and "LayerNorm" not in n]  # noqa: SIM118
        each = -(-count // len(names))
        return torch.cat([file.get_tensor(n)[::37, :384][:each] for n in names])[:count].contiguous()


@pytest.mark.parametrize("k", [8, 16])
def test_never_worse_than_scikit_learn_on_real_rows(k: int, minilm: Path) -> None:
    weight = real_rows(minilm, 12)
    never_worse_than_scikit_learn(weight, heavy_rows(1, 384, seed=3)[1], k)


@pytest.mark.slow
@pytest.mark.parametrize("k", [4, 8, 16])
def test_never_worse_than_scikit_learn_on_200_real_rows(k: int, minilm: Path) -> None:
    weight = real_rows(minilm, 200)
    assert weight.shape == (200, 384)
    never_worse_than_scikit_learn(weight, heavy_rows(1, 384, seed=3)[1], k)


@pytest.mark.parametrize("k", [2, 4, 8, 16, 32])
def test_lloyd_lies_between_the_optimum_and_its_start(k: int) -> None:
    weight, share = heavy_rows(40, 500, seed=5)
    best, local = kernels.kmeans_dp(weight, share, k)[1], kernels.kmeans_lloyd(weight, share, k)[1]
    once = kernels.kmeans_lloyd(weight, share, k, 1)[1]
    assert (local >= best * (1 - 1e-9)).all()
    assert (local <= once * (1 + 1e-9)).all()
    if k > 8:  # the density start; a uniform one (the authors') may end far from the optimum
        assert float((local / best).mean()) < 1.3


def test_lloyd_stops_at_a_fixed_point() -> None:
    weight, share = heavy_rows(10, 200, seed=6)
    levels, _ = kernels.kmeans_lloyd(weight, share, 8, 10_000)
    for row, level in zip(weight.double(), levels.double(), strict=True):
        nearest = (row[:, None] - level).abs().argmin(1)
        for c in range(8):
            inside = nearest == c
            assert inside.any()
            assert float((share * row)[inside].sum() / share[inside].sum()) == pytest.approx(
                float(level[c]), rel=1e-5, abs=1e-7
            )


ODD = {
    "constant": torch.full((1, 40), 0.25),
    "zeros": torch.zeros(1, 40),
    "two_values": torch.tensor([[1.0, -1.0] * 20]),
    "few_values": torch.tensor([[0.0, 1.0, 2.0, 5.0] * 10]),
    "one_weight": torch.tensor([[0.7]]),
    "outlier_above": torch.cat([torch.linspace(-1, 1, 39)[None], torch.full((1, 1), 1e8)], dim=1),
    "outlier_below": torch.cat([torch.linspace(-1, 1, 39)[None], torch.full((1, 1), -1e8)], dim=1),
    "huge": torch.linspace(-1, 1, 40)[None] * 3e38,
    "tiny": torch.linspace(-1e-40, 1e-40, 40)[None],
}


@pytest.mark.fault("N8")
@pytest.mark.parametrize("path", ["native", "torch"])
@pytest.mark.parametrize("name", sorted(ODD))
@pytest.mark.parametrize("k", [1, 4, 16])
def test_odd_rows_have_sorted_finite_levels(name: str, k: int, path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if path == "torch":
        monkeypatch.setenv("LEANGRID_KERNELS", "torch")
    row = ODD[name]
    for share in (torch.ones(row.shape[1], dtype=torch.float64), torch.zeros(row.shape[1], dtype=torch.float64),
                  torch.logspace(-300, 300, row.shape[1], dtype=torch.float64)):  # fmt: skip
        for fit in (kernels.kmeans_dp, kernels.kmeans_lloyd):
            levels, reached = fit(row, share, k)
            assert levels.isfinite().all()
            assert (levels.diff(dim=1) >= 0).all()
            assert levels.min() >= row.min()
            assert levels.max() <= row.max()
            assert (reached >= 0).all()
            if len(row.unique()) <= k:
                assert set(levels[0].tolist()) == set(row[0].tolist())
                assert float(reached[0]) == 0.0


@pytest.mark.parametrize("name", ["outlier_above", "outlier_below"])
def test_an_outlier_costs_the_bulk_no_precision(name: str) -> None:
    row, share = ODD[name], torch.ones(40, dtype=torch.float64)
    bulk = row[row.abs() < 2][None]
    reached = kernels.kmeans_dp(row, share, 5)[1]
    alone = kernels.kmeans_dp(bulk, share[:39], 4)[1]
    assert float(reached[0]) == pytest.approx(float(alone[0]), rel=1e-9)


def test_importance_has_no_scale() -> None:
    weight, share = heavy_rows(6, 100, seed=9)
    levels, reached = kernels.kmeans_dp(weight, share, 8)
    for factor in (1e-200, 3.0, 1e200):
        scaled, cost = kernels.kmeans_dp(weight, share * factor, 8)
        assert torch.allclose(scaled, levels, rtol=1e-6)
        assert torch.allclose(cost, reached * factor, rtol=1e-9)
