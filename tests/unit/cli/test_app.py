"""The command line: what it parses, prints and exits with. Whole commands run on tiny models."""

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny_models
import torch
from typer.testing import CliRunner, Result

import leangrid
from leangrid.cli.app import app
from leangrid.cli.options import read_share
from leangrid.errors import Interrupted, RecipeError
from leangrid.exporters.export import targets
from leangrid.formats import FORMATS
from leangrid.progress import Event

Tiny = Callable[..., Path]
COMMANDS = ("quantize", "plan", "eval", "export", "generate", "report", "compare", "verify")
pytestmark = pytest.mark.filterwarnings("ignore:leangrid runs without its C")


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments], prog_name="leangrid")


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("text") / "prose.txt"
    file.write_text("".join(f"Sentence number {index} of a text that is long enough.\n" for index in range(100)))
    return file


@pytest.fixture(scope="module")
def quantized(tiny: Tiny, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("quantized") / "out"
    done = run(
        "quantize",
        tiny("llama3"),
        out,
        "--scheme",
        "NU4",
        "--calibration",
        text,
        "--samples",
        4,
        "--length",
        32,
        "--quiet",
    )
    assert done.exit_code == 0, done.output
    return out


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> list[tuple[tuple[Any, ...], dict[str, Any]]]:
    """What ``quantize`` was called with, without its work."""
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def quantize(*arguments: Any, **options: Any) -> SimpleNamespace:
        calls.append((arguments, options))
        return SimpleNamespace(exit_code=0, to_dict=lambda: {"out": "o", "loss": float("nan")})

    monkeypatch.setattr("leangrid.run.quantize.quantize", quantize)
    return calls


@pytest.mark.parametrize("command", COMMANDS)
def test_help_is_one_screen_with_examples_before_the_options(command: str) -> None:
    done = CliRunner().invoke(app, [command, "--help"], prog_name="leangrid", env={"COLUMNS": "120"})
    assert done.exit_code == 0 and len(done.output.splitlines()) <= 48
    assert done.output.index(f"  leangrid {command} ") < done.output.index("Options:")


def test_the_help_names_every_container() -> None:
    """Help, recipe and docstring list them by hand, so that showing help imports no torch."""

    def words(text: str | None) -> set[str]:
        return set(re.split(r"[\s,:()]+", text or ""))

    written = {name for name, container in FORMATS.items() if not container.EXPORT_ONLY}
    assert written <= words(run("quantize", "--help").output)
    assert {"auto", *written} <= words(leangrid.Recipe.model_fields["format"].description)
    assert set(targets()) <= words(run("export", "--help").output) and set(targets()) <= words(leangrid.export.__doc__)


@pytest.mark.parametrize("arguments", [["--help"], ["quantize", "--help"], ["--version"]])
def test_help_is_shown_without_torch(arguments: list[str]) -> None:
    """Importing torch takes seconds, and transformers more."""
    code = f"""
import atexit, sys
from leangrid.cli.app import main
sys.argv = ["leangrid", *{arguments}]
atexit.register(lambda: print("loaded:", *sorted({{"torch", "transformers", "numpy"}} & set(sys.modules))))
main()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "loaded:"


def test_every_command_is_listed_and_nothing_is_asked_without_arguments() -> None:
    done = run()
    assert all(re.search(rf"^  {command} ", done.output, re.MULTILINE) for command in COMMANDS)
    assert run("--version").output == f"{leangrid.__version__}\n"


def test_patterns_are_given_one_by_one(recorded: list, tmp_path: Path) -> None:
    options = ("--ignore", "*.down_proj", "--ignore", "lm_head", "--only", "re:.*mlp.*")
    assert run("quantize", "src", "out", *options).exit_code == 0
    assert run("quantize", "src", "out").exit_code == 0
    given, plain = (call[0][2] for call in recorded)
    assert (given.ignore, given.only) == (("*.down_proj", "lm_head"), ("re:.*mlp.*",))
    assert plain == leangrid.Recipe()
    file = tmp_path / "r.toml"
    file.write_text('ignore = ["*.up_proj"]\nonly = ["*.mlp.*"]\n')
    assert run("quantize", "src", "out", "--recipe", file, "--only", "o_proj").exit_code == 0
    assert (recorded[-1][0][2].ignore, recorded[-1][0][2].only) == (("*.up_proj",), ("o_proj",))


def test_plan_says_what_was_found_and_refuses_a_pattern_that_names_nothing(tiny: Tiny) -> None:
    sizes = ("--samples", 4, "--length", 32)
    done = run("plan", tiny("llama3"), *sizes, "--ignore", "*.down_proj")
    assert done.exit_code == 0, done.output
    assert re.search(r"^blocks +2 in model.layers$", done.stdout, re.MULTILINE)
    assert re.search(r"^2 LlamaDecoderLayer +self_attn.{q_proj, k_proj, v_proj} \| ", done.stdout, re.MULTILINE)
    assert re.search(r"^stays +\*.down_proj \(2\): --ignore$", done.stdout, re.MULTILINE)
    done = run("plan", tiny("llama3"), *sizes, "--ignore", "*.dwon_proj")
    assert done.exit_code == 2 and "names no linear of the model" in done.stderr and "down_proj" in done.stderr


def test_options_reach_the_recipe_and_win_over_its_file(recorded: list, tmp_path: Path) -> None:
    file = tmp_path / "r.toml"
    file.write_text('scheme = "NU3"\nsamples = 7\np = 1.5\n')
    done = run(
        "quantize",
        "src",
        "out",
        "--recipe",
        file,
        "--samples",
        9,
        "--steps",
        64,
        "--correct",
        "auto",
        "--refine",
        2,
        "--damping",
        0.1,
        "--length",
        99,
        "--seed",
        5,
        "--format",
        "lut",
        "--calibration",
        "self",
        "--device",
        "cuda:1",
        "--threads",
        3,
        "--overwrite",
        "--restart",
        "--max-rescued",
        "5%",
        "--max-kl",
        0.5,
        "--state-dir",
        "states",
    )
    assert done.exit_code == 0, done.output
    ((source, out, recipe), options) = recorded[0]
    assert (source, out) == ("src", Path("out"))
    assert recipe.model_dump(exclude={"search", "guard", "act_order", "products", "layers"}) == {
        "scheme": "NU3",
        "samples": 9,
        "p": 1.5,
        "steps": 64,
        "correct": "auto",
        "refine": 2,
        "damping": 0.1,
        "length": 99,
        "seed": 5,
        "format": "lut",
        "calibration": "self",
    }
    progress = options.pop("progress")
    progress(Event("notice", message="heard"))
    assert options == {
        "device": "cuda:1",
        "threads": 3,
        "overwrite": True,
        "restart": True,
        "max_rescued": 0.05,
        "max_kl": 0.5,
        "state_dir": Path("states"),
    }


def test_what_is_not_said_is_left_to_the_recipes_defaults(recorded: list) -> None:
    run("quantize", "src", "out")
    assert recorded[0][0][2] == leangrid.Recipe()


def test_json_is_one_strict_object_on_stdout(recorded: list) -> None:
    assert run("quantize", "src", "out", "--json").stdout == '{"out": "o", "loss": null}\n'


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("quantize", "src"), "out"),
        (("quantize", "src", "out", "--scheme", "W7A16"), "7 bits are not available"),
        (("quantize", "src", "out", "--samples", "many"), "--samples"),
        (("quantize", "src", "out", "--samples", "0"), "samples"),
        (("quantize", "src", "out", "--max-rescued", "200%"), "no share"),
        (("quantize", "src", "out", "--max-kl", "-1"), "no limit"),
        (("quantize", "src", "out", "--recipe", "absent.toml"), "no such recipe"),
        (("quantize", "absent/", "out"), "absent"),
        (("plan", "absent/"), "absent"),
        (("eval", "absent/"), "absent"),
        (("generate", "absent/", "hello"), "absent"),
        (("verify", "absent"), "absent"),
        (("report", "absent"), "absent"),
        (("compare", "absent"), "absent"),
        (("compare", "absent", "--plot", "plot.png"), "HTML page"),
        (("eval", "absent", "--keep"), "no such directory"),
        (("nonsense",), "nonsense"),
    ],
)
def test_bad_input_exits_2_with_the_reason_on_stderr(
    arguments: tuple[str, ...], told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    done = run(*arguments)
    assert done.exit_code == 2 and told in done.stderr and done.stdout == "" and "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []


def failing(error: BaseException) -> Callable[..., None]:
    def quantize(*arguments: Any, **options: Any) -> None:
        raise error

    return quantize


@pytest.mark.parametrize(
    ("error", "code", "told"),
    [
        (Interrupted("out of memory", "block 3", "Use --samples 8"), 3, "to go on, run the same command: leangrid"),
        (KeyboardInterrupt(), 3, "finished blocks are kept"),
        (PermissionError(13, "Permission denied", "out/x"), 3, "Permission denied (out/x)"),
        (ZeroDivisionError("a bug"), 1, "Traceback"),
    ],
)
def test_every_ending_has_its_code(error: BaseException, code: int, told: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("leangrid.run.quantize.quantize", failing(error))
    done = run("quantize", "src", "out")
    assert done.exit_code == code and told in done.stderr


def test_debug_shows_where_an_error_came_from(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("leangrid.run.quantize.quantize", failing(RecipeError("no")))
    assert "Traceback" not in run("quantize", "src", "out").stderr
    assert "Traceback" in run("--debug", "quantize", "src", "out").stderr


def test_too_many_rescues_exit_4(monkeypatch: pytest.MonkeyPatch) -> None:
    result = SimpleNamespace(
        exit_code=4, too_many_rescues=True, quality={"passed": True}, to_dict=lambda: {"out": "o", "rescues": 9}
    )
    monkeypatch.setattr("leangrid.run.quantize.quantize", lambda *_, **__: result)
    done = run("quantize", "src", "out")
    assert done.exit_code == 4 and "more than 1%" in done.stderr and "rescues  9" in done.stdout


@pytest.mark.parametrize(("said", "meant"), [("1%", 0.01), ("0.25", 0.25), ("0", 0.0), ("100%", 1.0)])
def test_shares(said: str, meant: float) -> None:
    assert read_share(said) == meant


@pytest.mark.parametrize("said", ["", "%", "-1%", "1.5", "nan", "x"])
def test_no_shares(said: str) -> None:
    with pytest.raises(RecipeError):
        read_share(said)


def test_quantize_prints_progress_on_stderr_and_the_result_on_stdout(tiny: Tiny, text: Path, tmp_path: Path) -> None:
    arguments = (
        "quantize",
        tiny("llama3"),
        tmp_path / "out",
        "--scheme",
        "W4A16_G32",
        "--calibration",
        text,
        "--samples",
        3,
        "--length",
        16,
    )
    done = run(*arguments, "--json")
    assert done.exit_code == 0, done.output
    values = json.loads(done.stdout)
    promised = {
        "out",
        "scheme",
        "layers",
        "bits_per_weight",
        "bytes",
        "loss",
        "loss_minmax",
        "rescues",
        "seconds",
        "peak_ram_bytes",
        "peak_gpu_bytes",
        "kernels",
    }
    assert promised <= values.keys() and values["layers"] == 14 and values["scheme"] == "W4A16_G32"
    blocks = [each for each in done.stderr.splitlines() if each.startswith("block ")]
    assert [each.split("  ")[0] for each in blocks] == ["block 1/2", "block 2/2"] and all(
        "loss" in each for each in blocks
    )
    assert "Sentence number 0 of a text" in done.stderr  # the first window, for a person to see


def test_plan_estimates_from_headers(tiny: Tiny) -> None:
    done = run("plan", tiny("llama3"), "--scheme", "NU4", "--samples", 4, "--length", 32)
    assert done.exit_code == 0, done.output
    assert re.search(r"model\.layers\.\*\.mlp\.down_proj +64 x 128 +\S* *2 ", done.stdout) and "bound by" in done.stdout
    values = json.loads(run("plan", tiny("llama3"), "--scheme", "NU4", "--json").stdout)
    assert values["bound"] in ("memory", "compute", "disk") and values["layers"] == 14


def test_plan_of_a_shape_on_devices_that_are_not_here() -> None:
    asked = ("plan", "--shape", "smollm2-135m", "--device", "2x24GB")
    done = run(*asked)
    assert done.exit_code == 0, done.output
    assert (
        re.search(r"assumed +forward .* TFLOP/s", done.stdout)
        and "2, each as above" in done.stdout
        and "hidden states" in done.stdout
    )
    values = json.loads(run(*asked, "--json").stdout)
    assert (
        values["layers"] == 210
        and values["devices"] == 2
        and values["rates"]["assumed"]
        and values["source"] == "smollm2-135m"
    )
    for wrong in (("--shape", "nothing"), ("--shape", "smollm2-135m", "--device", "2x24"), ()):
        refused = run("plan", *wrong)
        assert (
            refused.exit_code == 2 and refused.stderr.startswith("error: ") and len(refused.stderr.splitlines()) <= 3
        ), refused.output


def test_eval_compares_with_the_original(quantized: Path, tiny: Tiny, text: Path) -> None:
    done = run(
        "eval", quantized, "--reference", tiny("llama3"), "--text", text, "--length", 32, "--windows", 2, "--json"
    )
    assert done.exit_code == 0, done.output
    values = json.loads(done.stdout)
    assert values["tokens"] == 62 and values["kl_mean"] > 0
    assert "window 2/2" in done.stderr
    done = run("eval", quantized, "--text", text, "--length", 32, "--windows", 2, "--quiet")
    assert (
        done.exit_code == 0
        and f"perplexity       {values['perplexity']:.4g}" in done.stdout
        and "window" not in done.stderr
    )


def test_generate_streams_what_the_model_says(quantized: Path) -> None:
    tokenizer = tiny_models.tokenizer()
    model, _ = leangrid.load(quantized, dtype=torch.float32)
    ids = tokenizer("Sentence number")["input_ids"]
    with torch.no_grad():
        for _ in range(6):
            ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
    done = run("generate", quantized, "Sentence number", "--max-new-tokens", 6)
    expected = tokenizer.decode(ids[-6:], skip_special_tokens=True)
    assert done.exit_code == 0 and done.stdout == expected.rstrip("\ufffd") + "\n"
    values = json.loads(run("generate", quantized, "Sentence number", "--max-new-tokens", 6, "--json").stdout)
    assert values["text"] == expected.rstrip("\ufffd") and values["tokens"] == 6


def test_verify_lists_what_differs(quantized: Path, tmp_path: Path) -> None:
    assert run("verify", quantized).exit_code == 0
    for file in quantized.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "config.json").write_text("{}")
    done = run("verify", tmp_path)
    assert done.exit_code == 2 and "config.json" in done.stdout
    assert json.loads(run("verify", tmp_path, "--json").stdout)["verified"] is False


def test_what_eval_keeps_is_in_report_card_and_comparison(
    quantized: Path, tiny: Tiny, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = Path(shutil.copytree(quantized, tmp_path / "out"))
    done = run(
        "eval",
        out,
        "--reference",
        tiny("llama3"),
        "--text",
        text,
        "--length",
        32,
        "--windows",
        2,
        "--keep",
        "--json",
        "--quiet",
    )
    assert done.exit_code == 0, done.output
    figure = f"{json.loads(done.stdout)['kl_mean']:.4g}"
    assert run("verify", out).exit_code == 0 and figure in (out / "README.md").read_text()
    opened: list[str] = []
    monkeypatch.setattr("typer.launch", lambda address: opened.append(address) or 0)
    done = run("report", out, "--open")
    assert (
        done.exit_code == 0 and done.stdout == f"{out / 'report.html'}\n" and opened == [(out / "report.html").as_uri()]
    )
    assert figure in (out / "report.html").read_text(encoding="utf-8")
    done = run("compare", out, "--plot", tmp_path / "p.html")
    assert done.exit_code == 0 and figure in done.stdout and "2 windows of 32 tokens of prose.txt" in done.stdout
    assert figure in (tmp_path / "p.html").read_text(encoding="utf-8")
    assert json.loads(run("compare", out, "--json").stdout)["rows"][0]["front"] is True


def test_a_report_of_a_damaged_directory_is_refused(quantized: Path, tmp_path: Path) -> None:
    out = Path(shutil.copytree(quantized, tmp_path / "out"))
    (out / "records.jsonl").write_text("")
    before = (out / "report.html").read_bytes()
    done = run("report", out)
    assert (
        done.exit_code == 2
        and done.stdout == ""
        and "records.jsonl: 0 bytes" in done.stderr
        and (out / "report.html").read_bytes() == before
    )
