"""Export: the same codes in every container, refusals that write nothing, and a result that stays verified."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny_models
import torch
from safetensors.torch import load_file, save_file

import leangrid
from leangrid.errors import CheckpointError, FormatError, LeangridError, OutputError, RecipeError, VerifyError
from leangrid.exporters.export import WHOLE
from leangrid.formats import FORMATS
from leangrid.models.result_reader import ResultReader
from leangrid.progress import Progress
from leangrid.storage import files
from leangrid.storage.journal import partial_of

SUPPORT = Path(__file__).resolve().parents[3] / "tests" / "support"
Results = Callable[..., Path]


@pytest.fixture(scope="module")
def result(tiny: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Results:
    """``result("W4A16_G32", model)`` -> a finished directory of a tiny bfloat16 model, made once: read it, never write
    into it."""
    made: dict[tuple[str, str], Path] = {}

    def finished(scheme: str, model: str = "qwen2") -> Path:
        if (scheme, model) not in made:
            out = tmp_path_factory.mktemp("results") / f"{model}-{scheme}"
            recipe = leangrid.Recipe(scheme=scheme, steps=64, correct=0, refine=0)
            leangrid.quantize(tiny(model, torch.bfloat16), out, recipe, windows=tiny_models.tokens(2, 16))
            made[scheme, model] = out
        return made[scheme, model]

    return finished


def same_weights(before: Path, after: Path) -> None:
    """Levels, codes and everything beside them are equal, bit for bit."""
    one, two = ResultReader.verified(before), ResultReader.verified(after)
    assert one.layers == two.layers and one.ignore == two.ignore and one.dtype == two.dtype
    for name in one.layers:
        (codes, grid), (codes_after, grid_after) = one.layer(name), two.layer(name)
        assert torch.equal(codes, codes_after) and torch.equal(
            grid.dequantize(codes), grid_after.dequantize(codes_after)
        ), name
        assert torch.equal(one.weight_in_model_dtype(name), two.weight_in_model_dtype(name))
    assert one.plain_tensors().keys() == two.plain_tensors().keys()
    for name in one.plain_tensors():
        assert torch.equal(one.checkpoint.read(name), two.checkpoint.read(name)), name


@pytest.mark.parametrize(
    ("scheme", "to"),
    [
        ("W4A16_G32", "gptq"),
        ("W3A16", "gptq"),
        ("W8A16_SYM", "gptq_v1"),
        ("W4A16", "awq"),
        ("W4A16", "compressed-tensors"),
        ("NU3", "lut"),
        ("W3A16_SYM", "mlx"),
        ("W6A16_SYM", "mlx"),
    ],
)
def test_the_same_codes_in_another_container(result: Results, scheme: str, to: str, tmp_path: Path) -> None:
    source, out = result(scheme), tmp_path / "out"
    done = leangrid.export(source, out, to=to)
    assert leangrid.verify(out) == [] and not partial_of(out).exists()
    assert (
        done.format == to
        and done.layers == 14
        and done.bytes == sum(path.stat().st_size for path in out.iterdir()) - manifest_bytes(out)
    )
    same_weights(source, out)
    manifest, before = (json.loads((path / "manifest.json").read_text()) for path in (out, source))
    assert manifest["exported"] == {
        "from": source.name,
        "format": before["result"]["format"],
        "seal": before["seal"],
        "to": to,
    }
    assert manifest["result"]["bits_per_weight"] == done.bits_per_weight and manifest["recipe"] == before["recipe"]
    assert f"| container | {to}, exported from {source.name}" in (out / "README.md").read_text()
    for name in ("records.jsonl", "run.json", "tokenizer.json", "generation_config.json"):
        assert (out / name).read_bytes() == (source / name).read_bytes()


def manifest_bytes(out: Path) -> int:
    return (out / "manifest.json").stat().st_size


@pytest.mark.parametrize(
    ("scheme", "model"), [("W4A16_G32", "qwen2"), ("NU3", "qwen2"), ("NU3", "gpt2"), ("W3A16", "bert")]
)
def test_dense_is_a_plain_checkpoint_of_the_same_weights(
    result: Results, scheme: str, model: str, tmp_path: Path
) -> None:
    source, out = result(scheme, model), tmp_path / "out"
    done = leangrid.export(source, out, to="dense")
    config = json.loads((out / "config.json").read_text())
    assert "quantization_config" not in config and done.bits_per_weight == 16 and leangrid.verify(out) == []
    plain, _ = leangrid.load(out)
    packed, _ = leangrid.load(source)
    tokens = tiny_models.tokens(2, 40)
    assert not any(hasattr(module, "weight_hat") for module in plain.modules()) and plain.dtype == torch.bfloat16
    with torch.no_grad():
        theirs, ours = plain(tokens), packed(tokens)
    assert torch.equal(theirs[0], ours[0])


@pytest.mark.parametrize(("scheme", "to"), [("W3A16", "gptq"), ("W8A16_SYM", "gptq_v1"), ("W4A16", "awq")])
@pytest.mark.parametrize("dtype", [None, pytest.param(torch.float32, marks=pytest.mark.slow)])
def test_leangrid_opens_what_it_exported(
    result: Results, scheme: str, to: str, dtype: torch.dtype | None, tmp_path: Path
) -> None:
    source, out = result(scheme), tmp_path / "out"
    leangrid.export(source, out, to=to)
    (theirs, _), (ours, _) = leangrid.load(out, dtype=dtype), leangrid.load(source, dtype=dtype)
    tokens = tiny_models.tokens(2, 40)
    with torch.no_grad():
        assert torch.equal(theirs(tokens).logits, ours(tokens).logits)
    with pytest.raises(ValueError, match="not serializable"):  # its config would say gptq over our tensors
        theirs.save_pretrained(tmp_path / "again")


def test_an_export_of_an_export_is_the_first(result: Results, tmp_path: Path) -> None:
    leangrid.export(result("W4A16_G32"), tmp_path / "awq", to="awq")
    leangrid.export(tmp_path / "awq", tmp_path / "back", to="compressed-tensors")
    before, after = (
        load_file(result("W4A16_G32") / "model.safetensors"),
        load_file(tmp_path / "back" / "model.safetensors"),
    )
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


def refused(error: type[LeangridError], words: str, source: Path, out: Path, to: str, **more: object) -> None:
    beside = sorted(out.parent.iterdir())
    with pytest.raises(error, match=words) as caught:
        leangrid.export(source, out, to, **more)  # pyright: ignore[reportArgumentType]
    assert caught.value.exit_code == 2 and sorted(out.parent.iterdir()) == beside


@pytest.mark.fault("O3")
@pytest.mark.parametrize(
    ("scheme", "to", "words"),
    [
        ("W3A16", "awq", r"model\.layers\.0\.self_attn\.q_proj: awq holds 4 bits.*gptq"),
        ("NU3", "gptq", "format lut"),
        ("NU3", "awq", "format lut"),
        ("NU3", "compressed-tensors", "format lut"),
        ("W3A16", "lut", "NU3"),
        ("W4A16", "gguff", "Choose one of: compressed-tensors, lut, gptq"),
    ],
)
def test_what_a_container_cannot_hold_is_refused_before_any_work(
    result: Results, scheme: str, to: str, words: str, tmp_path: Path
) -> None:
    refused(FormatError, words, result(scheme), tmp_path / "out", to)


def test_zero_points_that_version_1_cannot_say(result: Results, tmp_path: Path) -> None:
    grids = [
        ResultReader.verified(result("W2A16_G16")).layer(name)[1]
        for name in ResultReader.verified(result("W2A16_G16")).layers
    ]
    assert any(bool((grid.zero_point == 0).any()) for grid in grids)  # pyright: ignore[reportAttributeAccessIssue]
    refused(
        FormatError, r"zero points are 0.*model\.layers.*version 2", result("W2A16_G16"), tmp_path / "out", "gptq_v1"
    )


@pytest.mark.fault("O6")
def test_mlx_and_its_way_back(result: Results, tmp_path: Path) -> None:
    """Asymmetric zero points are refused by layer, symmetric ones go; from there only a dense checkpoint leads on."""
    with pytest.raises(FormatError, match=r"self_attn.*--format mlx"):
        leangrid.export(result("W4A16_G32"), tmp_path / "no", to="mlx")
    assert not (tmp_path / "no").exists() and not partial_of(tmp_path / "no").exists()
    out = tmp_path / "mlx"
    leangrid.export(result("W4A16_G32_SYM"), out, to="mlx")
    config = json.loads((out / "config.json").read_text())
    assert config["quantization"] == config["quantization_config"] == {"group_size": 32, "bits": 4, "mode": "affine"}
    with pytest.raises(FormatError, match=r"offsets of mlx.*--format awq"):
        leangrid.export(out, tmp_path / "no", to="awq")
    leangrid.export(out, tmp_path / "dense", to="dense")
    assert (
        not {"quantization", "quantization_config"}
        & json.loads((tmp_path / "dense" / "config.json").read_text()).keys()
    )
    leangrid.export(result("W4A16_G32_SYM"), tmp_path / "dense2", to="dense")
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("dense", "dense2"))
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def test_a_source_that_is_not_what_its_manifest_says(
    result: Results, tiny: Callable[..., Path], tmp_path: Path
) -> None:
    copy = shutil.copytree(result("W4A16"), tmp_path / "copy")
    with (copy / "model.safetensors").open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        last = file.read(1)
        file.seek(-1, os.SEEK_END)
        file.write(bytes([last[0] ^ 1]))
    (copy / "stray.txt").write_text("x")
    refused(VerifyError, r"model\.safetensors: contents changed.*stray\.txt", copy, tmp_path / "out", "gptq")
    refused(VerifyError, "not a finished leangrid result", tiny("qwen2"), tmp_path / "out", "gptq")
    refused(VerifyError, "no such directory", tmp_path / "nothing", tmp_path / "out", "gptq")
    dense = tmp_path / "dense"
    leangrid.export(result("W4A16"), dense, to="dense")
    refused(FormatError, "not quantized", dense, tmp_path / "out", "gptq")


@pytest.mark.fault("O7")
def test_an_output_that_is_in_the_way(result: Results, tmp_path: Path) -> None:
    source, out = result("W4A16"), tmp_path / "out"
    refused(OutputError, "is the source, or lies inside", source, source / "sub", "gptq")
    out.mkdir()
    (out / "precious.txt").write_text("x")
    for overwrite in (False, True):
        refused(OutputError, "exists already", source, out, "gptq", overwrite=overwrite)
    shutil.rmtree(out)
    leangrid.export(source, out, to="gptq")
    refused(OutputError, "--overwrite", source, out, "awq")
    leangrid.export(source, out, to="awq", overwrite=True)
    assert (
        json.loads((out / "config.json").read_text())["quantization_config"]["quant_method"] == "awq"
        and leangrid.verify(out) == []
    )
    unfinished = partial_of(tmp_path / "other")
    (unfinished / "blocks").mkdir(parents=True)
    (unfinished / "identity.json").write_text(json.dumps({"format_version": 1, "recipe": {}}))
    refused(OutputError, "unfinished run of another command", source, tmp_path / "other", "gptq")


def test_like_belongs_to_whole_files(result: Results, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refused(
        RecipeError,
        "--like has no meaning for gptq",
        result("W4A16"),
        tmp_path / "out",
        "gptq",
        like=tmp_path / "x.gguf",
    )
    monkeypatch.setitem(WHOLE, "gguf", lambda finished, staged, like, progress: None)
    refused(CheckpointError, "no such file", result("W4A16"), tmp_path / "out", "gguf", like=tmp_path / "x.gguf")


def test_a_whole_file_is_staged_verified_and_published(
    result: Results, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The seam for single-file targets: what the row writes is in the manifest, what it refuses leaves nothing."""

    def writes(finished: ResultReader, staged: Path, like: Path | None, progress: Progress | None) -> float:
        files.atomic_write(staged / "model.whole", "\n".join(finished.layers).encode())
        return 4.5

    def refuses(finished: ResultReader, staged: Path, like: Path | None, progress: Progress | None) -> float:
        files.atomic_write(staged / "half.whole", b"half")
        raise FormatError("no", next(iter(finished.layers)))

    monkeypatch.setitem(WHOLE, "whole", writes)
    done = leangrid.export(result("W4A16"), tmp_path / "out", to="whole")
    assert done.bits_per_weight == 4.5 and leangrid.verify(tmp_path / "out") == []
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "README.md",
        "manifest.json",
        "model.whole",
        "records.jsonl",
        "report.html",
        "run.json",
    ]
    monkeypatch.setitem(WHOLE, "whole", refuses)
    refused(FormatError, "no", result("W4A16"), tmp_path / "none", "whole")


