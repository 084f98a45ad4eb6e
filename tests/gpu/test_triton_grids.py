"""The Triton kernels of the grids give what their torch twins give, and an NVIDIA compiler accepts them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from leangrid import kernels
from leangrid.kernels import plain

# The interpreter computes with numpy, which warns where a GPU silently rounds 5e39 to infinity.
pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("ignore:overflow encountered in cast:RuntimeWarning")]


def rows(count: int, n: int, seed: int) -> tuple[Tensor, Tensor]:
    """Heavy-tailed weights, one row of them positive, and importances over three decades."""
    g = torch.Generator().manual_seed(seed)
    weight = torch.randn(count, n, generator=g) * torch.exp(0.5 * torch.randn(count, n, generator=g)) * 0.05
    weight[0] = weight[0].abs() + 0.01
    return weight, 10.0 ** (-3 * torch.rand(n, generator=g, dtype=torch.float64))


def energy(weight: Tensor, share: Tensor, groups: int) -> Tensor:
    """sum g w^2 of every group, f64 [rows, groups]: the size of the sums that an objective is a difference of."""
    return (share * weight.double() ** 2).reshape(len(weight), groups, -1).sum(2)


# ------------------------------------------------------------------------------------------------ affine


def check_affine(device: torch.device, weight: Tensor, share: Tensor, bits: int, steps: int, shrink: float, group: int,
                 symmetric: bool = False, dtype: torch.dtype | None = None) -> None:  # fmt: skip
    """The twin's pair wherever no other comes within 1e-12 of its objective, and the objective of the pair
    everywhere."""
    ours = [
        x.cpu()
        for x in kernels.affine_search(
            weight.to(device), share.to(device), bits, steps, shrink, group, symmetric, dtype
        )
    ]
    unit = torch.frexp(share.amax(-1, keepdim=True)).exponent
    twin = plain.affine_search(
        weight.contiguous(), torch.ldexp(share, -unit).contiguous(), bits, steps, shrink, group, symmetric, dtype
    )
    reached, best = ours[2], torch.ldexp(twin[2], unit)
    slack = 1e-12 * energy(weight, share, weight.shape[1] // group)
    assert [x.dtype for x in ours] == [torch.float32, torch.uint8, torch.float64]
    assert (ours[0] != 0).all() and ours[0].isfinite().all()
    assert torch.equal(ours[0], ours[0].to(dtype or torch.float32).float())
    same = (ours[0] == twin[0]) & (ours[1] == twin[1])
    assert ((reached - best).abs()[~same] <= slack[~same]).all()
    assert ((reached - best).abs()[same] <= (1e-10 * best)[same]).all()
    assert same.float().mean() >= 0.5  # ties are the exception


F16, BF16, F32 = torch.float16, torch.bfloat16, torch.float32


@pytest.mark.parametrize(
    ("bits", "steps", "shrink", "symmetric", "dtype"),
    [
        (4, 256, 0.2, False, None),
        (4, 256, 0.2, False, BF16),
        (4, 256, 0.2, True, F16),
        (3, 200, 0.3, False, F16),
        (3, 200, 0.3, True, F32),
        (2, 128, 0.4, False, F32),
        (2, 128, 0.4, True, None),
        (8, 60, 0.2, False, BF16),
        (8, 60, 0.2, True, None),
        (1, 50, 0.2, False, None),
        (5, 64, 0.2, False, None),
    ],
)
def test_affine_is_its_twin(
    bits: int, steps: int, shrink: float, symmetric: bool, dtype: torch.dtype | None, device: torch.device
) -> None:
    check_affine(device, *rows(2, 72, seed=bits), bits, steps, shrink, 36, symmetric, dtype)


@pytest.mark.parametrize(
    ("bits", "steps", "shrink"),
    [(4, 5, 0.2), (4, 24, 0.2), (3, 6, 0.3), (2, 3, 0.4), (8, 40, 0.2), (4, 1, 0.1), (4, 16, 0.49)],
)
def test_affine_with_few_steps_skips_zero_points_as_its_twin(
    bits: int, steps: int, shrink: float, device: torch.device
) -> None:
    check_affine(device, *rows(3, 40, seed=steps), bits, steps, shrink, 40)


@pytest.mark.parametrize(("count", "n", "group"), [(1, 1, 1), (3, 2, 1), (1, 700, 700), (5, 33, 11), (2, 130, 130)])
def test_affine_shapes(count: int, n: int, group: int, device: torch.device) -> None:
    check_affine(device, *rows(count, n, seed=n), 4, 40, 0.2, group)


ODD = {
    "zeros": torch.zeros(1, 32),
    "constant": torch.full((1, 32), 0.3),
    "negative_constant": torch.full((1, 32), -0.3),
    "one_weight": torch.tensor([[0.0] * 31 + [1.0]]),
    "duplicates": torch.tensor([[1.0, -1.0, 0.5, -0.0] * 8]),
    "huge": torch.linspace(-1, 1, 32)[None] * 3e38,
    "tiny": torch.linspace(-1e-7, 2e-7, 32)[None],
    "subnormal": torch.linspace(-1e-40, 1e-40, 32)[None],
    "outlier": torch.cat([torch.linspace(-1, 1, 31)[None], torch.tensor([[1e6]])], dim=1),
}


@pytest.mark.parametrize("dtype", [None, torch.float16])
@pytest.mark.parametrize("name", sorted(ODD))
def test_affine_on_odd_groups(name: str, dtype: torch.dtype | None, device: torch.device) -> None:
    share = torch.ones(32, dtype=torch.float64)
    share[::3] = 0.0
    for symmetric in (False, True):
        scale, zero_point, reached = (x.cpu() for x in kernels.affine_search(
            ODD[name].to(device), share.to(device), 4, 64, 0.2, 32, symmetric, dtype))  # fmt: skip
        twin = plain.affine_search(ODD[name], share, 4, 64, 0.2, 32, symmetric, dtype)
        assert float((reached - twin[2]).abs()) <= 1e-12 * float(energy(ODD[name], share, 1)) + 1e-10 * float(twin[2])
        assert float(scale.to(dtype or torch.float32)) not in (0.0, float("inf"), float("-inf"))
        if name == "zeros":
            assert (float(scale), int(zero_point), float(reached)) == (1.0, 8 if symmetric else 0, 0.0)


def test_affine_reads_views_chunks_and_importances_of_each_row(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight, share = rows(20, 2, seed=3)
    each = torch.stack([share, share.flip(0), share + 0.5]).repeat(7, 1)[:20].contiguous()
    whole = kernels.affine_search(weight.T.to(device), each.T.to(device), 3, 50, 0.3, 10)
    check_affine(device, weight.T, each.T, 3, 50, 0.3, 10)
    monkeypatch.setattr("leangrid.kernels.triton.affine.CHUNK_ELEMENTS", 20)
    for one, many in zip(
        kernels.affine_search(weight.T.to(device), each.T.to(device), 3, 50, 0.3, 10), whole, strict=True
    ):
        assert torch.equal(one, many)
    weight, share = rows(3, 12, seed=5)
    shared = kernels.affine_search(weight.to(device), share.to(device), 3, 50, 0.3, 6)
    one_by_one = kernels.affine_search(weight.to(device), share.expand(3, -1).to(device), 3, 50, 0.3, 6)
    assert all(torch.equal(x, y) for x, y in zip(shared, one_by_one, strict=True))


# ------------------------------------------------------------------------------------------------ k-means


def check_kmeans(
    device: torch.device, weight: Tensor, share: Tensor, levels: int, iterations: int | None = None
) -> None:
    """Levels within float32 rounding of the twin's, objectives within 1e-10."""
    more = () if iterations is None else (iterations,)
    op = "kmeans_dp" if iterations is None else "kmeans_lloyd"
    ours, reached = (x.cpu() for x in getattr(kernels, op)(weight.to(device), share.to(device), levels, *more))
    unit, zero = torch.frexp(share.amax(-1, keepdim=True)).exponent, share.amax(-1, keepdim=True) == 0
    twin, best = getattr(plain, op)(
        weight.contiguous(), torch.where(zero, 1.0, torch.ldexp(share, -unit)).contiguous(), levels, *more
    )
    best = torch.where(zero.reshape(-1), 0.0, torch.ldexp(best, unit.reshape(-1)))
    assert (ours.dtype, reached.dtype) == (torch.float32, torch.float64)
    assert (ours.diff(dim=1) >= 0).all()
    assert ((ours - twin).abs() <= 2e-7 * twin.abs() + 1e-45).all()
    assert ((reached - best).abs() <= 1e-10 * best).all()


