"""The experiments: which lines there are, which of them are measured, and the experiments on layers."""

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

Load = Callable[[str], ModuleType]


@pytest.fixture
def small_size(bench: Load, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The small size with all its models, none of which is opened."""
    sizes, whole = bench("measure.sizes"), bench("measure.whole_model")
    monkeypatch.setattr(sizes, "default_source", lambda: tmp_path / "model.gguf")
    monkeypatch.setattr(whole, "RESULTS", tmp_path / "results")
    (tmp_path / "calibration.txt").write_text("Once.", encoding="utf-8")
    data = sizes.Data(stories=str(tmp_path), sts=str(tmp_path), squad=str(tmp_path))
    return whole.Bench(sizes.size("small", data, tmp_path), tmp_path, 1)


def test_every_line_of_an_experiment_is_another_measurement(bench: Load, small_size: Any) -> None:
    identity = bench("common.lines").identity
    for name in bench("run").EXPERIMENTS:
        heads = [task.head for task in bench(name).tasks(small_size)]
        assert heads and {head["benchmark"] for head in heads} == {name}
        assert len({identity(head) for head in heads}) == len(heads), name


def test_groups_are_asked_of_models_that_they_divide(bench: Load, small_size: Any) -> None:
    columns = {"SmolLM2-135M-Instruct": (576, 1536), "stories260K": (64, 172), "MiniLM-L6": (384, 1536)}
    asked = {(subject.name, group) for subject in small_size.size.subjects for group in subject.groups}
    assert asked and not [(name, group) for name, group in asked if any(cols % group for cols in columns[name])]


def test_a_model_that_is_not_here_is_said(bench: Load, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = bench("measure.sizes")
    monkeypatch.setattr(sizes, "default_source", lambda: tmp_path / "model.gguf")
    found = sizes.size("small", sizes.Data(stories=str(tmp_path / "none"), squad=str(tmp_path / "none")), tmp_path)
    assert [subject.name for subject in found.subjects] == ["SmolLM2-135M-Instruct"]
    for option, sentence in zip(("--stories", "--sts", "--squad"), found.left_out, strict=True):
        assert option in sentence
    assert [s.name for s in sizes.size("paper", sizes.Data(), tmp_path).subjects] == [
        "Llama-2-7B",
        "Llama-3-8B",
        "Mistral-7B",
    ]
    with pytest.raises(SystemExit, match="no size"):
        sizes.size("huge", sizes.Data(), tmp_path)


def test_a_local_c4_file_never_calibrates_on_what_it_evaluates(bench: Load, tmp_path: Path) -> None:
    path = tmp_path / "c4.jsonl"
    path.write_text("".join(json.dumps({"text": str(i)}) + "\n" for i in range(5)), encoding="utf-8")
    first, second = (
        set(Path(half).read_text(encoding="utf-8").split("\n")) - {""}
        for half in bench("measure.sizes").halves(str(path), tmp_path)
    )
    assert not first & second and len(first | second) == 5
    assert bench("measure.sizes").halves("c4", tmp_path) == ("c4", "c4")  # its own splits


def test_two_experiments_share_a_run_of_the_same_recipe(bench: Load, small_size: Any) -> None:
    whole, lines = bench("measure.whole_model"), bench("common.lines")
    subject = small_size.size.subjects[0]
    one = small_size.whole("perplexity", subject, "NU4", {"method": "x", "bits": 4})
    assert one.elsewhere() is None
    lines.add(whole.RESULTS / "perplexity.jsonl", one.head | {"losses": {}, "kl_mean": 0.1})
    same = small_size.whole("power", subject, "NU4", {"variant": "guard"}, p="4")
    assert same.elsewhere() == {"kl_mean": 0.1, "losses": {}}, "the figures, none of the other's labels"
    assert small_size.whole("power", subject, "NU4", {"variant": "guard"}, p="2").elsewhere() is None
    assert small_size.whole("power", small_size.size.subjects[1], "NU4", p="4").elsewhere() is None


def test_losses_are_summed_over_the_blocks(bench: Load, tmp_path: Path) -> None:
    records = [
        ("model.layers.0.mlp.up_proj", 1.0),
        ("model.layers.1.mlp.up_proj", 2.0),
        ("model.layers.0.mlp.down_proj", 4.0),
    ]
    text = "".join(
        json.dumps({"name": n, "loss": x, "loss_minmax": 2 * x, "loss_rounding": 3 * x}) + "\n" for n, x in records
    )
    (tmp_path / "records.jsonl").write_text(text, encoding="utf-8")
    found = bench("measure.whole_model").sum_by_kind(tmp_path / "records.jsonl")
    assert (
        found["up_proj"] == {"layers": 2, "loss": 3, "loss_minmax": 6, "loss_rounding": 9}
        and found["down_proj"]["loss"] == 4
    )


def test_lines_are_kept_as_they_are_made(
    bench: Load, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run, whole, sizes, lines = bench("run"), bench("measure.whole_model"), bench("measure.sizes"), bench("common.lines")
    results, measured = tmp_path / "results", []
    monkeypatch.setattr(whole, "RESULTS", results)
    monkeypatch.setattr(sizes, "default_source", lambda: tmp_path / "model.gguf")

    def work(model: str) -> dict[str, Any]:
        measured.append(model)
        if model == "b":
            raise RuntimeError("this one fails")
        return {"figure": len(measured), "rows": 4, "threads": 1}  # of what tells lines apart, too

    def tasks(_: Any) -> Iterator[Any]:
        for model in ("a", "b", "c"):
            yield whole.Measurement({"benchmark": "search", "model": model}, lambda model=model: work(model))

    monkeypatch.setattr(bench("search"), "tasks", tasks)

    def started(*more: str) -> str:
        monkeypatch.setattr(sys, "argv", ["experiments/run.py", "search", *more])
        with pytest.raises(SystemExit) as stopped:
            run.main()
        return str(stopped.value)

    assert "not made:\nsearch b" in started()  # and the line behind it is there
    path = results / "search.jsonl"
    assert [line["model"] for line in lines.read(path)] == ["a", "c"] and measured == ["a", "b", "c"]
    assert {"command", "machine", "versions", "date"} <= lines.read(path)[0].keys()
    started()
    assert measured == ["a", "b", "c", "b"]  # what is there is kept
    own = lines.read(path)
    path.write_text("".join(lines.text(line | {"machine": line["machine"] | {"cores": 4096}}) + "\n" for line in own))
    started()
    assert measured[4:] == ["b"]  # how many cores it was given is not which machine it is
    path.write_text(
        "".join(lines.text(line | {"machine": line["machine"] | {"cpu": "another"}}) + "\n" for line in own[:1])
    )
    started()
    assert measured[5:] == ["a", "b", "c"] and len(lines.read(path)) == 3  # another machine's line is not ours
    started("--again", "--model", "b")
    assert measured[8:] == ["b"]
    capsys.readouterr()
    with pytest.raises(SystemExit):
        monkeypatch.setattr(sys, "argv", ["experiments/run.py", "nothing"])
        run.main()
    assert "no such experiment: nothing" in capsys.readouterr().err


@pytest.fixture
def small(bench: Load, tiny: Callable[..., Path], tmp_path: Path) -> Any:
    """A small_size whose one model is a tiny Llama."""
    sizes, whole = bench("measure.sizes"), bench("measure.whole_model")
    text = tmp_path / "text.txt"
    text.write_text(" ".join(f"The {n}th of many sentences says {n * n}." for n in range(400)), encoding="utf-8")
    subject = sizes.Subject(
        "tiny",
        str(tiny("llama2")),
        str(text),
        (("text", str(text)),),
        samples=2,
        length=32,
        windows=2,
        evaluation_length=48,
        blocks=(1,),
        groups=(),
        swept=(),
    )
    return whole.Bench(sizes.Size("small", "cpu", (subject,)), tmp_path, 1)


def test_layers_are_the_models_own(bench: Load, small: Any) -> None:
    subject = small.size.subjects[0]
    layers = bench("measure.layers").load_layers(small, subject)
    assert len(layers) == 7 and layers[0].name == "model.layers.1.self_attn.q_proj"
    original = small.original(subject)
    model, _ = bench("common.original").open_dense(original.source)
    seen: list[torch.Tensor] = []
    model.get_submodule(layers[3].name).register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0][0].detach()))
    with torch.no_grad():
        for window in original.workload(subject).windows:
            model(input_ids=window[None])
    x = torch.cat(seen)
    torch.testing.assert_close(layers[3].matrix, 2 / len(x) * x.T @ x, rtol=1e-4, atol=1e-6)
    assert torch.equal(layers[3].weight, model.get_submodule(layers[3].name).weight)


@pytest.mark.slow
def test_a_whole_model_is_quantized_and_measured(bench: Load, small: Any) -> None:
    subject = small.size.subjects[0]
    found = small.whole("perplexity", subject, "NU4", {"method": "x"}).measure()
    assert found["distance"] == found["kl_mean"] == found["texts"]["text"]["kl_mean"] > 0
    assert found["losses"]["q_proj"]["layers"] == 2
    assert sum(kind["loss"] for kind in found["losses"].values()) == pytest.approx(found["loss"])
    coarse = small.whole("perplexity", subject, "RTN2", {"method": "y"}).measure()
    assert coarse["distance"] > 2 * found["distance"] and coarse["calibration_sha256"] == found["calibration_sha256"]


@pytest.fixture
def layer(bench: Load) -> Any:
    from leangrid.solve.factor import factorize

    g = torch.Generator().manual_seed(0)
    x = torch.randn(400, 48, generator=g) * torch.exp(torch.randn(48, generator=g))
    matrix = 2 / len(x) * x.T @ x
    return bench("measure.layers").Layer("layer", torch.randn(6, 48, generator=g), matrix, factorize(matrix))


def test_no_start_beats_the_optimum(bench: Load, layer: Any) -> None:
    start = bench("start")
    for bits in (4, 2):
        found = {name: start.measure([layer], bits, name)["objective"] for name in start.STARTS}
        assert found["optimal"] == 1.0 and all(value >= 1 - 1e-6 for value in found.values())
        assert max(found.values()) > 1.001  # a start does matter


def test_finer_steps_find_lower_objectives(bench: Load, layer: Any) -> None:
    steps = bench("steps")
    found = {count: steps.measure([layer], 3, count) for count in (16, 256, 2048)}
    assert found[2048]["objective"] == 1.0
    assert found[16]["objective"] > found[256]["objective"] >= 0.99
    assert found[2048]["loss_minmax"] == found[16]["loss_minmax"]  # the baseline has no T
