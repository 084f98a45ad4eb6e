"""What a run keeps for its report, and how card and report are written again: whole, or not at all."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from forked import status_of
from huggingface_hub import ModelCard
from report_facts import EVALUATION, QUALITY, RECORD, directory
from tiny_run import digest

from leangrid.errors import OutputError, VerifyError
from leangrid.planning.placement import Placement
from leangrid.progress import Event
from leangrid.recipe import Recipe
from leangrid.report import views
from leangrid.report.facts import Facts
from leangrid.run.quantize import quantize
from leangrid.storage import failpoints
from leangrid.storage.manifest import MANIFEST, amend_result, list_differences

Tiny = Callable[..., Path]
WINDOWS = tiny_models.tokens(4, 32)
pytestmark = pytest.mark.filterwarnings("ignore:leangrid runs without its C")


@pytest.fixture(scope="module")
def made(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("made") / "out"
    quantize(tiny("llama2"), out, Recipe(scheme="NU3"), windows=WINDOWS)
    return out


@pytest.fixture
def result(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "out"))


def test_a_run_leaves_a_report_and_what_it_is_made_of(result: Path) -> None:
    facts = Facts.read(result)
    assert list_differences(result) == [] and {"report.html", "run.json", "README.md", "records.jsonl"} < set(
        facts.manifest["files"]
    )
    assert facts.run["sample"]["name"] == "model.layers.1.mlp.down_proj" == facts.records[-1].name
    assert len(facts.run["blocks"]) == 2 and all(block["resident_bytes"] > 0 for block in facts.run["blocks"])
    seconds = facts.run["seconds"]
    assert seconds["total"] >= sum(block["seconds"] for block in facts.run["blocks"]) > 0 and seconds["check"] > 0
    assert facts.run["bytes_before"] > facts.bytes_after > 0
    page = (result / "report.html").read_text(encoding="utf-8")
    assert (
        page == views.render_views(facts.manifest, facts.records, facts.run)["report.html"] and "mlp.down_proj" in page
    )
    # seen and unseen  # pyright: ignore
    assert len(ModelCard((result / "README.md").read_text()).data.eval_results) == 4


def test_the_gates_figures_are_in_the_card(result: Path) -> None:
    quality = json.loads((result / MANIFEST).read_text())["quality"]
    assert 0 < quality["reference_perplexity"] < 1e6 and quality["perplexity"] != quality["reference_perplexity"]
    assert f"| perplexity | {quality['perplexity']:.4g} |" in (result / "README.md").read_text()


@pytest.mark.parametrize(("model", "scheme", "columns"), [("qwen2", "W4A16_G32", 32), ("gpt2", "NU3", 256)])
@pytest.mark.parametrize("in_place", [False, True])
def test_a_stopped_run_counts_the_time_of_both_halves(
    model: str, scheme: str, columns: int, in_place: bool, tiny: Tiny, tmp_path: Path
) -> None:
    def stop(event: Event) -> None:
        if event.stage == "block":
            raise KeyboardInterrupt

    go = partial(
        quantize,
        tiny(model),
        tmp_path / "out",
        Recipe(scheme=scheme),
        windows=WINDOWS,
        placement=Placement(2, in_place=in_place),
    )
    with pytest.raises(KeyboardInterrupt):
        go(progress=stop)
    went = json.loads((tmp_path / "out.partial" / "blocks" / "0000.json").read_text())["info"]["seconds"]["total"]
    go()
    run = Facts.read(tmp_path / "out").run
    assert run["blocks"][0]["seconds"] == went and run["seconds"]["total"] >= sum(
        block["seconds"] for block in run["blocks"]
    )
    assert run["sample"]["columns"][2] == columns


def test_an_encoder_has_a_report(tiny: Tiny, tmp_path: Path) -> None:
    quantize(tiny("bert"), tmp_path / "out", Recipe(scheme="NU3"), windows=WINDOWS)
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert "1 − cosine" in page and "Perplexity" not in page and list_differences(tmp_path / "out") == []


@pytest.mark.fault("O10")
def test_a_report_that_fails_does_not_end_the_run(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(facts: Facts) -> str:
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr(views, "render_page", broken)
    assert quantize(tiny("llama2"), tmp_path / "out", Recipe(scheme="NU2"), windows=WINDOWS).exit_code == 0
    assert list_differences(tmp_path / "out") == [] and "could not be written" in caplog.text
    assert "records.jsonl" in (tmp_path / "out" / "report.html").read_text()


def test_the_report_is_written_again_whatever_became_of_it(result: Path) -> None:
    before = digest(result)
    for damage in (lambda path: path.unlink(), lambda path: path.write_text("<b>mine</b>"), lambda path: None):
        damage(result / "report.html")
        assert views.rewrite_report(result) == result / "report.html"
        assert list_differences(result) == [] and digest(result) == before


@pytest.mark.fault("O4")
@pytest.mark.parametrize("name", ["model.safetensors", "README.md", "records.jsonl", "run.json", MANIFEST])
def test_a_directory_that_does_not_verify_gets_no_report(name: str, result: Path) -> None:
    (result / name).write_bytes((result / name).read_bytes()[:-2] + b"\n\n")
    before = digest(result)
    with pytest.raises(VerifyError, match=f"not what its manifest says.*{name}"):
        views.rewrite_report(result)
    assert digest(result) == before
    with pytest.raises(VerifyError, match="no such directory"):
        views.rewrite_report(result / "nowhere")


def test_a_directory_of_another_kind_is_said(tmp_path: Path) -> None:
    out = directory(tmp_path / "out", result={"layers": 1})
    with pytest.raises(VerifyError, match="cannot be described: KeyError"):
        views.rewrite_report(out)


def test_results_without_a_run_log_have_a_report(tmp_path: Path) -> None:
    out = directory(tmp_path / "out")
    amend_result(out, {"run.json": b"{}"})
    views.rewrite_report(out)
    assert list_differences(out) == [] and "the run kept no size" in (out / "report.html").read_text(encoding="utf-8")


def test_an_evaluation_is_kept_once(result: Path) -> None:
    views.add_evaluation(result, EVALUATION)
    views.add_evaluation(result, {**EVALUATION, "perplexity": 30.5, "kl_p99": float("nan")})
    views.add_evaluation(result, {**EVALUATION, "length": 512})
    manifest = json.loads((result / MANIFEST).read_text())
    assert [(one["length"], one["perplexity"]) for one in manifest["evaluations"]] == [(1024, 30.5), (512, 28.94)]
    assert list_differences(result) == [] and "pending" not in manifest
    for name in ("README.md", "report.html"):
        text = (result / name).read_text(encoding="utf-8")
        assert "30.5" in text and "12 windows of 512 tokens of wiki.txt" in text, name


@pytest.mark.fault("C1")
def test_killed_anywhere_an_amendment_leaves_a_directory_that_verifies(in_memory: Path) -> None:
    for number in range(1, 200):
        out = directory(in_memory / f"out{number}")
        status = status_of(lambda out=out: views.add_evaluation(out, EVALUATION), f"*:{number}")
        assert list_differences(out) == [], number
        views.rewrite_report(out)
        assert list_differences(out) == [] and "pending" not in json.loads((out / MANIFEST).read_text())
        if status == 0:
            assert number > 10
            return
        assert status == -9
    raise AssertionError("it never survived")


def test_what_was_announced_does_not_excuse_other_bytes(tmp_path: Path) -> None:
    out = directory(tmp_path / "out")
    entry = {"README.md": {"bytes": 7, "sha256": "0" * 64}, "new.txt": {"bytes": 3, "sha256": "0" * 64}}
    amend_result(out, {}, {"pending": entry})
    assert list_differences(out) == []
    (out / "README.md").write_text("# other")
    (out / "new.txt").write_text("bad")
    assert [difference.split(":")[0] for difference in list_differences(out)] == ["README.md", "new.txt"]


@pytest.mark.parametrize("name", ["../x", "manifest.json", ".hidden", "a/b/c"])
def test_an_amendment_stays_in_the_directory(name: str, tmp_path: Path) -> None:
    out = directory(tmp_path / "out")
    before = digest(tmp_path)
    with pytest.raises(OutputError, match="cannot hold a file called"):
        amend_result(out, {name: b"x"})
    assert digest(tmp_path) == before


def test_a_disk_that_is_full_leaves_the_older_report(result: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before: dict[str, Any] = digest(result)
    failpoints.reset()
    monkeypatch.setenv("LEANGRID_FAILPOINT", "*:1:raise:ENOSPC")
    with pytest.raises(OutputError):
        views.rewrite_report(result)
    monkeypatch.delenv("LEANGRID_FAILPOINT")
    assert list_differences(result) == [] and digest(result) == before


def test_losses_that_were_not_finite_come_back(tmp_path: Path) -> None:
    out = directory(tmp_path / "out", records=[replace(RECORD, loss=float("nan"))], quality=QUALITY)
    assert Facts.read(out).records[0].loss != Facts.read(out).records[0].loss
    views.rewrite_report(out)
    assert "not finite" in (out / "report.html").read_text(encoding="utf-8")


def test_a_sample_of_a_bfloat16_model(tmp_path: Path) -> None:
    source = tiny_models.synthetic(tmp_path / "source", blocks=1, dtype=torch.bfloat16)
    quantize(source, tmp_path / "out", Recipe(scheme="GPTQ4_G32"), windows=WINDOWS)
    assert Facts.read(tmp_path / "out").run["sample"]["columns"][2] == 32
