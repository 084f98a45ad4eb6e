"""The models, calibration and texts of each SIZE. ``small`` takes a good hour on two cores; ``paper`` is the paper's
set-up, on a GPU.
"""

import json
from dataclasses import dataclass, replace
from pathlib import Path

from common.machine import ROOT
from common.workload import default_source


@dataclass(frozen=True)
class Data:
    """Where the texts and the models without a registry package are, as ``run.py`` was told. A corpus given by name is
    fetched."""

    c4: str = "c4"
    wikitext: str = "wikitext2"
    wikitext_train: str = "wikitext2"
    stories: str = ".models/stories260k"  # what benchmarks/stories260k.py leaves
    sts: str | None = None  # the STS Benchmark's folder: sts-train.csv, sts-test.csv
    squad: str = ".models/minilm_squad"  # what benchmarks/squad_finetune.py leaves
    tasks_dir: str | None = None  # what benchmarks/local_tasks.py leaves; the hub where none is given


@dataclass(frozen=True)
class Subject:
    """A model, its calibration, and the texts that it is measured on (their first ``windows`` x ``evaluation_length``
    tokens)."""

    name: str
    source: str
    calibration: str
    texts: tuple[tuple[str, str], ...]  # name in the results, and a path or a corpus
    samples: int
    length: int
    windows: int
    evaluation_length: int
    blocks: tuple[int, ...]  # whose linears the experiments on layers take
    groups: tuple[int, ...]  # group sizes, in columns; none: not in that experiment
    swept: tuple[str, ...]  # schemes of the sweep over p
    bits: tuple[int, ...] = (4, 3, 2)  # at which whole models are quantized
    sample_counts: tuple[int, ...] = ()  # of the sweep over the amount of calibration
    other_calibrations: tuple[str, ...] = ()
    tasks: tuple[str, ...] = ()  # of lm-evaluation-harness
    documents: int | None = None  # of each task, from its start; None: all


@dataclass(frozen=True)
class Size:
    name: str
    device: str
    subjects: tuple[Subject, ...]
    left_out: tuple[str, ...] = ()  # a sentence for each model that is not here
    tasks: Path | None = None  # where the tasks' data lie
    squad: Path | None = None  # an encoder that answers questions

    def find(self, name: str) -> Subject | None:
        return next((subject for subject in self.subjects if subject.name == name), None)


def size(name: str, data: Data, folder: Path) -> Size:
    """The size ``name``. Files that have to be made, such as the two halves of a local C4 file, go to ``folder``."""
    if name not in SIZES:
        raise SystemExit(f"'{name}' is no size: {', '.join(SIZES)}")
    return SIZES[name](data, folder)


def small(data: Data, folder: Path) -> Size:
    calibration, evaluation = halves(data.c4, folder)
    subjects = [
        Subject(
            "SmolLM2-135M-Instruct",
            str(default_source()),
            calibration,
            (("wikitext2", data.wikitext), ("c4", evaluation)),
            samples=8,
            length=512,
            windows=4,
            evaluation_length=512,
            blocks=(15,),
            groups=(64,),
            swept=("NU4",),
            bits=(4, 3),
            sample_counts=(2, 16),
            other_calibrations=(data.wikitext_train, "self", "embedded"),
            tasks=("arc_easy", "hellaswag", "piqa", "winogrande"),
            documents=50,
        )
    ]
    left_out = []
    stories = Path(data.stories)
    if (stories / "calibration.txt").is_file():
        subjects.append(
            Subject(
                "stories260K",
                str(stories),
                str(stories / "calibration.txt"),
                (("stories", str(stories / "evaluation.txt")),),
                samples=32,
                length=512,
                windows=24,
                evaluation_length=512,
                blocks=(0, 2, 4),
                groups=(),  # 4 is the only size that divides its 172 columns
                swept=("NU4", "NU3", "NU2", "W4A16"),
                sample_counts=(1, 2, 4, 8, 16, 64),
                other_calibrations=("self", "embedded"),
            )
        )
    else:
        left_out.append(
            f"stories260K: {data.stories} is not here; benchmarks/stories260k.py makes it, --stories says where it is"
        )
    if data.sts:
        minilm, pairs = str(ROOT / ".models" / "minilm"), Path(data.sts)
        subjects.append(
            Subject(
                "MiniLM-L6",
                minilm,
                str(pairs / "sts-train.csv"),
                (("sts", str(pairs / "sts-test.csv")),),
                samples=512,
                length=16,
                windows=0,
                evaluation_length=0,
                blocks=(3,),
                groups=(128, 32),
                swept=("NU4", "W4A16"),
            )
        )
    else:
        left_out.append(
            "MiniLM-L6: --sts says where the STS Benchmark is (a folder with sts-train.csv and sts-test.csv)"
        )
    squad = Path(data.squad) if Path(data.squad).is_dir() else None
    if squad is None:
        left_out.append(
            f"MiniLM on SQuAD: {data.squad} is not here; benchmarks/squad_finetune.py trains it, "
            "--squad says where it is"
        )
    return Size("small", "cpu", tuple(subjects), tuple(left_out), _folder(data.tasks_dir), squad)


def paper(data: Data, folder: Path) -> Size:
    """The paper's set-up: 128 x 2048 tokens of C4, perplexity on 128 windows of 2048."""
    calibration, evaluation = halves(data.c4, folder)
    first = Subject(
        "Llama-2-7B",
        "meta-llama/Llama-2-7b-hf",
        calibration,
        (("wikitext2", data.wikitext), ("c4", evaluation)),
        samples=128,
        length=2048,
        windows=128,
        evaluation_length=2048,
        blocks=(0, 15, 31),
        groups=(512, 256, 128, 64, 32),
        swept=("NU4", "NU3", "W4A16"),
        sample_counts=(8, 32, 256),
        other_calibrations=(data.wikitext_train, "self", "embedded"),
        tasks=("arc_easy", "arc_challenge", "lambada_openai", "mmlu", "hellaswag", "piqa", "winogrande"),
    )
    others = (("Llama-3-8B", "meta-llama/Meta-Llama-3-8B"), ("Mistral-7B", "mistralai/Mistral-7B-v0.1"))
    subjects = (first, *(replace(first, name=name, source=source) for name, source in others))
    return Size("paper", "cuda", subjects, tasks=_folder(data.tasks_dir))


def _folder(name: str | None) -> Path | None:
    return None if name is None else Path(name)


SIZES = {"small": small, "paper": paper}


def halves(c4: str, folder: Path) -> tuple[str, str]:
    """The text that calibrates and the text that is evaluated on: the corpus' own splits, or the two halves of a local
    .jsonl file."""
    if not c4.endswith(".jsonl"):
        return c4, c4
    documents = [line for line in Path(c4).read_text(encoding="utf-8").splitlines() if line.strip()]
    for line in documents[:1]:
        json.loads(line)  # not a file of something else
    middle, stem = len(documents) // 2, Path(c4).stem
    paths = [folder / f"{stem}.first-half.jsonl", folder / f"{stem}.second-half.jsonl"]
    for path, part in zip(paths, (documents[:middle], documents[middle:]), strict=True):
        path.write_text("\n".join(part) + "\n", encoding="utf-8")
    return str(paths[0]), str(paths[1])
