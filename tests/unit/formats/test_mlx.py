"""MLX's container, our side: layout against a loop packer, refusals, damage, loading. mlx itself is asked by ``make
interop``."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny_models
import torch
import transformers as hf
from hypothesis import given
from hypothesis import strategies as st
from quantized_checkpoints import Made, answer, make_once, reference
from safetensors.torch import load_file, save_file

import leangrid
from leangrid.errors import CheckpointError, FormatError
from leangrid.formats import FORMATS, format_of, schemes_of
from leangrid.formats.mlx import BITS
from leangrid.grids import AffineGrid, NonuniformGrid, OffsetGrid
from leangrid.inference.layers import OffsetLinear
from leangrid.recipe import Recipe
from leangrid.schemes import Scheme
from leangrid.storage.config import add_older_rope_keys

mlx = FORMATS["mlx"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
W4 = Scheme.parse("W4A16_G32")


def layer(rows: int, cols: int, scheme: Scheme, dtype: torch.dtype, seed: int = 0) -> tuple[torch.Tensor, OffsetGrid]:
    """Any code, scales of both signs, any offset."""
    generator = torch.Generator().manual_seed(seed)
    groups = cols // (scheme.group_size or cols)
    scale = (torch.rand(rows, groups, generator=generator) * 0.1 + 1e-3) * (
        torch.randint(2, (rows, groups), generator=generator) * 2 - 1
    )
    offset = torch.randn(rows, groups, generator=generator)
    codes = torch.randint(scheme.levels, (rows, cols), generator=generator, dtype=torch.uint8)
    return codes, OffsetGrid(scale, offset, scheme.bits, scheme.group_size).rounded(dtype)


def loop_words(codes: torch.Tensor, bits: int) -> list[list[int]]:
    """MLX's packing, bit by bit: code j of a row is bits [j b, (j + 1) b) of a stream of bytes, which little-endian
    words hold."""
    words = []
    for row in codes.tolist():
        stream = bytearray(len(row) * bits // 8)
        for j, code in enumerate(row):
            for bit in range(bits):
                at = j * bits + bit
                stream[at // 8] |= (code >> bit & 1) << at % 8
        words.append([int.from_bytes(stream[i : i + 4], "little") for i in range(0, len(stream), 4)])
    return words


@given(
    rows=st.integers(1, 5),
    groups=st.integers(1, 3),
    bits=st.sampled_from(BITS),
    size=st.sampled_from([None, 32, 64, 128]),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 99),
)
def test_what_is_packed_comes_back(
    rows: int, groups: int, bits: int, size: int | None, dtype: torch.dtype, seed: int
) -> None:
    scheme = Scheme(grid="affine", method="leanquant", bits=bits, group_size=size)
    cols = groups * (size or 96)
    codes, grid = layer(rows, cols, scheme, dtype, seed)
    scheme = mlx.stored_scheme(scheme, {cols})
    tensors = mlx.pack(codes, grid, dtype, scheme)
    assert {suffix: (t.dtype, tuple(t.shape)) for suffix, t in tensors.items()} == mlx.layout(
        scheme, (rows, cols), dtype
    )
    assert tensors["weight"].tolist() == loop_words(codes, bits)
    back, read = mlx.unpack(tensors, scheme, (rows, cols))
    assert torch.equal(back, codes) and torch.equal(read.dequantize(codes), grid.dequantize(codes))
    wide = [t.double().repeat_interleave(cols // t.shape[1], dim=1) for t in (grid.scale, grid.offset)]
    exact = wide[0] * codes.double() + wide[1]
    if dtype == torch.float32:  # here the product is rounded too, as MLX does
        torch.testing.assert_close(
            mlx.dense(tensors, scheme, (rows, cols)).double(), exact, rtol=0, atol=1e-6 * float(exact.abs().max())
        )
    else:
        assert torch.equal(mlx.dense(tensors, scheme, (rows, cols)), exact.float().to(dtype))


@pytest.mark.parametrize(
    ("scheme", "columns", "size"),
    [("W3A16", {96, 192}, 32), ("W4A16", {64, 128}, 64), ("W2A16", {384}, 128), ("W4A16_G256", {512}, 128)],
)
def test_whole_rows_and_long_groups_repeat_their_grid(scheme: str, columns: set[int], size: int) -> None:
    stored = mlx.stored_scheme(Scheme.parse(scheme), columns)
    assert stored.group_size == size
    for cols in columns:
        codes, grid = layer(4, cols, Scheme.parse(scheme), torch.bfloat16)
        tensors, repeat = mlx.pack(codes, grid, torch.bfloat16, stored), cols // size // grid.scale.shape[1]
        assert torch.equal(tensors["scales"].float(), grid.scale.repeat_interleave(repeat, dim=1))
        assert torch.equal(tensors["biases"].float(), grid.offset.repeat_interleave(repeat, dim=1))
        assert torch.equal(mlx.dense(tensors, stored, (4, cols)), grid.dequantize(codes).bfloat16())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", BITS)
def test_symmetric_grids_are_always_exact(bits: int, dtype: torch.dtype) -> None:
    """S 2^(b-1) only moves the exponent. In half precision S q and S 2^(b-1) have few bits: s q + b is S (q - Z), bit
    for bit."""
    scheme = Scheme(grid="affine", method="leanquant", bits=bits, group_size=32, symmetric=True)
    scale = torch.randn(16, 4, generator=torch.Generator().manual_seed(bits)) * 0.01
    grid = AffineGrid(scale, torch.full(scale.shape, scheme.levels // 2, dtype=torch.uint8), bits, 32).rounded(dtype)
    codes = torch.randint(scheme.levels, (16, 128), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    dense = mlx.dense(mlx.pack(codes, grid, dtype, scheme), scheme, (16, 128))
    if dtype == torch.float32:
        torch.testing.assert_close(
            dense, grid.dequantize(codes), rtol=0, atol=float(scale.abs().max()) * scheme.levels * 2**-24
        )
    else:
        assert torch.equal(dense, grid.dequantize(codes).to(dtype))


@pytest.mark.fault("O3")
def test_a_zero_point_whose_offset_is_rounded_is_refused() -> None:
    codes = torch.zeros(2, 32, dtype=torch.uint8)
    scale = torch.tensor([[1 + 2**-7], [0.5]])  # all eight bits of a bfloat16; one bit
    grid = AffineGrid(scale, torch.tensor([[3], [3]], dtype=torch.uint8), 4, 32)
    with pytest.raises(FormatError, match=r"rounds 1 of 2.*--format mlx.*_SYM"):
        mlx.pack(codes, grid, torch.bfloat16, W4)
    assert mlx.pack(codes[1:], grid.select_rows(torch.tensor([1])), torch.bfloat16, W4)["biases"].tolist() == [[-1.5]]
    assert mlx.pack(codes, grid, torch.float16, W4)["biases"].tolist() == [
        [-3 * (1 + 2**-7)],
        [-1.5],
    ]  # eleven bits hold both


def test_a_grid_that_does_not_fit_is_never_approximated() -> None:
    codes = torch.zeros(4, 32, dtype=torch.uint8)
    with pytest.raises(FormatError, match="format lut"):
        mlx.pack(codes, NonuniformGrid(torch.randn(4, 16).sort(dim=1).values), torch.float32, W4)
    codes, grid = layer(4, 32, W4, torch.float32)
    with pytest.raises(FormatError, match=r"scales.*bfloat16"):
        mlx.pack(codes, grid, torch.bfloat16, W4)
    with pytest.raises(FormatError, match=r"offsets.*bfloat16"):
        mlx.pack(codes, OffsetGrid(grid.rounded(torch.bfloat16).scale, grid.offset, 4, 32), torch.bfloat16, W4)


@pytest.mark.parametrize(
    ("scheme", "cols", "kind", "words"),
    [
        ("NU3", 128, "linear", ["format lut", "W3A16_G64"]),
        ("W4A16_G64", 128, "conv1d", ["Conv1D", "NU4"]),
        ("W4A16_G16", 128, "linear", ["groups of 16", "W4A16_G128"]),
        ("W4A16_G16", 48, "linear", ["groups of 16", "compressed-tensors"]),
        ("W4A16_G128", 192, "linear", ["128 do not divide its 192"]),
        ("W4A16", 80, "linear", ["80 columns", "compressed-tensors"]),
    ],
)
def test_refusals_name_the_way_out(scheme: str, cols: int, kind: str, words: list[str]) -> None:
    refusal = str(mlx.refuse(Scheme.parse(scheme), "model.q", 64, cols, kind))
    assert all(word in refusal for word in ["model.q", *words]), refusal


@pytest.mark.parametrize(
    "scheme", ["W4A16_G64", "W3A16_G32_SYM", "W8A16", "W2A16_G128", "W6A16_G64", "W5A16", "GPTQ4_G64"]
)
def test_what_fits_is_not_refused(scheme: str) -> None:
    assert mlx.refuse(Scheme.parse(scheme), "model.q", 3, 256) is None


def test_config_is_mlx_lms_and_comes_back() -> None:
    config = mlx.config({"a.q": Scheme.parse("W4A16_G32")}, ["lm_head"])
    assert config == {"group_size": 32, "bits": 4, "mode": "affine"}
    assert format_of(config) is FORMATS["mlx"]
    assert mlx.scheme_of(config) == Scheme.parse("W4A16_G32").model_copy(update={"grid": "offset"})
    assert mlx.config_entries({"a.q": Scheme.parse("W4A16_G32")}, []) == {
        "quantization": config,
        "quantization_config": config,
    }


def test_several_schemes_are_named_by_layer() -> None:
    four, eight = (Scheme.parse(f"W{bits}A16_G64").model_copy(update={"grid": "offset"}) for bits in (4, 8))
    schemes = {"a.q": four, "a.o": four, "a.down": eight}
    config = mlx.config(schemes, [])
    assert config == {
        "group_size": 64,
        "bits": 4,
        "mode": "affine",
        "a.down": {"group_size": 64, "bits": 8, "mode": "affine"},
    }
    assert schemes_of(config, list(schemes)) == schemes
    with pytest.raises(FormatError, match="mxfp4"):
        schemes_of(config | {"a.q": {"group_size": 32, "bits": 4, "mode": "mxfp4"}}, ["a.q"])


@pytest.mark.parametrize(
    "change",
    [{"bits": 7}, {"bits": True}, {"mode": "mxfp4"}, {"group_size": 16}],
)
def test_a_config_that_we_do_not_read_is_refused(change: dict) -> None:
    with pytest.raises(FormatError, match=r"config\.json"):
        mlx.scheme_of({"group_size": 64, "bits": 4, **change})


@pytest.fixture(scope="module")
def made(tiny: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Made:
    return make_once(tiny, tmp_path_factory, "mlx", torch.bfloat16)


@pytest.mark.parametrize(
    ("model", "scheme"), [("llama3_tied", "W4A16_G64"), ("llama2", "W3A16"), ("qwen3", "W2A16_G32"), ("bert", "W8A16")]
)
def test_load_equals_the_dense_model(made: Callable, model: str, scheme: str, tmp_path: Path) -> None:
    source, out, dense = made(model, scheme)
    loaded, _ = leangrid.load(out)
    assert {name for name, module in loaded.named_modules() if isinstance(module, OffsetLinear)} == set(dense)
    expected = answer(reference(source, dense), tiny_models.tokens())
    assert torch.equal(answer(loaded, tiny_models.tokens()), expected)
    assert torch.equal(answer(leangrid.load(out, dense=True)[0], tiny_models.tokens()), expected)
    loaded.save_pretrained(tmp_path / "again")
    again = load_file(tmp_path / "again" / "model.safetensors")
    assert all(torch.equal(tensor, again[name]) for name, tensor in load_file(out / "model.safetensors").items())
    assert json.loads((tmp_path / "again" / "config.json").read_text())["quantization"]["bits"] == int(scheme[1])


def test_in_float32_the_weight_is_not_rounded(made: Callable) -> None:
    """One token at a time MLX multiplies by s q + b in float32; the reader decides what it rounds, not the file."""
    _, out, dense = made("llama2", "W3A16")
    wide, _ = leangrid.load(out, dtype=torch.float32)
    for name, weight in dense.items():
        assert torch.equal(wide.get_submodule(name).weight_hat.bfloat16(), weight)
    assert not all(torch.equal(wide.get_submodule(name).weight_hat, weight.float()) for name, weight in dense.items())


def test_transformers_alone_refuses_it(made: Callable) -> None:
    with pytest.raises(ValueError, match="quant_method"):
        hf.AutoModelForCausalLM.from_pretrained(made("llama2", "W3A16")[1])


def test_tied_embeddings_stay_tied(made: Callable) -> None:
    _, out, _ = made("llama3_tied", "W4A16_G64")
    assert "lm_head.weight" not in load_file(out / "model.safetensors")
    model, _ = leangrid.load(out)
    assert model.lm_head.weight is model.model.embed_tokens.weight


UP = "model.layers.1.mlp.up_proj"


@pytest.mark.fault("O5")
@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda t: t.pop(f"{UP}.scales"), f"{UP}"),
        (lambda t: t.pop(f"{UP}.biases"), f"{UP}.biases"),
        (lambda t: t.update({f"{UP}.weight": t[f"{UP}.weight"].view(torch.int32)}), f"{UP}.weight"),
        (lambda t: t.update({f"{UP}.scales": t[f"{UP}.scales"][:, :1].contiguous()}), f"{UP}.scales"),
        (lambda t: t[f"{UP}.scales"][0, 0].fill_(0), "or 0"),
        (lambda t: t[f"{UP}.biases"][0, 0].fill_(float("inf")), "infinite"),
    ],
)
def test_a_damaged_result_is_refused_before_it_runs(
    made: Callable, damage: Callable, words: str, tmp_path: Path
) -> None:
    out = shutil.copytree(made("llama3_tied", "W4A16_G32")[1], tmp_path / "out")
    tensors = load_file(out / "model.safetensors")
    damage(tensors)
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=words):
        leangrid.load(out)


def test_quantized_embeddings_are_refused_by_name(made: Callable, tmp_path: Path) -> None:
    """mlx-lm's own converter quantizes them."""
    out = shutil.copytree(made("llama2", "W4A16_G64")[1], tmp_path / "out")
    tensors = load_file(out / "model.safetensors")
    codes, grid = layer(tiny_models.VOCAB, tiny_models.HIDDEN, Scheme.parse("W4A16_G64"), torch.bfloat16)
    packed = mlx.pack(codes, grid, torch.bfloat16, Scheme.parse("W4A16_G64"))
    tensors |= {f"model.embed_tokens.{suffix}": tensor for suffix, tensor in packed.items()}
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(FormatError, match=r"model\.embed_tokens.*mlx-lm"):
        leangrid.load(out)


