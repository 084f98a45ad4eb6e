"""The LUT container: exact, loud about everything it cannot hold or should not read."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from leangrid.errors import CheckpointError, FormatError
from leangrid.formats import FORMATS, format_of
from leangrid.grids import AffineGrid, NonuniformGrid
from leangrid.schemes import Scheme

lut = FORMATS["lut"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
NU3 = Scheme.parse("NU3")


def layer(rows: int, cols: int, bits: int, dtype: torch.dtype, seed: int = 0) -> tuple[torch.Tensor, NonuniformGrid]:
    generator = torch.Generator().manual_seed(seed)
    levels = torch.randn(rows, 2**bits, generator=generator).sort(dim=1).values
    return torch.randint(2**bits, (rows, cols), generator=generator, dtype=torch.uint8), NonuniformGrid(levels).rounded(
        dtype
    )


@given(
    rows=st.integers(1, 9),
    cols=st.integers(1, 130),
    bits=st.sampled_from([2, 3, 4]),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 99),
)
def test_what_is_packed_comes_back(rows: int, cols: int, bits: int, dtype: torch.dtype, seed: int) -> None:
    codes, grid = layer(rows, cols, bits, dtype, seed)
    scheme = Scheme.parse(f"NU{bits}")
    tensors = lut.pack(codes, grid, dtype, scheme)
    assert {suffix: (t.dtype, tuple(t.shape)) for suffix, t in tensors.items()} == lut.layout(
        scheme, (rows, cols), dtype
    )
    back, read = lut.unpack(tensors, scheme, (rows, cols))
    assert torch.equal(back, codes) and torch.equal(read.levels, grid.levels)
    expected = torch.stack([grid.levels[i][codes[i].long()] for i in range(rows)])
    dense = lut.dense(tensors, scheme, (rows, cols))
    assert dense.dtype == dtype and torch.equal(dense.float(), expected)


def test_codes_take_b_bits() -> None:
    tensors = lut.pack(*layer(8, 1024, 3, torch.bfloat16), torch.bfloat16, NU3)
    assert tensors["weight"].nbytes * 8 == 3 * 8 * 1024


def test_the_stored_weight_never_has_the_shape_of_a_linear() -> None:
    """A reader that ignores quantization_config looks for ``weight`` [rows, cols]; it must not find one."""
    for cols in range(2, 300):
        assert lut.layout(Scheme.parse("NU4"), (cols, cols), torch.float32)["weight"][1][1] < cols


def test_a_level_that_the_dtype_rounds_is_refused() -> None:
    codes, grid = layer(4, 32, 3, torch.float32)
    with pytest.raises(FormatError, match=r"not exact in bfloat16.*rounded"):
        lut.pack(codes, grid, torch.bfloat16, NU3)


def test_an_affine_grid_is_refused_with_the_format_that_fits() -> None:
    grid = AffineGrid(torch.ones(4, 1), torch.zeros(4, 1, dtype=torch.uint8), 3)
    with pytest.raises(FormatError, match="compressed-tensors"):
        lut.pack(torch.zeros(4, 32, dtype=torch.uint8), grid, torch.float32, NU3)
    assert "compressed-tensors" in str(lut.refuse(Scheme.parse("W4A16"), "a.b", 4, 32))
    assert lut.refuse(NU3, "h.0.attn.c_attn", 4, 33, "conv1d") is None


def test_config_round_trip() -> None:
    config = lut.config({"a.b": NU3, "a.c": NU3}, ["lm_head"])
    assert format_of(config) is FORMATS["lut"] and lut.scheme_of(config) == NU3
    assert lut.covers(config, "a.b") and not lut.covers(config, "lm_head")


@pytest.mark.parametrize(
    "change",
    [{"bits": 5}, {"bits": True}, {"bits": "3"}, {"version": 2}, {"format": "x"}, {"layers": []}, {"layers": [1]}],
)
def test_a_config_that_is_not_ours_is_refused(change: dict) -> None:
    with pytest.raises(FormatError, match=r"config\.json"):
        lut.scheme_of({**lut.config({"a.b": NU3}, []), **change})


def test_an_unknown_method_is_refused_by_name() -> None:
    with pytest.raises(FormatError, match=r"'hqq'.*leangrid"):
        format_of({"quant_method": "hqq"})


def _padding(t: dict) -> None:
    t["weight"][0, -1] |= -(2**31)


@pytest.mark.fault("O5")
@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda t: t.pop("lut"), "missing"),
        (lambda t: t.update(extra=torch.zeros(1)), "does not belong"),
        (lambda t: t.update(weight=t["weight"][:, :-1]), "int32"),
        (lambda t: t.update(weight=t["weight"].long()), "int64"),
        (lambda t: t.update(lut=t["lut"][:, :4]), "float32"),
        (lambda t: t["lut"][1, 3].fill_(float("nan")), "NaN"),
        (lambda t: t["lut"][1, 7].fill_(float("inf")), "NaN or inf"),
        (lambda t: t["lut"][1].copy_(t["lut"][1].flip(0)), "ascending"),
        (_padding, "behind the last code"),
    ],
)
def test_damage_is_noticed_before_anything_runs(damage, words: str) -> None:
    tensors = lut.pack(*layer(4, 33, 3, torch.float32), torch.float32, NU3)
    damage(tensors)
    with pytest.raises(CheckpointError, match=words):
        lut.dense(tensors, NU3, (4, 33), "model.layers.0.q")
