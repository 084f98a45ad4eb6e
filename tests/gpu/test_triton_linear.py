"""The Triton products with packed weights beside dense products of the same weights; and they compile without a GPU.

Runs on a CUDA device, or with TRITON_INTERPRET=1 on the CPU.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from leangrid.errors import ShapeError
from leangrid.formats.bit_stream import pack
from leangrid.inference.layers import AffineLinear, LutLinear
from leangrid.kernels import packed

pytestmark = pytest.mark.gpu
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(1, 8, 8), (5, 48, 24), (37, 272, 16), (33, 100, 50)]  # rows, columns, columns a group


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(5)


def lut_problem(
    g: torch.Generator, rows: int, cols: int, bits: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """words, lut, dense weight."""
    codes = torch.randint(0, 2**bits, (rows, cols), generator=g, dtype=torch.uint8)
    lut = torch.randn(rows, 2**bits, generator=g).sort(1).values.to(dtype)
    return pack(codes, bits), lut, lut.gather(1, codes.long())


def affine_problem(
    g: torch.Generator, rows: int, cols: int, bits: int, size: int, dtype: torch.dtype, stored: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """words, scale, zero_point, dense weight rounded to ``stored``."""
    codes = torch.randint(0, 2**bits, (rows, cols), generator=g, dtype=torch.uint8)
    scale = (
        (0.5 + torch.rand(rows, cols // size, generator=g))
        * torch.randn(rows, cols // size, generator=g).sign()
        / 2**bits
    ).to(dtype)
    zero = torch.randint(0, 2**bits, scale.shape, generator=g, dtype=torch.uint8)
    steps = codes.view(rows, -1, size).float() - zero[:, :, None]
    return pack(codes, bits), scale, zero, (steps * scale.float()[:, :, None]).view(rows, cols).to(stored)


def shapes(bits: int, dtype: torch.dtype) -> list[tuple[int, int, int]]:
    """All of them once; the interpreter is slow, and two for each other pair of bits and dtype cut words and tiles
    too."""
    return SHAPES if bits == 3 and dtype == torch.float32 else SHAPES[1::2]


def close(ours: Tensor, x: Tensor, dense: Tensor) -> None:
    """Float32 sums of exact products, rounded once to x's dtype. The interpreter cuts where it should round to
    bfloat16."""
    want = x.double() @ dense.double().T
    size = x.double().abs() @ dense.double().abs().T  # what rounding errors of a sum are relative to
    assert ours.dtype == x.dtype and ours.shape == want.shape
    tolerance = 2e-6 * size + (0 if x.dtype == torch.float32 else torch.finfo(x.dtype).eps) * want.abs()
    if dense.dtype == torch.bfloat16 and os.environ.get("TRITON_INTERPRET") == "1":
        tolerance += 2**-7 * size
    assert ((ours.cpu().double() - want).abs() <= tolerance).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bits", [4, 3, 2, 8])
def test_lut_is_the_dense_product(
    bits: int, dtype: torch.dtype, device: torch.device, generator: torch.Generator
) -> None:
    from leangrid.kernels.triton import lut_linear

    for rows, cols, _ in shapes(bits, dtype):
        words, lut, dense = lut_problem(generator, rows, cols, bits, dtype)
        for m in (1, 3, 65):
            x = torch.randn(m, cols, generator=generator).to(dtype)
            close(lut_linear(x.to(device), words.to(device), lut.to(device), bits), x, dense)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bits", [4, 3, 2, 8])
def test_affine_is_the_dense_product(
    bits: int, dtype: torch.dtype, device: torch.device, generator: torch.Generator
) -> None:
    from leangrid.kernels.triton import affine_linear

    for rows, cols, size in shapes(bits, dtype):
        words, scale, zero, dense = affine_problem(generator, rows, cols, bits, size, dtype, dtype)
        for m in (1, 17, 65):
            x = torch.randn(m, cols, generator=generator).to(dtype)
            close(
                affine_linear(x.to(device), words.to(device), scale.to(device), zero.to(device), bits, size), x, dense
            )


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16])
def test_the_dense_tile_is_the_weight_that_readers_compute(
    stored: torch.dtype, device: torch.device, generator: torch.Generator
) -> None:
    from leangrid.kernels.triton.packed import Packed, dequantized

    for dtype in (stored, torch.float32):
        for bits in (2, 3, 4, 8):
            words, scale, zero, dense = affine_problem(generator, 33, 96, bits, 24, dtype, stored)
            weight = Packed(
                words.to(device), scale.to(device), scale.to(device), zero.to(device), 96, bits, stored, True, 24
            )
            ours = torch.cat([tile for _, _, tile in dequantized(weight, torch.float32)]).cpu()
            if stored == torch.bfloat16 and device.type == "cpu":  # the interpreter cuts
                torch.testing.assert_close(ours, dense.float(), rtol=2**-7, atol=0)
            else:
                assert torch.equal(ours, dense.float())


@pytest.mark.parametrize("splits", [1, 2, 3, 50])
def test_splitting_the_columns_changes_nothing_but_rounding(
    splits: int, device: torch.device, generator: torch.Generator
) -> None:
    from leangrid.kernels.triton import lut_linear

    words, lut, dense = lut_problem(generator, 40, 700, 4, torch.float16)
    x = torch.randn(5, 700, generator=generator).half()
    arguments = x.to(device), words.to(device), lut.to(device), 4
    ours = lut_linear(*arguments, splits=splits)
    close(ours, x, dense)
    assert torch.equal(ours, lut_linear(*arguments, splits=splits))


@pytest.mark.parametrize("m", [0, 1, 2, 70])
def test_views_of_any_strides_and_unaligned_tables(m: int, device: torch.device, generator: torch.Generator) -> None:
    from leangrid.kernels.triton import affine_linear, lut_linear

    words, lut, dense = lut_problem(generator, 9, 80, 3, torch.float32)
    x = torch.randn(80, 2 * m, generator=generator).T[::2]
    wide, table = torch.zeros(9, 16, dtype=torch.int32), torch.zeros(9 * 8 + 1)
    wide[:, 3:11], table[1:] = words, lut.flatten()
    moved = x.to(device), wide.to(device)[:, 3:11], table.to(device)[1:].view(9, 8)
    assert not moved[1].is_contiguous() and moved[2].data_ptr() % 32
    close(lut_linear(*moved, 3), x, dense)
    words, scale, zero, dense = affine_problem(generator, 9, 80, 3, 20, torch.float32, torch.float32)
    moved = scale.T.contiguous().to(device).T, zero.T.contiguous().to(device).T
    close(affine_linear(x.to(device), words.to(device), *moved, 3, 20), x, dense)


def test_layers_dtypes_that_differ(device: torch.device, generator: torch.Generator) -> None:
    from leangrid.kernels.triton import affine_linear, lut_linear

    words, lut, dense = lut_problem(generator, 20, 64, 4, torch.float32)
    for m in (1, 6, 66):
        x = torch.randn(m, 64, generator=generator).half()
        close(lut_linear(x.to(device), words.to(device), lut.to(device), 4), x, dense)
    words, scale, zero, dense = affine_problem(generator, 20, 64, 4, 32, torch.float32, torch.float16)
    for m in (1, 6, 66):
        x = torch.randn(m, 64, generator=generator)
        close(
            affine_linear(x.to(device), words.to(device), scale.to(device), zero.to(device), 4, 32, torch.float16),
            x,
            dense,
        )


@pytest.mark.parametrize("bits", [2, 3, 5])  # no kernel for 5: the layer's torch path
@pytest.mark.parametrize("batch", [(), (1,), (2, 3), (0,)])
def test_packed_layers_use_the_kernels(
    batch: tuple[int, ...], bits: int, device: torch.device, generator: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    kernel = packed._kernel
    monkeypatch.setattr(packed, "_kernel", lambda name, bits: kernel(name, bits) if not asked.append(name) else None)
    x = torch.randn(*batch, 48, generator=generator)
    words, lut, dense = lut_problem(generator, 21, 48, bits, torch.float32)
    layer = LutLinear(48, 21, bits, True, torch.float32)
    layer.load_state_dict({"weight": words, "lut": lut, "bias": torch.arange(21.0)})
    want = torch.nn.functional.linear(x, dense, torch.arange(21.0))
    torch.testing.assert_close(layer.to(device)(x.to(device)).cpu(), want, rtol=1e-5, atol=1e-5)
    words, scale, zero, dense = affine_problem(generator, 21, 48, bits, 16, torch.float32, torch.float16)
    affine = AffineLinear(48, 21, bits, False, torch.float32, group_size=16, stored_dtype=torch.float16)
    affine.load_state_dict({"weight_packed": words, "weight_scale": scale, "weight_shape": torch.tensor([21, 48]),
                            "weight_zero_point": pack(zero.T.contiguous(), bits).T.contiguous()})  # fmt: skip
    want = torch.nn.functional.linear(x, dense.float())
    torch.testing.assert_close(affine.to(device)(x.to(device)).cpu(), want, rtol=1e-5, atol=1e-5)
    assert asked == ["lut_linear", "affine_linear"] and (kernel(asked[0], bits) is None) == (bits == 5)


def test_what_does_not_fit_is_refused(device: torch.device, generator: torch.Generator) -> None:
    from leangrid.kernels.triton import affine_linear, lut_linear

    x = torch.randn(2, 64, generator=generator).to(device)
    words, lut, scale, zero = (
        t.to(device)
        for t in (
            *lut_problem(generator, 5, 64, 4, torch.float32)[:2],
            torch.ones(5, 2),
            torch.zeros(5, 2, dtype=torch.uint8),
        )
    )
    for arguments in (
        (x, words, lut, 3),
        (x, words, lut, 5),
        (x[:, :40], words, lut, 4),
        (x, words[:4], lut, 4),
        (x, words, lut[:, :8], 4),
        (x.double(), words, lut, 4),
        (x, words.to("meta"), lut, 4),
    ):
        with pytest.raises(ShapeError):
            lut_linear(*arguments)
    for arguments in (
        (x, words, scale, zero, 4, 64),
        (x, words, scale, zero, 4, 0),
        (x, words, scale, zero[:, :1], 4, 32),
        (x, words, scale.double(), zero, 4, 32),
        (x, words, scale[:3], zero[:3], 4, 32),
    ):
        with pytest.raises(ShapeError):
            affine_linear(*arguments)


def test_without_a_gpu_the_error_says_so(
    device: torch.device, generator: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    from leangrid.kernels.triton import lut_linear

    words, lut, _ = lut_problem(generator, 5, 64, 4, torch.float32)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ShapeError, match="need a CUDA device"):
        lut_linear(torch.randn(1, 64), words, lut, 4)


@pytest.mark.slow
def test_kernels_compile_for_real_gpus() -> None:
    root = Path(__file__).resolve().parents[2]
    pytest.importorskip("triton")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"} | {
        "PYTHONPATH": str(root / "src")
    }
    command = [sys.executable, Path(__file__).with_name("compile_kernels.py"), "linear", "80"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    told = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(told) == 24
    for line in told:
        assert line["shared"] <= 99 * 1024, line  # of an L40S
        assert line["spills"] <= (0 if "fp32" not in line["kernel"] else 512), line


def test_the_benchmark_checks_itself(device: torch.device) -> None:
    root = Path(__file__).resolve().parents[2]
    environment = os.environ | {"PYTHONPATH": str(root / "src")}
    command = [
        sys.executable,
        root / "benchmarks" / "decode_kernel.py",
        "--check",
        "--bits",
        "3",
        "--batch",
        "1",
        "--rows-by-cols",
        "9x128",
    ]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert [line["kind"] for line in lines] == ["lut", "affine_g128", "affine_row"]
    assert all(line["relative_error"] < 0.01 for line in lines)
