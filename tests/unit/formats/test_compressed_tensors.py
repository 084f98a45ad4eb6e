"""compressed-tensors, our side: layout, refusals, damage. The library's own reader is asked in tests/interop."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from leangrid.errors import CheckpointError, FormatError
from leangrid.formats import FORMATS, format_of
from leangrid.grids import AffineGrid, NonuniformGrid
from leangrid.schemes import Scheme

compressed_tensors = FORMATS["compressed-tensors"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
W3 = Scheme.parse("W3A16_G16")


def layer(rows: int, cols: int, scheme: Scheme, dtype: torch.dtype, seed: int = 0) -> tuple[torch.Tensor, AffineGrid]:
    generator = torch.Generator().manual_seed(seed)
    groups = cols // scheme.group_size if scheme.group_size else 1
    scale = torch.rand(rows, groups, generator=generator) * 0.1 + 1e-3
    zero_point = torch.randint(scheme.levels, (rows, groups), generator=generator, dtype=torch.uint8)
    if scheme.symmetric:
        zero_point.fill_(scheme.levels // 2)
        scale *= torch.randint(2, scale.shape, generator=generator) * 2 - 1
    codes = torch.randint(scheme.levels, (rows, cols), generator=generator, dtype=torch.uint8)
    return codes, AffineGrid(scale, zero_point, scheme.bits, scheme.group_size).rounded(dtype)


@given(
    rows=st.integers(1, 40),
    groups=st.integers(1, 4),
    bits=st.sampled_from([2, 3, 4, 8]),
    size=st.sampled_from([None, 16, 24]),
    symmetric=st.booleans(),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 99),
)
def test_what_is_packed_comes_back(
    rows: int, groups: int, bits: int, size: int | None, symmetric: bool, dtype: torch.dtype, seed: int
) -> None:
    scheme = Scheme(grid="affine", method="leanquant", bits=bits, group_size=size, symmetric=symmetric)
    cols = groups * (size or 23)
    codes, grid = layer(rows, cols, scheme, dtype, seed)
    tensors = compressed_tensors.pack(codes, grid, dtype, scheme)
    assert {suffix: (t.dtype, tuple(t.shape)) for suffix, t in tensors.items()} == compressed_tensors.layout(
        scheme, (rows, cols), dtype
    )
    back, read = compressed_tensors.unpack(tensors, scheme, (rows, cols))
    assert (
        torch.equal(back, codes)
        and torch.equal(read.scale, grid.scale)
        and torch.equal(read.zero_point, grid.zero_point)
    )
    assert torch.equal(compressed_tensors.dense(tensors, scheme, (rows, cols)), grid.dequantize(codes).to(dtype))


def test_refusals_name_the_way_out() -> None:
    refuse = compressed_tensors.refuse
    assert refuse(Scheme.parse("W4A16_G64"), "x", 64, 128) is None
    assert "format lut" in str(refuse(Scheme.parse("NU3"), "model.q", 64, 128))
    gpt2 = str(refuse(Scheme.parse("W4A16"), "h.0.attn.c_attn", 64, 128, "conv1d"))
    assert "h.0.attn.c_attn" in gpt2 and "Conv1D" in gpt2 and "NU4" in gpt2
    uneven = str(refuse(Scheme.parse("W4A16_G64"), "model.q", 64, 96))
    assert "64" in uneven and "96" in uneven


@pytest.mark.fault("O3")
def test_a_nonuniform_grid_is_never_approximated() -> None:
    grid = NonuniformGrid(torch.randn(4, 8).sort(dim=1).values)
    with pytest.raises(FormatError, match="format lut"):
        compressed_tensors.pack(torch.zeros(4, 32, dtype=torch.uint8), grid, torch.float32, Scheme.parse("W3A16"))


def test_a_scale_that_the_dtype_rounds_is_refused() -> None:
    with pytest.raises(FormatError, match=r"scales.*bfloat16"):
        compressed_tensors.pack(*layer(4, 32, W3, torch.float32), torch.bfloat16, W3)


def test_a_symmetric_scheme_needs_middle_zero_points() -> None:
    with pytest.raises(FormatError, match="middle"):
        compressed_tensors.pack(*layer(4, 32, W3, torch.float32), torch.float32, Scheme.parse("W3A16_G16_SYM"))


@pytest.mark.parametrize("name", ["W4A16_G64", "W3A16", "W2A16_G16_SYM", "W8A16"])
def test_config_round_trip(name: str) -> None:
    scheme = Scheme.parse(name)
    config = compressed_tensors.config({"model.q": scheme}, ["lm_head", "re:.*router.*"])
    assert format_of(config) is FORMATS["compressed-tensors"] and compressed_tensors.scheme_of(config) == scheme
    assert compressed_tensors.covers(config, "model.q")
    assert not compressed_tensors.covers(config, "lm_head") and not compressed_tensors.covers(config, "a.router.b")


def _weights(**change: object) -> dict:
    config = compressed_tensors.config({"model.q": W3}, [])
    config["config_groups"]["group_0"]["weights"] |= change
    return config


@pytest.mark.parametrize(
    "config",
    [
        {"config_groups": {}},
        {"config_groups": {"a": {}, "b": {}}},
        {"config_groups": {"a": 3}},
        _weights(num_bits=7),
        _weights(type="float"),
        _weights(strategy="tensor"),
        _weights(group_size="x"),
        _weights(group_size=0),
        _weights()
        | {
            "format": "dense",
            "config_groups": {"g": {"targets": ["Linear"], "weights": {"num_bits": 4, "type": "int"}}},
        },
    ],
)
def test_a_config_that_we_do_not_read_is_refused(config: dict) -> None:
    with pytest.raises(FormatError, match=r"config\.json"):
        compressed_tensors.scheme_of(config)


@pytest.mark.fault("O5")
@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda t: t.pop("weight_zero_point"), "missing"),
        (lambda t: t.update(weight_g_idx=torch.zeros(1)), "does not belong"),
        (lambda t: t["weight_scale"][0, 0].fill_(float("nan")), "NaN"),
        (lambda t: t["weight_scale"][0, 0].fill_(0), "or 0"),
        (lambda t: t["weight_shape"][0].fill_(99), "99"),
        (lambda t: t.update(weight_scale=t["weight_scale"][:, :1]), "float32"),
        (lambda t: t["weight_zero_point"][-1].fill_(-1), "behind the last code"),
    ],
)
def test_damage_is_noticed_before_anything_runs(damage, words: str) -> None:
    tensors = compressed_tensors.pack(*layer(5, 32, W3, torch.float32), torch.float32, W3)
    damage(tensors)
    with pytest.raises(CheckpointError, match=words):
        compressed_tensors.dense(tensors, W3, (5, 32), "model.layers.0.q")
