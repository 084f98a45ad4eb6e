"""--quiet: nothing on stderr but errors. Without it: sentences of ours, nothing of the libraries. What cannot be parsed
is one sentence."""

import json
import logging
import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from leangrid.cli.app import app
from leangrid.cli.exits import outcome


def test_quiet_commands_say_nothing_on_stderr(tiny: Callable[..., Path], tmp_path: Path) -> None:
    source, out, text = str(tiny("llama3")), str(tmp_path / "out"), tmp_path / "text.txt"
    text.write_text("A sentence of a text. " * 200)
    quantize = [
        "quantize",
        source,
        out,
        "--scheme",
        "W8A16",
        "--calibration",
        str(text),
        "--samples",
        "2",
        "--length",
        "32",
    ]
    evaluate = ["eval", out, "--reference", source, "--text", str(text), "--length", "32", "--windows", "1"]
    # One process for all: what libraries print depends on what was imported before.
    program = """if True:
        import sys, json
        from leangrid.cli.app import main
        for arguments in json.loads(sys.argv[1]):
            sys.argv[1:] = [*arguments, "--quiet"]
            try:
                main()
            except SystemExit as end:
                print("ended with", end.code)
    """
    commands = json.dumps([quantize, evaluate, ["generate", out, "hello", "--max-new-tokens", "3"]])
    done = subprocess.run(
        [sys.executable, "-c", program, commands], capture_output=True, text=True, check=False, timeout=120
    )
    assert done.stdout.count("ended with 0") == 3 and done.stderr == "", done.stderr
    failed = CliRunner().invoke(app, ["generate", str(tmp_path), "hello", "--quiet"], prog_name="leangrid")
    assert failed.exit_code == 2 and failed.stderr.startswith("error: ") and failed.stderr.count("\n") == 1


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize(("quiet", "said"), [(True, ""), (False, "note: leangrid runs slowly\n")])
def test_what_libraries_say_is_not_passed_on(capsys: pytest.CaptureFixture[str], quiet: bool, said: str) -> None:
    before = logging.root.manager.disable
    with outcome(quiet):
        warnings.warn("of a library, with\nthree lines\n", UserWarning, stacklevel=1)
        warnings.warn("leangrid runs slowly", UserWarning, stacklevel=1)
        if quiet:
            logging.getLogger("leangrid").warning("a sentence of ours")
    assert capsys.readouterr().err == said and logging.root.manager.disable == before


def test_errors_are_said_also_where_it_is_quiet(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(typer.Exit), outcome(quiet=True):
        raise OSError(2, "No such file", "there")
    assert capsys.readouterr().err == "error: No such file (there)\n"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("quantize", "src"), "missing argument 'out'"),
        (("quantize", "src", "out", "--samples", "abc"), "--samples"),
        (("quantize", "src", "out", "--colour", "red"), "--colour"),
        (("quantize", "src", "out", "--scheme"), "--scheme"),
        (("generate", "m", "hello", "--max-new-tokens", "0"), "--max-new-tokens"),
        (("quantise", "src", "out"), "Did you mean 'quantize'"),
    ],
)
def test_what_cannot_be_parsed_is_one_sentence(arguments: tuple[str, ...], said: str) -> None:
    done = CliRunner().invoke(app, list(arguments), prog_name="leangrid")
    assert (
        done.exit_code == 2
        and done.output.startswith("error: ")
        and said in done.output
        and done.output.count("\n") == 1
    )
    assert "leangrid" in done.output and "--help" in done.output


def test_the_environment_is_left_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_VERBOSITY", "info")
    monkeypatch.delenv("TRANSFORMERS_VERBOSITY", raising=False)
    before = dict(os.environ)
    with outcome(quiet=True):
        assert os.environ["TRANSFORMERS_VERBOSITY"] == "error" and os.environ["HF_HUB_VERBOSITY"] == "info"
    assert dict(os.environ) == before