@pytest.mark.parametrize(
    ("count", "n", "levels"),
    [(1, 1, 1), (1, 1, 4), (2, 2, 2), (3, 40, 2), (3, 41, 3), (2, 50, 4), (1, 40, 8), (1, 33, 16), (1, 600, 3)],
)
def test_the_dynamic_program_is_its_twin(count: int, n: int, levels: int, device: torch.device) -> None:
    check_kmeans(device, *rows(count, n, seed=n), levels)


@pytest.mark.parametrize(
    ("count", "n", "levels", "iterations"),
    [
        (1, 1, 1, 5),
        (2, 40, 2, 100),
        (3, 41, 3, 1),
        (3, 90, 4, 100),
        (2, 300, 8, 100),
        (2, 300, 16, 100),
        (1, 60, 33, 100),
    ],
)
def test_lloyd_is_its_twin(count: int, n: int, levels: int, iterations: int, device: torch.device) -> None:
    check_kmeans(device, *rows(count, n, seed=n), levels, iterations)


@pytest.mark.parametrize("name", sorted(ODD))
def test_kmeans_on_odd_rows(name: str, device: torch.device) -> None:
    row, share = ODD[name], torch.ones(32, dtype=torch.float64)
    share[::3] = 0.0
    for given in (share, torch.zeros_like(share)):
        check_kmeans(device, row, given, 3)
        check_kmeans(device, row, given, 9, 20)


