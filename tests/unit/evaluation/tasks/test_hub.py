"""The promised tasks by the harness's own names and yaml, their data in folders laid out as on the hub."""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from leangrid.evaluation import Tasks, evaluate

pytestmark = pytest.mark.filterwarnings("ignore")  # the harness's and datasets' own
Rows = Sequence[Mapping[str, Any]]

ARC = [
    {
        "id": str(i),
        "question": f"What is {i}?",
        "choices": {"text": ["a class", "a method", "None"], "label": ["A", "B", "C"]},
        "answerKey": "ABC"[i % 3],
    }
    for i in range(4)
]
HELLASWAG = [
    {
        "ind": i,
        "activity_label": "Import",
        "ctx_a": f"Number {i} is read.",
        "ctx_b": "it",
        "label": str(i % 4),
        "endings": [" is a [title] name.", " returns.", " raises an error.", " yields."],
    }
    for i in range(5)
]
PIQA = [{"goal": f"Call it {i} times", "sol1": "with a loop", "sol2": "with a class", "label": i % 2} for i in range(6)]
WINOGRANDE = [
    {"sentence": "He called the method and _ returned.", "option1": "it", "option2": "he", "answer": "12"[i % 2]}
    for i in range(3)
]
LAMBADA = [{"text": f"The method number {i} returns a list of names"} for i in range(7)]
MMLU = [
    {"question": f" Is {i} even? ", "subject": "s", "choices": ["yes", "no", "never", "always"], "answer": i % 4}
    for i in range(2)
]


def dataset(root: Path, repository: str, configs: Mapping[str, Mapping[str, Rows]]) -> None:
    """Parquet files and the card that names them: configuration -> split -> rows."""
    folder, card = root / repository, "---\nconfigs:\n"
    for config, splits in configs.items():
        card += f"- config_name: {config}\n  data_files:\n"
        (folder / config).mkdir(parents=True)
        for split, rows in splits.items():
            card += f"  - split: {split}\n    path: {config}/{split}-*\n"
            pyarrow.parquet.write_table(
                pyarrow.Table.from_pylist([*rows]), folder / config / f"{split}-00000-of-00001.parquet"
            )
    (folder / "README.md").write_text(card + "---\n")


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty place where the names of the hub's datasets are looked up."""
    datasets = pytest.importorskip("datasets")
    pytest.importorskip("lm_eval")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    return tmp_path


def everywhere(rows: Rows, *splits: str) -> dict[str, Rows]:
    return dict.fromkeys(splits or ("train", "validation", "test"), rows)


def test_each_promised_name_asks_the_hub_s_documents(hub: Path, tiny: Callable[..., Path]) -> None:
    dataset(hub, "allenai/ai2_arc", {"ARC-Easy": everywhere(ARC), "ARC-Challenge": everywhere(ARC[:3])})
    dataset(hub, "Rowan/hellaswag", {"default": everywhere(HELLASWAG)})
    dataset(hub, "baber/piqa", {"default": everywhere(PIQA)})
    dataset(hub, "allenai/winogrande", {"winogrande_xl": everywhere(WINOGRANDE)})
    dataset(hub, "EleutherAI/lambada_openai", {"default": everywhere(LAMBADA, "test")})
    asked = {"arc_easy": 4, "arc_challenge": 3, "hellaswag": 5, "piqa": 6, "winogrande": 3, "lambada_openai": 7}
    found = evaluate(tiny("llama3"), tasks=Tasks(tuple(asked))).tasks
    assert {name: figures.get("n", figures) for name, figures in found.items()} == asked
    for name, figures in found.items():
        assert 0 <= figures["acc"] <= 1 and math.isfinite(figures["stderr"]), name
    assert {name for name, figures in found.items() if "acc_norm" in figures} == {
        "arc_easy",
        "arc_challenge",
        "hellaswag",
        "piqa",
    }
    assert found["lambada_openai"]["perplexity"] > 1


@pytest.mark.slow  # 57 data sets are made and read
def test_mmlu_is_its_57_tasks_weighted_by_their_documents(hub: Path, tiny: Callable[..., Path], tmp_path: Path) -> None:
    from lm_eval.tasks import TaskManager

    found = TaskManager().task_index.values()
    default = [entry.cfg or {} for entry in found if entry.yaml_path and entry.yaml_path.parent.match("mmlu/default")]
    subjects = sorted(config["dataset_name"] for config in default if "dataset_name" in config)
    assert len(subjects) == 57
    dataset(
        hub,
        "cais/mmlu",
        {subject: {"test": MMLU[: 1 + place % 2], "dev": MMLU} for place, subject in enumerate(subjects)},
    )
    mmlu = evaluate(tiny("llama3"), tasks=Tasks(("mmlu",), out=tmp_path / "r.json")).tasks["mmlu"]
    each = [kept["result"] for kept in json.loads((tmp_path / "r.json").read_text())["identity"]["tasks"].values()]
    assert (
        mmlu["n"] == sum(one["sample_len"] for one in each) == sum(1 + place % 2 for place in range(57))
        and len(each) == 57
    )
    assert mmlu["acc"] == pytest.approx(sum(one["sample_len"] * one["acc,none"] for one in each) / mmlu["n"])
