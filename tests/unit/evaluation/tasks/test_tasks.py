"""Tasks: the harness on our packed layers beside the harness itself, and everything that can be wrong with a task's
files."""

import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import tiny_models
from typer.testing import CliRunner

import leangrid
from leangrid.cli.app import app
from leangrid.errors import CheckpointError, OutputError, TaskError
from leangrid.evaluation import Tasks, evaluate
from leangrid.evaluation.opened import Opened
from leangrid.evaluation.tasks import harness, run_tasks
from leangrid.evaluation.tasks.job import Job, Part
from leangrid.evaluation.tasks.saved_results import SavedResults, identify_model
from leangrid.progress import Event
from leangrid.recipe import Recipe
from leangrid.report.views import add_evaluation

Tiny = Callable[..., Path]
pytestmark = pytest.mark.filterwarnings("ignore:leangrid runs without its C", "ignore::ResourceWarning")

YAML = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
output_type: multiple_choice
test_split: test
doc_to_text: "{{{{query}}}}"
doc_to_target: gold
doc_to_choice: choices
metric_list:
  - {{metric: acc, aggregation: mean, higher_is_better: true}}
  - {{metric: acc_norm, aggregation: mean, higher_is_better: true}}
"""


def write_task(directory: Path, name: str = "words", documents: int = 30) -> Path:
    """Questions whose choices are of several lengths, so that acc and acc_norm differ."""
    directory.mkdir(exist_ok=True)
    (directory / f"{name}.yaml").write_text(YAML.format(name=name, file=f"{name}.jsonl"))
    words = (
        "class",
        "method",
        "import",
        "exception handling",
        "return",
        "a list of names",
        "module",
        "yield",
        "the lambda",
        "with",
    )
    rows = [
        {
            "query": f"Number {i}: {words[i % 7]} and",
            "choices": [words[(3 * i + k) % 10] for k in range(3)],
            "gold": i * i % 3,
        }
        for i in range(documents)
    ]
    (directory / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return directory


def _never(event: Event) -> None:
    raise AssertionError(f"work was done: {event}")


@pytest.fixture(scope="module")
def quantized(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("tasks") / "NU3"
    leangrid.quantize(tiny("llama3"), out, Recipe(scheme="NU3"), windows=tiny_models.tokens(8, 32))
    return out


def test_our_accuracy_is_the_harness_s_own_on_the_dense_export(
    quantized: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lm_eval, datasets = pytest.importorskip("lm_eval.evaluator"), pytest.importorskip("datasets")
    monkeypatch.setattr(lm_eval, "add_env_info", lambda results: None)  # seconds of asking pip
    from lm_eval.tasks import TaskManager

    directory = write_task(tmp_path / "tasks")
    found = evaluate(quantized, tasks=Tasks(("words",), directory, batch_size=4))
    leangrid.export(quantized, tmp_path / "dense", to="dense")
    monkeypatch.chdir(directory)  # where the harness looks for data files
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    manager = TaskManager(include_path=str(directory), include_defaults=False)
    theirs = lm_eval.simple_evaluate(
        "hf",
        {"pretrained": str(tmp_path / "dense"), "dtype": "float32"},
        ["words"],
        device="cpu",
        batch_size=1,
        task_manager=manager,
        log_samples=False,
    )["results"]["words"]
    ours = found.tasks["words"]
    assert 0 < ours["acc"] < 1 and ours["acc"] != ours["acc_norm"] and ours["n"] == 30
    for key, name in {
        "acc": "acc",
        "acc_norm": "acc_norm",
        "acc_stderr": "stderr",
        "acc_norm_stderr": "acc_norm_stderr",
    }.items():
        assert ours[name] == pytest.approx(theirs[f"{key},none"], rel=1e-9)
    assert found.perplexity is None and found.text is None and found.bits_per_weight > 3
    assert json.loads(json.dumps(found.to_dict())) == found.to_dict()


def test_names_of_the_harness_s_own_index_groups_and_their_pooled_figures(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    datasets, tasks = pytest.importorskip("datasets"), pytest.importorskip("lm_eval.tasks")
    directory = write_task(write_task(tmp_path / "tasks", "few", 6), "many", 30)
    for name in ("few", "many"):
        with (directory / f"{name}.yaml").open("a") as file:
            file.write("tag: tagged\n")
    (directory / "both.yaml").write_text(
        "group: both\ntask: [few, many]\naggregate_metric_list: [{metric: acc, weight_by_size: true}]\n")  # fmt: skip
    monkeypatch.chdir(directory)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(
        tasks, "TaskManager", partial(tasks.TaskManager, include_path=str(directory), include_defaults=False)
    )
    found = evaluate(tiny("llama3"), tasks=Tasks(("both",), out=tmp_path / "r.json")).tasks["both"]
    kept = json.loads((tmp_path / "r.json").read_text())["identity"]["tasks"]
    few, many = (kept[name]["result"]["acc,none"] for name in ("few", "many"))
    assert found["n"] == 36 and found["acc"] == pytest.approx((6 * few + 30 * many) / 36) and found["stderr"] > 0
    tagged = evaluate(tiny("llama3"), tasks=Tasks(("tagged",), limit=3)).tasks
    assert {name: figures["n"] for name, figures in tagged.items()} == {"few": 3, "many": 3}
    with pytest.raises(TaskError, match=r"there is no task 'fwe'.*Near to it: few"):
        evaluate(tmp_path / "no model", tasks=Tasks(("many", "fwe")))
    (directory / "many.jsonl").unlink()
    with pytest.raises(TaskError, match=r"its data cannot be read: .*many.*--tasks-dir"):
        harness.find_benchmarks(["many"], None)


def test_finished_tasks_are_kept_and_the_same_call_goes_on(tiny: Tiny, tmp_path: Path) -> None:
    directory, out = write_task(write_task(tmp_path / "tasks", "one"), "two"), tmp_path / "results" / "r.json"
    seen: list[Event] = []
    first = evaluate(tiny("llama3"), tasks=Tasks(("one",), directory, limit=5, out=out))
    both = evaluate(tiny("llama3"), tasks=Tasks(("one", "two"), directory, limit=5, out=out), progress=seen.append)
    assert [event.message for event in seen] == ["task 1 of 2: one (kept from before)", "task 2 of 2: two"]
    assert both.tasks["one"] == first.tasks["one"] and both.tasks["two"]["n"] == 5
    stored = json.loads(out.read_text())
    assert stored.pop("identity") and stored == both.to_dict()
    more = evaluate(
        tiny("llama3"), tasks=Tasks(("one",), directory, limit=7, out=out)
    )  # other settings are another measurement
    assert more.tasks["one"]["n"] == 7
    with pytest.raises(OutputError, match="another model's results"):
        evaluate(tiny("llama3", seed=1), tasks=Tasks(("one",), directory, out=out))
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="file"):  # told before any work
        evaluate(tiny("llama3"), tasks=Tasks(("one",), directory, out=tmp_path / "file" / "r.json"), progress=_never)
    out.write_text("[]")
    with pytest.raises(OutputError, match=r"no results of leangrid eval .*--out"):
        evaluate(tiny("llama3"), tasks=Tasks(("one",), directory, out=out))


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda d: (d / "words.jsonl").unlink(), "the data of task words are missing"),
        (lambda d: (d / "words.jsonl").write_text(""), "holds no documents"),
        (lambda d: (d / "words.jsonl").write_text('{"query": 1}\n[]\n'), r"not a JSON object .*words.jsonl:2"),
        (lambda d: (d / "words.jsonl").write_text('{"query": '), r"not JSON: .*words.jsonl:1"),
        (lambda d: (d / "words.jsonl").write_text('{"query": "q"}\n'), "cannot be made from its file"),
        (lambda d: (d / "words.jsonl").write_bytes(b"\xff\n"), "not UTF-8"),
        (lambda d: (d / "words.yaml").write_text("task: words\nprocess_docs: !function os.system\n"), "no !function"),
        (lambda d: (d / "words.yaml").write_text("include: other.yaml\ntask: words\n"), "no include"),
        (lambda d: (d / "words.yaml").write_text("task: words\ndataset_path: org/name\n"), "names no local data"),
        (lambda d: (d / "words.yaml").write_text("- task: words\n"), "describes no single task"),
    ],
)  # fmt: skip
def test_bad_files_are_one_sentence_before_the_model_is_opened(
    change: Callable[[Path], Any], sentence: str, tmp_path: Path
) -> None:
    pytest.importorskip("lm_eval")
    directory = write_task(tmp_path / "tasks")
    change(directory)
    with pytest.raises(TaskError, match=sentence):
        evaluate(tmp_path / "no model", tasks=Tasks(("words",), directory))


def test_unknown_names_and_useless_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = write_task(tmp_path / "tasks")
    for names, sentence in {
        "wordz": "there is no task 'wordz'.*Near to it: words",
        "": "no task is named",
        "a,a": "named twice",
    }.items():
        with pytest.raises(TaskError, match=sentence):
            evaluate(tmp_path / "no model", tasks=Tasks.parse(names, directory=directory))
    with pytest.raises(TaskError, match="Use 1 or more"):
        Tasks.parse("words", limit=0)
    with pytest.raises(TaskError, match="no such directory"):
        harness.find_benchmarks(["words"], tmp_path / "nowhere")
    monkeypatch.setattr(harness, "find_spec", lambda name: None)
    with pytest.raises(TaskError, match=r"not installed .*leangrid\[tasks\]"):
        harness.find_benchmarks(["arc_easy"], None)


def test_a_task_that_fails_leaves_the_others_their_figures(tiny: Tiny, tmp_path: Path) -> None:
    def broken(*_: Any) -> dict[str, Any]:
        raise TaskError("it broke", "here")

    jobs = [
        Job(name, [Part(name, "", work)], lambda found, name=name: found[name])
        for name, work in (("good", lambda *_: {"acc": 1.0}), ("bad", broken), ("last", lambda *_: {"acc": 0.5}))
    ]
    subject = Opened("m", tmp_path, tiny_models.build("llama3"), None, True)
    found = run_tasks(subject, jobs, SavedResults(tmp_path / "r.json", "m"), lambda event: None)
    assert found["bad"] == {"error": "it broke (here)"} and found["good"]["acc"] == 1 and found["last"]["acc"] == 0.5
    assert set(json.loads((tmp_path / "r.json").read_text())["tasks"]) == {"good", "last"}


def test_the_command_prints_figures_and_ends_with_3_where_a_task_failed(tiny: Tiny, tmp_path: Path) -> None:
    directory = write_task(tmp_path / "tasks")
    command = [
        "eval",
        str(tiny("llama3")),
        "--tasks",
        "words",
        "--tasks-dir",
        str(directory),
        "--limit",
        "4",
        "--quiet",
    ]
    shown = CliRunner().invoke(app, command, prog_name="leangrid")
    assert shown.exit_code == 0, shown.stderr
    assert "acc 0." in shown.stdout and "±" in shown.stdout and "n 4" in shown.stdout
    assert "windows of" not in shown.stdout
    encoder = CliRunner().invoke(app, ["eval", str(tiny("bert")), *command[2:], "--json"], prog_name="leangrid")
    assert encoder.exit_code == 3 and "no language-model head" in json.loads(encoder.stdout)["tasks"]["words"]["error"]
    assert "error: task words: the model cannot run this task" in encoder.stderr
    unknown = CliRunner().invoke(app, [*command[:3], "wordz", *command[4:]], prog_name="leangrid")
    assert unknown.exit_code == 2 and "there is no task 'wordz'" in unknown.stderr and not unknown.stdout


def test_the_importer_writes_what_the_yaml_of_the_repository_reads(
    bench: Callable[[str], Any], tiny: Tiny, tmp_path: Path
) -> None:
    pytest.importorskip("lm_eval")
    data, out = tmp_path / "data", tmp_path / "out"
    data.mkdir()

    def write(name: str, *rows: dict[str, Any]) -> None:
        (data / name).write_text("".join(json.dumps(row) + "\n" for row in rows))

    write(
        "hellaswag_val.jsonl",
        {
            "activity_label": "Baking",
            "ctx_a": "A cook mixes.",
            "ctx_b": "the dough [title] rises",
            "label": 1,
            "endings": ["It [step] sinks.", "It grows.", "It sings.", "It flies."],
        },
    )
    write(
        "piqa_valid.jsonl",
        {"goal": "open a jar", "sol1": "twist", "sol2": "shout"},
        {"goal": "boil", "sol1": "ice", "sol2": "fire"},
    )
    write("my_arc_easy.jsonl", {"query": "Question: Why?", "choices": ["a", "b", "c"], "gold": 2})
    write(
        "winogrande_x.jsonl",
        {"context_options": ["He saw Ann so Ann", "He saw Ann so he"], "continuation": "ran.", "gold": 1},
    )
    tasks = bench("local_tasks")
    (data / "piqa_labels.lst").write_text("0\n")
    with pytest.raises(TaskError, match="1 labels for 2 questions"):
        tasks.convert(data, out)
    (data / "piqa_labels.lst").write_text("0\n1\n")
    assert tasks.convert(data, out) == {"arc_easy": 1, "hellaswag": 1, "piqa": 2, "winogrande": 1}
    (row,) = map(json.loads, (out / "hellaswag.jsonl").read_text().splitlines())
    assert row == {
        "query": "Baking: A cook mixes. The dough. rises",
        "choices": ["It sinks.", "It grows.", "It sings.", "It flies."],
        "gold": 1,
    }
    names = ("arc_easy", "hellaswag", "piqa", "winogrande")
    asked = {name: found[0].tasks[name] for name, found in harness.find_benchmarks(names, out).items()}
    request = {
        name: task.construct_requests(task.eval_docs[0], task.fewshot_context(task.eval_docs[0], 0))
        for name, task in asked.items()
    }
    assert [r.args for r in request["piqa"]] == [
        ("Question: open a jar\nAnswer:", " twist"),
        ("Question: open a jar\nAnswer:", " shout"),
    ]
    assert request["arc_easy"][2].args == ("Question: Why?\nAnswer:", " c")
    assert request["hellaswag"][1].args == ("Baking: A cook mixes. The dough. rises", " It grows.")
    assert [r.args for r in request["winogrande"]] == [("He saw Ann so Ann", " ran."), ("He saw Ann so he", " ran.")]
    found = evaluate(tiny("llama3"), tasks=Tasks(names, out)).tasks
    assert [found[name]["n"] for name in names] == [1, 1, 2, 1] and "acc_norm" not in found["winogrande"]


@pytest.mark.slow
def test_the_promised_names_are_the_harness_s() -> None:
    tasks = pytest.importorskip("lm_eval.tasks")
    index = tasks.TaskManager().task_index
    assert {"arc_easy", "arc_challenge", "lambada", "lambada_openai", "mmlu", "hellaswag", "piqa", "winogrande"} <= set(
        index
    )


def test_a_result_stays_the_same_model_when_figures_are_kept_in_it(quantized: Path, tmp_path: Path) -> None:
    shutil.copytree(quantized, tmp_path / "copy")
    before = identify_model(tmp_path / "copy")
    assert before == identify_model(quantized)
    add_evaluation(tmp_path / "copy", {"text": "t", "perplexity": 3.0, "tasks": {}})
    assert identify_model(tmp_path / "copy") == before
    manifest = json.loads((quantized / "manifest.json").read_text())
    manifest["files"]["model.safetensors"]["sha256"] = "0" * 64
    (tmp_path / "copy" / "manifest.json").write_text(json.dumps(manifest))
    assert identify_model(tmp_path / "copy") != before
    (tmp_path / "copy" / "manifest.json").write_text("{}")
    with pytest.raises(CheckpointError, match="leangrid verify"):
        identify_model(tmp_path / "copy")
