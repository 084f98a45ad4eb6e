"""AWQ, our side: words against a packer written from the format's description, groups, refusals, damage."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from leangrid.errors import CheckpointError, FormatError
from leangrid.formats import FORMATS, format_of
from leangrid.grids import AffineGrid, NonuniformGrid
from leangrid.schemes import Scheme

awq = FORMATS["awq"]
ROWS_WORD = 8
W4 = Scheme.parse("W4A16_G32")


def layer(
    rows: int, cols: int, group_size: int | None, seed: int = 0, symmetric: bool = False
) -> tuple[Tensor, AffineGrid]:
    generator = torch.Generator().manual_seed(seed)
    groups = cols // group_size if group_size else 1
    scale = torch.exp(torch.rand(rows, groups, generator=generator) * 6 - 8)
    zero_point = torch.randint(16, (rows, groups), generator=generator, dtype=torch.uint8)
    if symmetric:
        zero_point.fill_(8)
        scale *= torch.randint(2, scale.shape, generator=generator) * 2 - 1
    codes = torch.randint(16, (rows, cols), generator=generator, dtype=torch.uint8)
    return codes, AffineGrid(scale, zero_point, 4, group_size).rounded(torch.float16)


def slow_words(line: list[int]) -> list[int]:
    """Eight neighbours a word; from the lowest nibble on they are the even ones, then the odd ones."""
    words = []
    for start in range(0, len(line), ROWS_WORD):
        eight = line[start : start + ROWS_WORD]
        word = sum(value << (4 * place) for place, value in enumerate(eight[0::2] + eight[1::2]))
        words.append(word - 2**32 if word >= 2**31 else word)
    return words


@given(rows=st.integers(1, 6), groups=st.integers(1, 4), size=st.sampled_from([32, 64, 128]), seed=st.integers(0, 99))
def test_words_are_those_of_the_description(rows: int, groups: int, size: int, seed: int) -> None:
    rows, cols = rows * ROWS_WORD, groups * size
    scheme = W4.model_copy(update={"group_size": size})
    codes, grid = layer(rows, cols, size, seed)
    tensors = awq.pack(codes, grid, torch.float16, scheme)
    assert {suffix: (t.dtype, tuple(t.shape)) for suffix, t in tensors.items()} == awq.layout(
        scheme, (rows, cols), torch.float16
    )
    for column in range(cols):
        assert tensors["qweight"][column].tolist() == slow_words(codes[:, column].tolist())
    for group in range(groups):
        assert tensors["qzeros"][group].tolist() == slow_words(grid.zero_point[:, group].tolist())
    back, read = awq.unpack(tensors, scheme, (rows, cols))
    assert (
        torch.equal(back, codes)
        and torch.equal(read.scale, grid.scale)
        and torch.equal(read.zero_point, grid.zero_point)
    )


@pytest.mark.parametrize(
    ("own", "columns", "expected"),
    [(None, {256, 384}, 128), (None, {576, 1536}, 64), (None, {96, 128}, 32), (256, {512}, 128), (64, {128}, 64)],
)
def test_whole_rows_and_long_groups_are_repeated_in_groups_that_readers_take(
    own: int | None, columns: set[int], expected: int
) -> None:
    scheme = W4.model_copy(update={"group_size": own})
    stored = awq.stored_scheme(scheme, columns)
    assert stored.group_size == expected
    for cols in columns:
        assert awq.refuse(scheme, "model.q", 16, cols) is None
        codes, grid = layer(16, cols, own)
        tensors = awq.pack(codes, grid, torch.float16, stored)
        back, read = awq.unpack(tensors, stored, (16, cols))
        assert torch.equal(read.dequantize(back), grid.dequantize(codes))
        assert torch.equal(awq.dense(tensors, stored, (16, cols)), grid.dequantize(codes).half())


@pytest.mark.fault("O3")
@pytest.mark.parametrize(
    ("scheme", "rows", "cols", "kind", "words"),
    [
        ("W3A16", 64, 64, "linear", ["not 3", "gptq", "W4A16"]),
        ("W6A16", 64, 64, "linear", ["not 6", "compressed-tensors or mlx", "W4A16"]),
        ("W8A16_G64", 64, 64, "linear", ["not 8", "gptq"]),
        ("NU4", 64, 64, "linear", ["format lut", "W4A16_G128"]),
        ("W4A16", 64, 64, "conv1d", ["Conv1D", "NU4"]),
        ("W4A16", 60, 64, "linear", ["60 rows", "compressed-tensors"]),
        ("W4A16", 64, 80, "linear", ["80 columns", "gptq"]),
        ("W4A16_G16", 64, 64, "linear", ["groups of 16", "gptq"]),
        ("W4A16_G64", 64, 96, "linear", ["64", "96"]),
    ],
)
def test_refusals_name_what_fits(scheme: str, rows: int, cols: int, kind: str, words: list[str]) -> None:
    reason = str(awq.refuse(Scheme.parse(scheme), "model.q", rows, cols, kind))
    assert "model.q" in reason and all(word in reason for word in words)


def test_what_refuse_sends_elsewhere_fits_there() -> None:
    assert (
        FORMATS["gptq"].refuse(Scheme.parse("W3A16"), "q", 64, 64) is None
        and FORMATS["gptq"].refuse(Scheme.parse("W4A16_G16"), "q", 64, 64) is None
    )
    assert FORMATS["gptq"].refuse(Scheme.parse("W4A16"), "q", 64, 80) is None
    assert FORMATS["compressed-tensors"].refuse(Scheme.parse("W4A16"), "q", 60, 64) is None


@pytest.mark.fault("O3")
def test_no_grid_is_rounded_or_approximated() -> None:
    codes, grid = layer(16, 64, 32)
    with pytest.raises(FormatError, match="format lut"):
        awq.pack(codes, NonuniformGrid(torch.randn(16, 16).sort(dim=1).values), torch.float16, W4)
    with pytest.raises(FormatError, match="not exact in bfloat16"):
        awq.pack(codes, grid, torch.bfloat16, W4)
    with pytest.raises(FormatError, match="middle"):
        awq.pack(codes, grid, torch.float16, Scheme.parse("W4A16_G32_SYM"))


def test_a_symmetric_grid_is_stored_with_its_zero_points() -> None:
    scheme = Scheme.parse("W4A16_G32_SYM")
    codes, grid = layer(16, 64, 32, symmetric=True)
    tensors = awq.pack(codes, grid, torch.float16, scheme)
    assert set(tensors["qzeros"].flatten().tolist()) == {0x88888888 - 2**32}
    assert torch.equal(awq.dense(tensors, scheme, (16, 64)), grid.dequantize(codes).half())
    assert not awq.scheme_of(awq.config({"model.q": scheme}, [])).symmetric


def test_config_round_trip() -> None:
    config = awq.config({"model.q": W4}, ["lm_head", "pooler"])
    assert format_of(config) is FORMATS["awq"] and awq.scheme_of(config) == W4
    assert awq.covers(config, "model.q") and not awq.covers(config, "pooler") and not awq.covers(config, "lm_head")


@pytest.mark.parametrize("change", [{"bits": 3}, {"group_size": 48}, {"version": "gemv"}, {"zero_point": False}])
def test_a_config_that_we_do_not_read_is_refused(change: dict) -> None:
    with pytest.raises(FormatError, match=r"config\.json"):
        awq.scheme_of(awq.config({"model.q": W4}, []) | change)


@pytest.mark.fault("O5")
@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda t: t.pop("qzeros"), "missing"),
        (lambda t: t.update(g_idx=torch.zeros(1)), "does not belong"),
        (lambda t: t["scales"][0, 0].fill_(float("inf")), "infinite"),
        (lambda t: t.update(qweight=t["qweight"][:-1]), "qweight"),
    ],
)
def test_damage_is_noticed_before_anything_runs(damage, words: str) -> None:
    tensors = awq.pack(*layer(16, 64, 32), torch.float16, W4)
    damage(tensors)
    with pytest.raises(CheckpointError, match=words):
        awq.dense(tensors, W4, (16, 64), "model.layers.0.q")
