"""Row O8 of the fault table: a calibration that was too small shows on text that it did not hold (gate/quality.py,
unseen.py)."""

import json
import pydoc_data.topics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from typer.testing import CliRunner

from leangrid.cli.app import app
from leangrid.data import calibration
from leangrid.data.calibration import make_windows
from leangrid.evaluation.measure import evaluate
from leangrid.progress import Event
from leangrid.recipe import Recipe
from leangrid.report.text import quantize_summary
from leangrid.run.quantize import quantize
from leangrid.storage import failpoints

Tiny = Callable[..., Path]
pytestmark = [pytest.mark.fault("O8"), pytest.mark.filterwarnings("ignore:leangrid runs without its C")]


@pytest.fixture(scope="module")
def prose(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("prose") / "prose.txt"
    path.write_text("\n\n".join(pydoc_data.topics.topics[name] for name in sorted(pydoc_data.topics.topics)[:40]))
    return path


def recipe(prose: Path, samples: int, length: int = 32) -> Recipe:
    return Recipe(scheme="W4A16_G32", calibration=str(prose), samples=samples, length=length, steps=32)


def test_too_little_calibration_is_a_warning_everywhere_and_enough_is_none(
    tiny: Tiny, prose: Path, tmp_path: Path
) -> None:
    told: list[Event] = []
    few = quantize(tiny("llama2"), tmp_path / "few", recipe(prose, 4), progress=told.append)
    many = quantize(tiny("llama2"), tmp_path / "many", recipe(prose, 16, 128))
    assert few.exit_code == 0 and many.exit_code == 0 and "warnings" not in many.quality
    (warning,) = few.quality["warnings"]
    assert "--samples" in warning and "prose.txt" in warning and any(warning in event.message for event in told)
    assert (
        few.quality["unseen"]["value"] > 4 * few.quality["value"]
        and many.quality["unseen"]["value"] < 2 * many.quality["value"]
    )
    assert many.quality["unseen"]["value"] < many.quality["unseen"]["rounding"]
    kept = json.loads((tmp_path / "few/manifest.json").read_text())["quality"]
    assert kept["warnings"] == [warning] and kept["unseen"]["text"] == "other text of prose.txt"
    for shown in (
        quantize_summary(few.to_dict()),
        *((tmp_path / "few" / page).read_text() for page in ("README.md", "report.html")),
    ):
        assert warning.split("(")[0].strip() in shown and "calibration did not see" in shown
    assert "arning" not in (tmp_path / "many/README.md").read_text()


def test_on_stderr_it_is_a_warning_and_quiet_is_quiet(tiny: Tiny, prose: Path, tmp_path: Path) -> None:
    for quiet in (False, True):
        arguments = [
            "quantize",
            tiny("llama2"),
            tmp_path / f"out{quiet}",
            "--scheme",
            "W4A16_G32",
            "--calibration",
            prose,
            "--samples",
            4,
            "--length",
            32,
            *(["--quiet"] if quiet else []),
        ]
        done = CliRunner().invoke(app, [str(argument) for argument in arguments], prog_name="leangrid")
        assert done.exit_code == 0 and "warning" in done.stdout
        assert ("warning: " in done.stderr) != quiet and (not quiet or done.stderr == "")


def test_the_first_windows_are_the_same_with_more_behind_them(prose: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = calibration.read_documents
    monkeypatch.setattr(calibration, "read_documents", lambda _name, **options: real(str(prose), **options))
    for name in (str(prose), "wikitext2"):  # the text's beginning; windows of the whole text, of which the seed chooses
        settings = recipe(prose, 4).model_copy(update={"calibration": name})
        plain = make_windows(settings, tiny_models.tokenizer())
        more = make_windows(settings, tiny_models.tokenizer(), extra=2)
        assert len(more) == 6 and torch.equal(more[:4], plain)
        assert not any(torch.equal(new, old) for new in more[4:] for old in plain)


def test_where_the_corpus_ends_there_is_other_prose_and_a_resumed_run_measures_the_same(
    tiny: Tiny, prose: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    short = tmp_path / "short.txt"
    short.write_text(prose.read_text()[:600])
    ids = tiny_models.tokenizer()(short.read_text(), verbose=False)["input_ids"]
    exact = recipe(short, len(ids) // 32)
    assert quantize(tiny("llama2"), tmp_path / "short", exact).quality["unseen"]["text"] == "Python's documentation"
    given = quantize(tiny("llama2"), tmp_path / "given", Recipe(scheme="NU4"), windows=tiny_models.tokens(3, 32))
    assert given.quality["unseen"]["text"] == "Python's documentation" and given.quality["unseen"]["windows"] == 2
    whole = quantize(tiny("llama2"), tmp_path / "whole", recipe(prose, 4)).quality
    with monkeypatch.context() as patch:
        failpoints.reset()
        patch.setenv("LEANGRID_FAILPOINT", "journal.after_block:1:raise:SIGINT")
        with pytest.raises(KeyboardInterrupt):
            quantize(tiny("llama2"), tmp_path / "out", recipe(prose, 4))
    assert quantize(tiny("llama2"), tmp_path / "out", recipe(prose, 4)).quality == whole


def test_without_a_tokenizer_only_what_was_given_is_measured(tiny: Tiny, tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    for name in ("config.json", "model.safetensors"):
        (source / name).write_bytes((tiny("llama2") / name).read_bytes())
    result = quantize(source, tmp_path / "out", Recipe(scheme="NU4"), windows=tiny_models.tokens(3, 32))
    assert result.exit_code == 0 and "unseen" not in result.quality and "warnings" not in result.quality


@pytest.mark.parametrize("kind", ["LlamaModel", "LlamaForSequenceClassification", "LlamaForTokenClassification"])
def test_without_a_language_model_head_hidden_states_are_the_measure(kind: str, prose: Path, tmp_path: Path) -> None:
    import transformers as hf

    config: Any = tiny_models.CONFIGS["llama2"]()
    config.num_labels = 3
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = getattr(hf, kind)(config)
    hf.utils.logging.disable_progress_bar()
    source = tmp_path / "source"
    model.save_pretrained(source)
    tiny_models.tokenizer().save_pretrained(source)
    result = quantize(source, tmp_path / "out", recipe(prose, 8))
    assert (
        result.exit_code == 0 and result.quality["measure"] == "cosine" and result.quality["original"] == "transformers"
    )
    measured = evaluate(tmp_path / "out", source, str(prose), length=64, windows=2)
    assert 0 < measured.embedding_cosine_mean < 0.2 and measured.kl_mean is None
    asked = [
        "quantize",
        str(source),
        str(tmp_path / "self"),
        "--calibration",
        "self",
        "--samples",
        "2",
        "--length",
        "16",
    ]
    refused = CliRunner().invoke(app, asked, prog_name="leangrid")
    assert (
        refused.exit_code == 2
        and "sample text from itself" in refused.stderr
        and not (tmp_path / "self.partial").exists()
    )
