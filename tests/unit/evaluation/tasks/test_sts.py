"""The STS Benchmark: its file, pooled embeddings, rank correlation."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tiny_models
import torch

from leangrid.errors import TaskError
from leangrid.evaluation import Tasks, evaluate
from leangrid.evaluation.tasks.sts import Pairs, embed_sentences, spearman

Tiny = Callable[..., Path]


def write(path: Path, rows: int = 9) -> Path:
    words = ("class", "method", "the import", "a \"quoted name", "yield", "with a long tail of names")  # fmt: skip
    lines = [
        f"main\tf\t2012\t{i}\t{i * 7 % 6 / 1.2:.2f}\t{words[i % 6]} {i}\t{words[i * 5 % 4]}\r\n" for i in range(rows)
    ]
    path.write_text("".join(lines), newline="")
    return path


def test_rank_correlation_with_ties_is_scipy_s() -> None:
    stats = pytest.importorskip("scipy.stats")
    generator = np.random.default_rng(0)
    for _ in range(20):
        first, second = generator.integers(0, 5, 30).astype(float), generator.normal(size=30).round(1)
        assert spearman(first, second) == pytest.approx(stats.spearmanr(first, second).statistic)


def test_embeddings_are_means_over_each_sentence_s_own_tokens() -> None:
    model, tokenizer = tiny_models.build("bert"), tiny_models.tokenizer()
    sentences = ["a class", "an exception is raised where the name is not found", "yield", "a list of names"]
    found = embed_sentences(model, tokenizer, sentences, batch=3)
    with torch.no_grad():
        for row, sentence in zip(found, sentences, strict=True):
            alone = model(torch.tensor([tokenizer(sentence)["input_ids"]])).last_hidden_state[0].double().mean(0)
            torch.testing.assert_close(row, alone, rtol=1e-4, atol=1e-5)


def test_the_task_reads_the_benchmark_s_file(tiny: Tiny, tmp_path: Path) -> None:
    pairs = Pairs.read(write(tmp_path / "sts-test.csv"))
    assert pairs.first[3] == 'a "quoted name 3' and pairs.second[1] == "method" and len(pairs.sentences) == 18
    stats = pytest.importorskip("scipy.stats")
    found = evaluate(tiny("bert"), tasks=Tasks(("sts",), tmp_path)).tasks["sts"]
    left, right = embed_sentences(tiny_models.build("bert"), tiny_models.tokenizer(), pairs.sentences).split(9)
    similarity = torch.cosine_similarity(left, right).numpy()
    assert (
        found["spearman"] == pytest.approx(100 * stats.spearmanr(similarity, pairs.scores).statistic, abs=0.01)
        and found["n"] == 9
    )
    assert evaluate(tiny("bert"), tasks=Tasks(("sts",), tmp_path, limit=5)).tasks["sts"]["n"] == 5
    decoder = evaluate(tiny("llama3"), tasks=Tasks(("sts",), tmp_path)).tasks["sts"]
    assert "the model is no encoder" in decoder["error"]


def test_other_files_are_refused(tmp_path: Path) -> None:
    (tmp_path / "sts-test.csv").write_text("a,b,c\n")
    with pytest.raises(TaskError, match="no file of the STS Benchmark"):
        evaluate(tmp_path / "no model", tasks=Tasks(("sts",), tmp_path))
    with pytest.raises(TaskError, match="1 different scores have no correlation"):
        Pairs.read(write(tmp_path / "short.csv", 1))
