"""The Triton sweep, descent and Gram matrix beside their torch twins: the same bits, on any shape; and they compile
without a GPU.

Runs on a CUDA device, or with TRITON_INTERPRET=1 on the CPU.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor

from leangrid.kernels import plain

pytestmark = pytest.mark.gpu
SHAPES = [(1, 1, 2), (5, 3, 4), (9, 37, 16), (17, 32, 9), (3, 50, 1), (6, 21, 200)]


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(11)


def kernels() -> ModuleType:
    from leangrid.kernels import triton

    return triton


def problem(g: torch.Generator, rows: int, b: int, levels: int, device: torch.device) -> dict[str, tuple[object, ...]]:
    """The arguments of each op on one random problem; below its diagonal U holds rubbish that must not be read."""
    bits = max(1, (levels - 1).bit_length())
    weight = torch.randn(rows, b, generator=g) * 0.05
    upper = torch.eye(b) * 0.5 + 0.05 * torch.randn(b, b, generator=g)
    x = torch.randn(b, 3 * b, generator=g)
    hessian = x @ x.T / (3 * b)
    hessian[b // 2, b // 2] = 0.0  # a column that never moves
    grid = (torch.randn(rows, levels, generator=g) * 0.05).sort(1).values
    scale = 0.02 * torch.randn(rows, 3, generator=g).sign() * (0.5 + torch.rand(rows, 3, generator=g))
    zero = torch.randint(0, 2**bits, (rows, 3), generator=g, dtype=torch.uint8)
    offset = 0.05 * torch.randn(rows, 3, generator=g)
    group = torch.randint(0, 3, (b,), generator=g, dtype=torch.int32)
    codes = torch.randint(0, levels, (rows, b), generator=g, dtype=torch.uint8)
    arguments = {
        "sweep_levels": (weight, upper, grid),
        "sweep_affine": (weight, upper, scale, zero, group, bits),
        "sweep_offset": (weight, upper, scale, offset, group, bits),
        "descend_offset": (weight, hessian, codes, scale, offset, group, bits),
        "descend_levels": (weight, hessian, codes, grid),
        "descend_affine": (weight, hessian, codes, scale, zero, group, bits),
    }
    return {op: tuple(a.to(device) if isinstance(a, Tensor) else a for a in args) for op, args in arguments.items()}


OPS = ("sweep_levels", "sweep_affine", "sweep_offset", "descend_levels", "descend_affine", "descend_offset")


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("op", OPS)
def test_bits_are_those_of_the_torch_twin(
    op: str, shape: tuple[int, int, int], device: torch.device, generator: torch.Generator
) -> None:
    arguments = problem(generator, *shape, device)[op]
    before = arguments[0].clone()  # type: ignore[attr-defined]
    ours, twin = getattr(kernels(), op)(*arguments), getattr(plain, op)(*arguments)
    for mine, theirs in zip(ours, twin, strict=True):
        assert mine.dtype == theirs.dtype and mine.device == theirs.device
        assert torch.equal(mine, theirs)
    assert torch.equal(arguments[0], before)  # type: ignore[call-overload]


def test_a_whole_block(device: torch.device, generator: torch.Generator) -> None:
    arguments = problem(generator, 9, 128, 16, device)
    for op in ("sweep_levels", "descend_affine", "sweep_offset", "descend_offset"):
        for mine, theirs in zip(
            getattr(kernels(), op)(*arguments[op]), getattr(plain, op)(*arguments[op]), strict=True
        ):
            assert torch.equal(mine, theirs)


@pytest.mark.parametrize(("rows", "b"), [(0, 16), (4, 0), (0, 0)])
@pytest.mark.parametrize("op", OPS)
def test_nothing_in_nothing_out(op: str, rows: int, b: int, device: torch.device) -> None:
    grid = torch.zeros(rows, 2)
    zero, group, codes = (
        torch.zeros(rows, 2, dtype=torch.uint8),
        torch.zeros(b, dtype=torch.int32),
        torch.zeros(rows, b, dtype=torch.uint8),
    )
    rest = (grid,) if op.endswith("levels") else (grid + 1, grid if op.endswith("offset") else zero, group, 4)
    args = (torch.zeros(rows, b), torch.zeros(b, b), *((codes,) if op.startswith("descend") else ()), *rest)
    out = getattr(kernels(), op)(*(a.to(device) if isinstance(a, Tensor) else a for a in args))
    assert [tuple(part.shape) for part in out] == [(rows, b), (rows, b)]


def test_ties_go_to_the_lower_level_and_halves_to_even(device: torch.device) -> None:
    weight = torch.tensor([[0.5, 1.5, 0.50001]], device=device)
    codes, errors = kernels().sweep_levels(
        weight, torch.eye(3, device=device), torch.tensor([[0.0, 1.0, 2.0]], device=device)
    )
    assert codes.tolist() == [[0, 1, 1]]
    assert torch.allclose(errors.cpu(), torch.tensor([[0.5, 0.5, -0.49999]]))
    weight = torch.tensor([[0.5, 1.5, 2.5, -9.0, 99.0]], device=device)
    codes, _ = kernels().sweep_affine(
        weight,
        torch.eye(5, device=device),
        torch.ones(1, 1, device=device),
        torch.zeros(1, 1, dtype=torch.uint8, device=device),
        torch.zeros(5, dtype=torch.int32, device=device),
        4,
    )
    assert codes.tolist() == [[0, 2, 2, 0, 15]]


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # numpy's, in the interpreter
def test_numbers_that_are_not_finite_stay_in_their_row(device: torch.device, generator: torch.Generator) -> None:
    weight, upper, grid = problem(generator, 4, 20, 16, device)["sweep_levels"]
    clean = kernels().sweep_levels(weight, upper, grid)
    bad = weight.clone()  # type: ignore[attr-defined]
    bad[1, 3], bad[2, 0] = float("nan"), float("inf")
    codes, errors = kernels().sweep_levels(bad, upper, grid)
    assert int(codes.max()) < 16
    for row in (0, 3):
        assert torch.equal(codes[row], clean[0][row]) and torch.equal(errors[row], clean[1][row])


@pytest.mark.parametrize(
    ("rows", "n", "levels", "panel"), [(1, 1, 1, 4096), (9, 300, 16, 128), (35, 130, 3, 4096), (2, 40, 30, 4096)]
)
def test_level_gram_is_the_product_with_the_one_hot_matrix(
    rows: int,
    n: int,
    levels: int,
    panel: int,
    device: torch.device,
    generator: torch.Generator,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    gram = kernels().level_gram
    monkeypatch.setattr(sys.modules[gram.__module__], "PANEL", panel)
    x = torch.randn(n, 3 * n, generator=generator)
    hessian = (x @ x.T / (3 * n)).to(device)
    codes = torch.randint(0, levels, (rows, n), generator=generator, dtype=torch.uint8).to(device)
    onehot = torch.nn.functional.one_hot(codes.long(), levels).double()
    want = onehot.transpose(1, 2) @ hessian.double() @ onehot
    assert (gram(hessian, codes, levels) - want).abs().max() <= 2e-6 * want.abs().max()
    assert gram(hessian, codes[:0], levels).shape == (0, levels, levels)


def test_the_terms_of_the_hessian_add_up_to_it(device: torch.device, generator: torch.Generator) -> None:
    from leangrid.kernels.triton.level_gram import split_into_terms

    panel = (torch.randn(40, 24, generator=generator) * 10.0 ** torch.randint(-9, 9, (40, 24), generator=generator)).to(
        device
    )
    assert torch.equal(split_into_terms(panel).double().sum(0), panel.double())


@pytest.mark.slow
def test_kernels_compile_for_real_gpus() -> None:
    told = compiled("sweep", "90")
    assert len(told) == 4
    for line in told:  # an L40S has 99 KiB of shared memory, an H200 (sm_90) 227
        assert line["shared"] <= 227 * 1024
        assert line["spills"] <= (0 if "level_gram" not in line["kernel"] else 128), line


def compiled(what: str, *archs: str) -> list[dict]:
    """What compile_kernels.py prints, in a process that compiles."""
    pytest.importorskip("triton")
    root = Path(__file__).resolve().parents[2]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"} | {
        "PYTHONPATH": str(root / "src")
    }
    command = [sys.executable, Path(__file__).with_name("compile_kernels.py"), what, *archs]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return [json.loads(line) for line in done.stdout.splitlines()]