def test_levels_without_importance_move_as_in_the_twin(device: torch.device) -> None:
    weight, share = rows(3, 120, seed=5)
    weight[1, :4] = torch.tensor([5.0, -7.0, 30.0, 31.0])  # uniform starts leave most levels empty
    weight[2] = weight[2].round(decimals=1)
    share[::2] = 0.0
    for levels in (4, 8, 12):
        check_kmeans(device, weight, share, levels, 100)


def test_kmeans_reads_views_and_importances_of_each_row(device: torch.device) -> None:
    weight, share = rows(24, 3, seed=4)
    each = torch.stack([share, share.flip(0)]).repeat(12, 1)
    check_kmeans(device, weight.T, each.T, 3)
    check_kmeans(device, weight.T, each.T, 3, 50)
    check_kmeans(device, weight[:, :1].T, each[:, :1].T, 4, 50)


# ------------------------------------------------------------------------------------------------ the choice of path


def test_no_rows_give_no_rows(device: torch.device) -> None:
    none, share = torch.empty(0, 8, device=device), torch.ones(8, dtype=torch.float64, device=device)
    assert [tuple(x.shape) for x in kernels.kmeans_dp(none, share, 4)] == [(0, 4), (0,)]
    assert [tuple(x.shape) for x in kernels.kmeans_lloyd(none, share, 4)] == [(0, 4), (0,)]
    assert [tuple(x.shape) for x in kernels.affine_search(none, share, 4, 64, 0.2, 4)] == [(0, 2), (0, 2), (0, 2)]


def test_the_path_has_a_name_and_every_op(device: torch.device) -> None:
    assert kernels.backend(device) == "triton"
    module = kernels._ops(torch.empty(1, device=device))
    assert module.__name__ == "leangrid.kernels.triton"
    assert all(callable(getattr(module, name)) for name in plain.__all__)


# ------------------------------------------------------------------------------------------------ the compiler


def test_every_kernel_compiles_for_nvidia_gpus_and_fits(tmp_path: Path) -> None:
    """In a process of its own: the interpreter replaces the compiler for good."""
    pytest.importorskip("triton")
    source = Path(__file__).parents[2] / "src"
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    env |= {"PYTHONPATH": os.pathsep.join([str(source), env.get("PYTHONPATH", "")]), "TRITON_CACHE_DIR": str(tmp_path)}
    program = [sys.executable, str(Path(__file__).with_name("compiled.py")), "80", "90"]
    done = subprocess.run(program, capture_output=True, text=True, env=env, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    for kernel in json.loads(done.stdout):
        assert kernel["cubin"] > 0
        assert kernel["shared"] <= 48 * 1024, kernel
        assert kernel.get("stack", 0) <= 64, (
            kernel
        )  # bytes of registers that did not fit; absent where the wheel has no cuobjdump
        assert not kernel["ftz"] and not kernel["fused"], (
            kernel
        )  # subnormal weights stay, and float64 rounds as in the twin
