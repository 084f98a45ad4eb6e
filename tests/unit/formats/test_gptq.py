"""GPTQ, our side: words against a packer written from the format's description, refusals, damage. GPTQModel itself:
make interop."""

import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from leangrid.errors import CheckpointError, FormatError
from leangrid.formats import FORMATS, format_of
from leangrid.formats.gptq import Gptq
from leangrid.grids import AffineGrid, NonuniformGrid
from leangrid.schemes import Scheme

BITS = [2, 3, 4, 8]
V1, V2 = FORMATS["gptq_v1"], FORMATS["gptq"]
W4 = Scheme.parse("W4A16_G32")


def layer(rows: int, cols: int, scheme: Scheme, seed: int = 0, least: int = 0) -> tuple[Tensor, AffineGrid]:
    """Any codes, zero points from ``least`` on, scales of many magnitudes exact in float16 (both signs where
    symmetric)."""
    generator = torch.Generator().manual_seed(seed)
    groups = cols // scheme.group_size if scheme.group_size else 1
    scale = torch.exp(torch.rand(rows, groups, generator=generator) * 6 - 8)
    zero_point = torch.randint(least, scheme.levels, (rows, groups), generator=generator, dtype=torch.uint8)
    if scheme.symmetric:
        zero_point.fill_(scheme.levels // 2)
        scale *= torch.randint(2, scale.shape, generator=generator) * 2 - 1
    codes = torch.randint(scheme.levels, (rows, cols), generator=generator, dtype=torch.uint8)
    return codes, AffineGrid(scale, zero_point, scheme.bits, scheme.group_size).rounded(torch.float16)


def slow_words(values: list[int], bits: int) -> list[int]:
    """One line of codes as GPTQ's own packers lay them out: whole codes in a word, and for 3 bits 10-1-10-1-10 in three
    words."""
    words: list[int] = []
    if bits != 3:
        a_word = 32 // bits
        for start in range(0, len(values), a_word):
            words.append(sum(value << (bits * place) for place, value in enumerate(values[start : start + a_word])))
    else:
        for start in range(0, len(values), 32):
            v = values[start : start + 32]
            words.append(sum(v[i] << (3 * i) for i in range(10)) | (v[10] & 3) << 30)
            words.append(v[10] >> 2 | sum(v[i] << (3 * (i - 11) + 1) for i in range(11, 21)) | (v[21] & 1) << 31)
            words.append(v[21] >> 1 | sum(v[i] << (3 * (i - 22) + 2) for i in range(22, 32)))
    return [word - 2**32 if word >= 2**31 else word for word in words]


@given(
    bits=st.sampled_from(BITS),
    rows=st.integers(1, 3),
    groups=st.integers(1, 3),
    size=st.sampled_from([None, 16, 32, 64]),
    version=st.sampled_from([1, 2]),
    seed=st.integers(0, 99),
)
def test_words_are_those_of_the_description(
    bits: int, rows: int, groups: int, size: int | None, version: int, seed: int
) -> None:
    rows, cols = rows * 32, groups * (size or 32) * (2 if bits == 3 and size == 16 else 1)
    scheme = Scheme(grid="affine", method="leanquant", bits=bits, group_size=size)
    codes, grid = layer(rows, cols, scheme, seed, least=1 if version == 1 else 0)
    container = Gptq(version)
    tensors = container.pack(codes, grid, torch.float16, scheme)
    stored_zero = grid.zero_point.int() - (1 if version == 1 else 0)
    for row in range(rows):
        assert tensors["qweight"][:, row].tolist() == slow_words(codes[row].tolist(), bits)
    for group in range(grid.scale.shape[1]):
        assert tensors["qzeros"][group].tolist() == slow_words(stored_zero[:, group].tolist(), bits)
    assert torch.equal(tensors["scales"].float(), grid.scale.T)
    assert tensors["g_idx"].tolist() == [column // (size or cols) for column in range(cols)]


@given(
    bits=st.sampled_from(BITS),
    rows=st.integers(1, 5),
    cols=st.integers(1, 5),
    symmetric=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
    version=st.sampled_from([1, 2]),
)
def test_what_is_packed_comes_back(
    bits: int, rows: int, cols: int, symmetric: bool, dtype: torch.dtype, version: int
) -> None:
    unit = 32 if bits == 3 else 32 // bits  # the least that fills a word
    scheme = Scheme(grid="affine", method="leanquant", bits=bits, group_size=None, symmetric=symmetric)
    codes, grid = layer(rows * unit, cols * unit, scheme, least=1)
    grid = grid.rounded(dtype) if dtype == torch.bfloat16 else grid
    shape, container = (rows * unit, cols * unit), Gptq(version)
    tensors = container.pack(codes, grid, dtype, scheme)
    assert {suffix: (t.dtype, tuple(t.shape)) for suffix, t in tensors.items()} == container.layout(
        scheme, shape, dtype
    )
    back, read = container.unpack(tensors, scheme, shape)
    assert (
        torch.equal(back, codes)
        and torch.equal(read.scale, grid.scale)
        and torch.equal(read.zero_point, grid.zero_point)
    )
    assert torch.equal(container.dense(tensors, scheme, shape), grid.dequantize(codes).half())


@pytest.mark.fault("O3")
@pytest.mark.parametrize(
    ("scheme", "rows", "cols", "kind", "words"),
    [
        ("NU3", 64, 64, "linear", ["format lut", "W3A16"]),
        ("W4A16", 64, 64, "conv1d", ["Conv1D", "NU4"]),
        ("W6A16", 64, 64, "linear", ["not 6", "compressed-tensors"]),
        ("W4A16_G48", 64, 96, "linear", ["48", "compressed-tensors"]),
        ("W4A16_G64", 64, 96, "linear", ["64", "96", "compressed-tensors"]),
        ("W3A16", 64, 80, "linear", ["80 columns", "compressed-tensors"]),
        ("W3A16", 80, 64, "linear", ["80 rows", "compressed-tensors"]),
        ("W4A16", 65, 64, "linear", ["65 rows", "compressed-tensors"]),
    ],
)
def test_refusals_name_what_fits(scheme: str, rows: int, cols: int, kind: str, words: list[str]) -> None:
    for container in (V1, V2):
        reason = str(container.refuse(Scheme.parse(scheme), "model.q", rows, cols, kind))
        assert "model.q" in reason and all(word in reason for word in words)
    assert V2.refuse(Scheme.parse("W4A16_G32"), "model.q", 64, 96) is None


def test_what_refuse_sends_to_compressed_tensors_fits_there() -> None:
    for scheme, rows, cols in (("W4A16_G48", 64, 96), ("W3A16", 64, 80), ("W4A16", 65, 64)):
        assert FORMATS["compressed-tensors"].refuse(Scheme.parse(scheme), "model.q", rows, cols) is None


@pytest.mark.fault("O2")
def test_version_1_refuses_a_zero_point_of_0_and_version_2_keeps_it() -> None:
    codes, grid = layer(32, 64, W4)
    assert bool((grid.zero_point == 0).any())
    with pytest.raises(FormatError, match=r"zero points are 0.*version 2"):
        V1.pack(codes, grid, torch.float16, W4)
    assert torch.equal(V2.unpack(V2.pack(codes, grid, torch.float16, W4), W4, (32, 64))[1].zero_point, grid.zero_point)


@pytest.mark.fault("O3")
def test_no_grid_is_rounded_or_approximated() -> None:
    codes, grid = layer(32, 64, W4)
    with pytest.raises(FormatError, match="format lut"):
        V2.pack(codes, NonuniformGrid(torch.randn(32, 16).sort(dim=1).values), torch.float16, W4)
    too_fine = AffineGrid(grid.scale + 1e-6, grid.zero_point, 4, 32)
    with pytest.raises(FormatError, match=r"not exact in float16.*compressed-tensors"):
        V2.pack(codes, too_fine, torch.float32, W4)
    with pytest.raises(
        FormatError, match="not exact in bfloat16"
    ):  # a float16 scale that a reader in bfloat16 would round
        V2.pack(codes, grid, torch.bfloat16, W4)
    with pytest.raises(FormatError, match="middle"):
        V2.pack(codes, grid, torch.float16, Scheme.parse("W4A16_G32_SYM"))


def test_every_scale_that_the_precision_allows_is_exact_in_both_dtypes() -> None:
    """All positive bfloat16 numbers inside the limits, and none just outside."""
    every = torch.arange(1 << 15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    every = every[every.isfinite() & (every > 0)].float()
    precision = V2.precision(torch.bfloat16)
    inside = (every >= precision.smallest) & (every <= precision.largest)
    exact = every.half().float() == every
    assert precision.dtype == torch.bfloat16 and bool(exact[inside].all()) and int(inside.sum()) > 4000
    assert not bool(exact[every > precision.largest].any())
    below = every[every < precision.smallest]
    assert float(below.max().half()) != float(below.max())


@pytest.mark.parametrize("name", ["W4A16_G64", "W3A16", "W2A16_G16_SYM", "W8A16"])
@pytest.mark.parametrize("container", [V1, V2], ids=lambda container: container.NAME)
def test_config_round_trip(name: str, container: Gptq) -> None:
    scheme = Scheme.parse(name)
    config = container.config({"model.q": scheme}, ["lm_head"])
    assert format_of(config) is container and container.scheme_of(config) == scheme
    assert container.covers(config, "model.q") and not container.covers(config, "lm_head")
    assert V1.EXPORT_ONLY and not V2.EXPORT_ONLY


def test_linears_that_stay_are_named_as_each_reader_asks() -> None:
    """GPTQModel: patterns that exclude; optimum: ends of the names that are quantized, whole where a name that stays
    ends so too."""
    names = ["model.layers.0.mlp.up_proj", "model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj"]
    stays = ["lm_head", "model.layers.0.mlp.gate", "tower.blocks.0.mlp.up_proj", "tower.blocks.0.qkv"]
    config = V2.config(dict.fromkeys(names, W4), stays)
    assert list(config["dynamic"]) == [f"-:^{re.escape(name)}$" for name in stays[1:]]
    assert config["modules_in_block_to_quantize"] == [["model.layers.0.mlp.up_proj", "self_attn.q_proj"]]
    assert format_of(config) is V2 and V2.scheme_of(config) == W4
    assert [name for name in [*names, *stays, "model.layers.0.mlp.gate_proj"] if V2.covers(config, name)] == [
        *names, "model.layers.0.mlp.gate_proj"]  # fmt: skip
    assert not {"dynamic", "modules_in_block_to_quantize"} & V2.config(dict.fromkeys(names, W4), ["lm_head"]).keys()


def test_patterns_of_another_tool_that_exclude_are_read() -> None:
    config = V2.config({"model.q": W4}, []) | {"dynamic": {r"-:.*\.mtp\..*": {}, r"-:.*shared_expert": {}}}
    assert V2.scheme_of(config) == W4 and V2.covers(config, "model.layers.0.mlp.up_proj")
    assert not V2.covers(config, "model.mtp.0.up_proj") and not V2.covers(config, "model.layers.0.shared_expert.up")


@pytest.mark.parametrize(
    "change",
    [
        {"bits": 5},
        {"group_size": 0},
        {"group_size": "x"},
        {"desc_act": True},
        {"sym": None},
        {"dynamic": {"+:x": {"bits": 8}}},
        {"dynamic": {"x": {}}},
        {"dynamic": {"-:(": {}}},
        {"dynamic": ["-:x"]},
    ],
)
def test_a_config_that_we_do_not_read_is_refused(change: dict) -> None:
    with pytest.raises(FormatError, match=r"config\.json"):
        V2.scheme_of(V2.config({"model.q": W4}, []) | change)
    with pytest.raises(FormatError, match="gptq_p"):
        format_of({"quant_method": "gptq", "checkpoint_format": "gptq_p"})


@pytest.mark.fault("O5")
@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda t: t.pop("qzeros"), "missing"),
        (lambda t: t.update(extra=torch.zeros(1)), "does not belong"),
        (lambda t: t["scales"][0, 0].fill_(float("nan")), "NaN"),
        (lambda t: t["scales"][0, 0].fill_(0), "or 0"),
        (lambda t: t["g_idx"][0].fill_(1), "order"),
        (lambda t: t.update(scales=t["scales"].float()), "float32"),
        (lambda t: t.update(qweight=t["qweight"][:-1]), "qweight"),
    ],
)
def test_damage_is_noticed_before_anything_runs(damage, words: str) -> None:
    tensors = V2.pack(*layer(32, 64, W4), torch.float16, W4)
    damage(tensors)
    with pytest.raises(CheckpointError, match=words):
        V2.dense(tensors, W4, (32, 64), "model.layers.0.q")


def test_a_borrowed_zero_point_of_another_tool_is_refused() -> None:
    """Version 1 with Z = 0, as tools wrote it: the stored field is 15, and readers disagree on what it means."""
    tensors = V1.pack(*layer(32, 64, W4, least=1), torch.float16, W4)
    tensors["qzeros"][0, 0] = -1
    with pytest.raises(CheckpointError, match="cannot say"):
        V1.check(tensors, W4, (32, 64), "model.layers.0.q")
