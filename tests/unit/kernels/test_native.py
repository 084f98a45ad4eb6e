"""Every C++ kernel, on every instruction set of this processor and any number of threads, gives the bits of its torch
twin."""

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from leangrid import kernels
from leangrid.kernels import plain

ISAS = ("portable", "avx2", "avx512")


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(7)


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def heavy(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(shape, generator=generator) * torch.exp(0.5 * torch.randn(shape, generator=generator)) * 0.05


def importance(generator: torch.Generator, *shape: int) -> Tensor:
    return 10.0 ** (-5 * torch.rand(shape, generator=generator, dtype=torch.float64))


def upper(generator: torch.Generator, b: int) -> Tensor:
    return (torch.eye(b) * 0.5 + 0.05 * torch.randn(b, b, generator=generator)).triu()


def hessian(generator: torch.Generator, b: int) -> Tensor:
    x = torch.randn(b, 3 * b, generator=generator)
    return (x @ x.T / (3 * b)).contiguous()


def cases(g: torch.Generator, rows: int, b: int, levels: int) -> dict[str, Callable[[], tuple[Tensor, ...]]]:
    """Each op on one random problem."""
    weight, share, bits = heavy(g, rows, b), importance(g, rows, b), (levels - 1).bit_length()
    grid = heavy(g, rows, levels).sort(1).values
    scale = 0.02 * torch.randn(rows, 3, generator=g).sign() * (0.5 + torch.rand(rows, 3, generator=g))
    zero = torch.randint(0, 2**bits, (rows, 3), generator=g, dtype=torch.uint8)
    offset = heavy(g, rows, 3)
    group = torch.randint(0, 3, (b,), generator=g)
    u, h = upper(g, b), hessian(g, b)
    codes = torch.randint(0, levels, (rows, b), generator=g, dtype=torch.uint8)
    return {
        "kmeans_dp": lambda: kernels.kmeans_dp(weight, share, levels),
        "kmeans_lloyd": lambda: kernels.kmeans_lloyd(weight, share[0], levels),
        "affine_search": lambda: kernels.affine_search(weight, share, bits, 128, 0.3, b),
        "affine_search_bf16": lambda: kernels.affine_search(weight, share[0], bits, 512, 0.2, b, False, torch.bfloat16),
        "affine_search_symmetric": lambda: kernels.affine_search(weight, share, bits, 512, 0.2, b, True, torch.float16),
        "affine_search_gaps": lambda: kernels.affine_search(weight, share, bits, 7, 0.4, b),
        "sweep_levels": lambda: kernels.sweep_levels(weight, u, grid),
        "sweep_affine": lambda: kernels.sweep_affine(weight, u, scale, zero, group, bits),
        "sweep_offset": lambda: kernels.sweep_offset(weight, u, scale, offset, group, bits),
        "descend_offset": lambda: kernels.descend_offset(weight, h, codes, scale, offset, group, bits),
        "descend_levels": lambda: kernels.descend_levels(weight, h, codes, grid),
        "descend_affine": lambda: kernels.descend_affine(weight, h, codes, scale, zero, group, bits),
    }


OPS = sorted(cases(torch.Generator().manual_seed(0), 2, 4, 4))
SHAPES = [(1, 1, 2), (5, 3, 4), (16, 64, 8), (33, 128, 16), (3, 100, 5), (2, 700, 16), (70, 40, 3)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("op", OPS)
def test_native_gives_the_bits_of_its_torch_twin(
    op: str, shape: tuple[int, int, int], isa: str, generator: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    call = cases(generator, *shape)[op]
    ours = call()
    assert kernels.backend() == f"cpu-{isa}"
    monkeypatch.setenv("LEANGRID_KERNELS", "torch")
    assert kernels.backend() == "torch"
    twin = call()
    for mine, theirs in zip(ours, twin, strict=True):
        assert mine.dtype == theirs.dtype
        assert torch.equal(mine, theirs)


@pytest.mark.fault("N14")
@pytest.mark.parametrize("op", OPS)
def test_threads_change_nothing(op: str, generator: torch.Generator, two_threads: None) -> None:
    call = cases(generator, 150, 64, 16)[op]
    two = call()
    torch.set_num_threads(1)
    for mine, theirs in zip(call(), two, strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize("bits", [1, 8])
def test_widest_and_narrowest_affine_grids_match(bits: int, isa: str, generator: torch.Generator) -> None:
    weight, share = heavy(generator, 4, 90), importance(generator, 90)
    for symmetric in (False, True):
        ours = kernels.affine_search(weight, share, bits, 256, 0.2, 30, symmetric)
        unit = torch.frexp(share.max()).exponent
        twin = plain.affine_search(weight, torch.ldexp(share, -unit), bits, 256, 0.2, 30, symmetric, None)
        assert torch.equal(ours[0], twin[0])
        assert torch.equal(ours[1], twin[1])


# Groups for the screen in cpu/affine_screen.h: what it must decide as the exact search does, and what it must leave to
# it.
GROUPS: dict[str, Callable[[Tensor], Tensor]] = {
    "heavy": lambda w: w,
    "positive": lambda w: w.abs(),
    "negative": lambda w: -w.abs(),
    "constant": lambda w: w[:, :1].expand_as(w),
    "zeros": lambda w: torch.zeros_like(w),
    "mostly_zeros": lambda w: w * (w > w.median()) * (w > 0.05),
    "integers": lambda w: torch.round(w * 80),  # exact ties
    "nearly_integers": lambda w: torch.round(w * 80) + 1e-6 * w,  # ties but for the last bits
    "mirrored": lambda w: torch.cat([w[:, : w.shape[1] // 2], -w[:, : w.shape[1] // 2]], dim=1),
    "outlier": lambda w: torch.cat([w[:, 1:], 1e6 * w[:, :1]], dim=1),
    "many_decades": lambda w: w * 10.0 ** (-300 * w.abs()).clamp(min=-30),
    "half_subnormal": lambda w: w * 1e-4,
    "half_overflow": lambda w: w * 1e7,
    "subnormal": lambda w: w * 1e-38,
    "huge": lambda w: w / w.abs().max() * 3e38,
}
SHARES: dict[str, Callable[[Tensor], Tensor]] = {
    "ones": lambda x: torch.ones_like(x),
    "four_decades": lambda x: 10.0 ** (-4 * x),
    "300_decades": lambda x: 10.0 ** (-300 * x),
    "a_few": lambda x: x * (x < 0.2),
}


@pytest.mark.parametrize("name", sorted(GROUPS))
def test_screened_groups_match_the_torch_twin(name: str, isa: str, generator: torch.Generator) -> None:
    weight = GROUPS[name](heavy(generator, 6, 64)).contiguous()
    for bits, steps, size in ((4, 512, 64), (4, 1000, 32), (3, 256, 64), (2, 300, 16), (8, 64, 64), (1, 128, 64)):
        for kind, dtype in zip(SHARES, (None, torch.bfloat16, torch.float16, torch.bfloat16), strict=True):
            share = SHARES[kind](torch.rand(64, generator=generator, dtype=torch.float64))
            unit = torch.frexp(share.max()).exponent
            for symmetric in (False, True):
                ours = kernels.affine_search(weight, share, bits, steps, 0.2, size, symmetric, dtype)
                twin = plain.affine_search(weight, torch.ldexp(share, -unit), bits, steps, 0.2, size, symmetric, dtype)
                case = f"{bits} bits, T {steps}, groups of {size}, {kind}, {dtype}, symmetric {symmetric}"
                assert torch.equal(ours[0], twin[0]), case
                assert torch.equal(ours[1], twin[1]), case
                assert torch.equal(ours[2], torch.ldexp(twin[2], unit)), case


def test_scales_half_way_between_two_of_bfloat16_match_the_torch_twin(isa: str, generator: torch.Generator) -> None:
    """A range of 15 and T a power of two: many S of the paper's fall exactly where rounding to even decides."""
    for lo in (-8.0, -7.5, -7.25, -7.0, -6.0):
        weight = (3 * torch.randn(30, 32, generator=generator)).clamp(-5.9, 5.9)
        weight[:, 0], weight[:, 1] = lo, 15 + lo
        share = torch.rand(32, generator=generator, dtype=torch.float64) ** 3
        unit = torch.frexp(share.max()).exponent
        for bits, steps in ((4, 64), (4, 512), (2, 64), (2, 128), (2, 256)):
            ours = kernels.affine_search(weight, share, bits, steps, 0.8 / bits, 32, False, torch.bfloat16)
            twin = plain.affine_search(
                weight, torch.ldexp(share, -unit), bits, steps, 0.8 / bits, 32, False, torch.bfloat16
            )
            assert all(torch.equal(mine, theirs) for mine, theirs in zip(ours[:2], twin[:2], strict=True))


@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("bits", "size"), [(4, 64), (4, 576), (3, 128), (2, 36)])
def test_many_groups_of_the_usual_kind_match_the_torch_twin(
    bits: int, size: int, dtype: torch.dtype | None, isa: str, generator: torch.Generator
) -> None:
    weight, share = heavy(generator, 4, 1152), importance(generator, 1152)
    unit = torch.frexp(share.max()).exponent
    shrink = {4: 0.2, 3: 0.3, 2: 0.4}[bits]
    ours = kernels.affine_search(weight, share, bits, 2048, shrink, size, False, dtype)
    twin = plain.affine_search(weight, torch.ldexp(share, -unit), bits, 2048, shrink, size, False, dtype)
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(ours[:2], twin[:2], strict=True))


@pytest.mark.parametrize("decades", [0, 4, 12])
@pytest.mark.parametrize(("n", "levels"), [(576, 16), (1536, 16), (300, 8), (200, 32), (40, 16), (90, 64), (2500, 8)])
def test_the_shortest_path_gives_the_levels_of_the_torch_layers(
    n: int, levels: int, decades: int, isa: str, generator: torch.Generator
) -> None:
    """From 8 levels on C++ seeks a price of a cluster; the twin goes layer by layer."""
    weight, share = (
        heavy(generator, 6, n),
        10.0 ** (-decades * torch.rand(6, n, generator=generator, dtype=torch.float64)),
    )
    weight[1] = weight[1].abs()
    weight[2, : n // 3] = weight[2, n // 3 : 2 * (n // 3)]  # values twice
    weight[3, 0], weight[4, 0] = 30.0, -30.0
    unit = torch.frexp(share.amax(1, keepdim=True)).exponent
    ours, twin = kernels.kmeans_dp(weight, share, levels), plain.kmeans_dp(weight, torch.ldexp(share, -unit), levels)
    assert torch.equal(ours[0], twin[0])
    assert torch.equal(ours[1], torch.ldexp(twin[1], unit[:, 0]))


@pytest.mark.parametrize("levels", [7, 8, 16])
def test_levels_are_optimal_where_many_partitions_tie(levels: int, isa: str, generator: torch.Generator) -> None:
    even = torch.arange(48.0)[None].expand(3, -1)  # no price of a cluster gives every number of them
    weight = torch.cat([even, torch.round(heavy(generator, 3, 48) * 100)]).contiguous()
    share = torch.ones(48, dtype=torch.float64)
    reached, twin = kernels.kmeans_dp(weight, share, levels)[1], plain.kmeans_dp(weight, share, levels)[1]
    assert torch.allclose(reached, twin, rtol=1e-12)


@pytest.mark.parametrize(("rows", "n", "levels"), [(1, 1, 1), (3, 70, 4), (5, 700, 16), (2, 1100, 3)])
def test_level_gram_is_the_product_with_the_one_hot_matrix(
    rows: int, n: int, levels: int, isa: str, generator: torch.Generator
) -> None:
    h = hessian(generator, n)
    codes = torch.randint(0, levels, (rows, n), generator=generator, dtype=torch.uint8)
    onehot = torch.nn.functional.one_hot(codes.long(), levels).double()
    want = onehot.transpose(1, 2) @ h.double() @ onehot
    tolerance = 2e-6 * want.abs().amax()
    assert (kernels.level_gram(h, codes, levels) - want).abs().max() <= tolerance
    assert (plain.level_gram(h, codes, levels) - want).abs().max() <= tolerance


def test_level_gram_with_two_threads(generator: torch.Generator, two_threads: None) -> None:
    h, codes = hessian(generator, 600), torch.randint(0, 8, (31, 600), generator=generator, dtype=torch.uint8)
    two = kernels.level_gram(h, codes, 8)
    torch.set_num_threads(1)
    assert torch.equal(two, kernels.level_gram(h, codes, 8))


def test_sweep_follows_the_algorithm_line_by_line(isa: str, generator: torch.Generator) -> None:
    weight, u = heavy(generator, 3, 20), upper(generator, 20)
    grid = heavy(generator, 3, 8).sort(1).values
    codes, errors = kernels.sweep_levels(weight, u, grid)
    for r in range(3):
        left = weight[r].double()
        for j in range(20):
            distance = (grid[r].double() - left[j]).abs()
            code = int(codes[r, j])
            assert distance[code] <= distance.min() + 1e-6
            error = (left[j] - grid[r, code]) / u[j, j]
            assert abs(error - errors[r, j]) <= 1e-4 * max(1.0, abs(error))
            left[j + 1 :] -= u[j, j + 1 :] * error


def test_sweep_breaks_ties_downward_and_leaves_its_input(isa: str) -> None:
    weight, keep = torch.tensor([[0.5, 1.5, 0.50001]]), torch.tensor([[0.5, 1.5, 0.50001]])
    codes, errors = kernels.sweep_levels(weight, torch.eye(3), torch.tensor([[0.0, 1.0, 2.0]]))
    assert codes.tolist() == [[0, 1, 1]]
    assert torch.allclose(errors, torch.tensor([[0.5, 0.5, -0.49999]]))
    assert torch.equal(weight, keep)


def test_sweep_affine_with_a_negative_scale(isa: str) -> None:
    weight = torch.tensor([[0.4, -0.3, 9.0, -9.0]])
    codes, errors = kernels.sweep_affine(
        weight,
        torch.eye(4),
        torch.tensor([[-0.1]]),
        torch.tensor([[8]], dtype=torch.uint8),
        torch.zeros(4, dtype=torch.int32),
        4,
    )
    assert codes.tolist() == [[4, 11, 0, 15]]
    assert torch.allclose(errors, torch.tensor([[0.0, 0.0, 8.2, -8.3]]), atol=1e-6)


def test_descent_lowers_the_true_loss_and_reports_its_change(isa: str, generator: torch.Generator) -> None:
    h, target = hessian(generator, 48), heavy(generator, 20, 48)
    grid = heavy(generator, 20, 8).sort(1).values
    codes = torch.randint(0, 8, (20, 48), generator=generator, dtype=torch.uint8)
    before = grid.gather(1, codes.long())
    new, delta = kernels.descend_levels(((before - target) @ h).contiguous(), h, codes, grid)
    after = grid.gather(1, new.long())
    assert torch.equal(after - before, delta)

    def loss(q: Tensor) -> Tensor:
        error = (q - target).double()
        return ((error @ h.double()) * error).sum(1)

    assert (loss(after) < loss(before)).all()  # random codes are never a minimum
    still, none = kernels.descend_levels(torch.zeros(20, 48), torch.zeros(48, 48), codes, grid)
    assert torch.equal(still, codes)  # h <= 0 leaves a column alone
    assert not none.any()


@pytest.mark.fault("O6")
def test_views_that_are_not_contiguous_give_the_same(isa: str, generator: torch.Generator) -> None:
    weight, share = heavy(generator, 40, 12), importance(generator, 40, 12)
    for op in (lambda w, s: kernels.kmeans_dp(w, s, 4), lambda w, s: kernels.affine_search(w, s, 3, 64, 0.3, 40)):
        for mine, theirs in zip(op(weight.T, share.T), op(weight.T.contiguous(), share.T.contiguous()), strict=True):
            assert torch.equal(mine, theirs)
    u, grid = upper(generator, 12), heavy(generator, 40, 4).sort(1).values
    wide = heavy(generator, 40, 50)
    assert torch.equal(kernels.sweep_levels(wide[:, 3:15], u.T.contiguous().T, grid)[0],
                       kernels.sweep_levels(wide[:, 3:15].contiguous(), u, grid)[0])  # fmt: skip


@pytest.mark.fault("O6")
def test_no_rows_give_no_rows(isa: str) -> None:
    none, share = torch.empty(0, 8), torch.ones(8, dtype=torch.float64)
    assert [tuple(x.shape) for x in kernels.kmeans_dp(none, share, 4)] == [(0, 4), (0,)]
    assert [tuple(x.shape) for x in kernels.affine_search(none, share, 4, 64, 0.2, 4)] == [(0, 2), (0, 2), (0, 2)]
    codes, errors = kernels.sweep_levels(none, torch.eye(8), torch.empty(0, 4))
    assert codes.shape == errors.shape == (0, 8)
    assert kernels.level_gram(torch.eye(8), torch.empty(0, 8, dtype=torch.uint8), 4).shape == (0, 4, 4)


@pytest.mark.fault("O6")
def test_no_columns_give_no_codes(isa: str) -> None:
    codes, errors = kernels.sweep_levels(torch.empty(3, 0), torch.empty(0, 0), torch.zeros(3, 4))
    assert codes.shape == errors.shape == (3, 0)