def test_auto_scheme_takes_the_widest_group_that_fits(tiny: Callable[..., Path]) -> None:
    from leangrid.models.skeleton import Skeleton
    from leangrid.planning.resolve import resolve_recipe
    from leangrid.storage.source import open_source

    skeleton = Skeleton(open_source(tiny("llama2")))  # 64 and 128 columns
    assert resolve_recipe(Recipe(format="mlx"), skeleton).scheme == "W4A16_G64"
    assert resolve_recipe(Recipe(), skeleton).scheme == "W4A16"


@pytest.mark.parametrize("scheme", ["W4A16_G32", "W6A16_G32", "W3A16_SYM", "GPTQ4_G64", "W2A16"])
def test_quantize_for_mlx_end_to_end(tiny: Callable[..., Path], scheme: str, tmp_path: Path) -> None:
    """Rounded in the search: what the run computed with is what the file says, and no later step rounds it."""
    out = tmp_path / "out"
    result = leangrid.quantize(
        tiny("llama3", torch.bfloat16),
        out,
        Recipe(scheme=scheme, format="mlx", steps=64),
        windows=tiny_models.tokens(4, 32),
    )
    assert result.layers == 14 and leangrid.verify(out) == []
    config = json.loads((out / "config.json").read_text())
    assert (
        config["quantization"] == config["quantization_config"]
        and config["quantization"]["bits"] == Scheme.parse(scheme).bits
    )
    assert (
        config["rope_theta"] == 500000.0
        and config["rope_scaling"]["rope_type"] == "llama3"
        and config["tie_word_embeddings"] is False
    )
    model, _ = leangrid.load(out)
    assert sum(isinstance(module, OffsetLinear) for module in model.modules()) == 14
    assert bool(answer(model, tiny_models.tokens()).isfinite().all())
    assert result.loss < result.loss_minmax or scheme.startswith("GPTQ")


def test_older_places_of_the_rotary_embedding() -> None:
    llama3 = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0}
    assert add_older_rope_keys({"rope_parameters": llama3}) == {
        "rope_parameters": llama3,
        "rope_theta": 5e5,
        "rope_scaling": llama3,
    }
    plain = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}, "rope_theta": 7.0, "rope_scaling": None}
    assert add_older_rope_keys(plain) == plain  # what is there stays
    kinds = {
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
        "sliding_attention": {"rope_theta": 1e4},
    }
    older = add_older_rope_keys({"rope_parameters": kinds})
    assert (older["rope_theta"], older["rope_local_base_freq"], older["rope_scaling"]) == (
        1e6,
        1e4,
        kinds["full_attention"],
    )
    assert add_older_rope_keys({"model_type": "bert"}) == {"model_type": "bert"}