@pytest.fixture(scope="module")
def faint(tiny: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bfloat16 checkpoint with rows so small that their scales lie below what float16 keeps exactly."""
    source = shutil.copytree(tiny("llama2", torch.bfloat16), tmp_path_factory.mktemp("faint") / "source")
    tensors = load_file(source / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][:3] *= 2.0**-14
    tensors["model.layers.1.mlp.up_proj.weight"][3] = 0
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    return source


@pytest.mark.fault("O2")
@pytest.mark.parametrize("to", ["gptq", pytest.param("awq", marks=pytest.mark.slow)])
def test_scales_that_float16_cannot_hold(faint: Path, to: str, tmp_path: Path) -> None:
    """Refused by name in a finished result; never made by a search that knows its container, whose result is exact
    everywhere."""
    recipe = {"scheme": "W4A16_G32", "steps": 64, "refine": 1}
    leangrid.quantize(faint, tmp_path / "bf16", leangrid.Recipe(**recipe), windows=tiny_models.tokens(2, 16))
    refused(
        FormatError,
        r"not exact in float16.*model\.layers\.1\.mlp\.up_proj.*compressed-tensors",
        tmp_path / "bf16",
        tmp_path / "no",
        to,
    )
    leangrid.quantize(faint, tmp_path / to, leangrid.Recipe(**recipe, format=to), windows=tiny_models.tokens(2, 16))
    leangrid.export(tmp_path / to, tmp_path / "back", to="compressed-tensors")
    same_weights(tmp_path / to, tmp_path / "back")


@pytest.mark.parametrize(
    ("to", "scheme", "dtype"),
    [
        ("gptq", "W3A16_G32", torch.float32),
        ("awq", "W4A16", torch.bfloat16),
        pytest.param("awq", "W4A16_SYM", torch.float16, marks=pytest.mark.slow),
        pytest.param("gptq", "GPTQ4_G32", torch.float16, marks=pytest.mark.slow),
        pytest.param("gptq", "W8A16_SYM", torch.bfloat16, marks=pytest.mark.slow),
    ],
)
def test_quantize_writes_it_directly(
    tiny: Callable[..., Path], to: str, scheme: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    recipe = leangrid.Recipe(scheme=scheme, steps=64, format=to)
    done = leangrid.quantize(tiny("llama2", dtype), tmp_path / "out", recipe, windows=tiny_models.tokens(2, 16))
    finished = ResultReader.verified(tmp_path / "out")
    assert finished.format is FORMATS[to] and done.format == to and leangrid.verify(tmp_path / "out") == []
    expected = FORMATS[to].stored_scheme(leangrid.Scheme.parse(scheme), {64, 128})
    assert finished.scheme.group_size == expected.group_size
    model, _ = leangrid.load(tmp_path / "out")
    for name in finished.layers:
        assert torch.equal(model.get_submodule(name).weight_hat, finished.weight_in_model_dtype(name)), name
    planned = leangrid.plan(tiny("llama2", dtype), recipe)
    assert planned.format == to and planned.bits_per_weight == pytest.approx(done.bits_per_weight, abs=1e-3)


def test_quantize_sends_version_1_to_export(tiny: Callable[..., Path], tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="gptq_v1 by leangrid export"):
        leangrid.quantize(tiny("llama2"), tmp_path / "out", leangrid.Recipe(scheme="W4A16", format="gptq_v1"))
    assert not list(tmp_path.iterdir())


@pytest.mark.fault("O7")
@pytest.mark.parametrize(("spread", "last"), [(1, 6), pytest.param(40, 60, marks=pytest.mark.slow)])
def test_a_kill_at_any_moment_leaves_no_model_and_the_same_command_finishes(
    result: Results, spread: int, last: int, tmp_path: Path
) -> None:
    environment = {
        **os.environ,
        "PYTHONPATH": f"{SUPPORT.parents[1] / 'src'}{os.pathsep}{SUPPORT}",
        "OMP_NUM_THREADS": "1",
    }
    memory = Path("/dev/shm")  # noqa: S108 - thousands of files are synced here, and nothing cuts the power
    with tempfile.TemporaryDirectory(dir=memory if os.access(memory, os.W_OK) else tmp_path) as work:
        command = [
            sys.executable,
            str(SUPPORT / "tiny_export.py"),
            str(result("W4A16_G32")),
            work,
            str(spread),
            str(last),
        ]
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    seen = json.loads(done.stdout.splitlines()[-1])
    assert seen["problems"] == [] and seen["killed"] >= spread + last - 2 and seen["published_then_killed"] >= 2, seen
