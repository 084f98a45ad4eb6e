"""Trains a BERT-shaped model that answers questions, for encoder.py; no package registry has such a checkpoint.

    python benchmarks/squad_finetune.py FILE.json OUT [--source .models/minilm] [--held-out 12] [--epochs 4]

The sentence encoder MiniLM gets a span head and is trained on a SQuAD 1.1 file (the English part of XQuAD has 1,190
questions on 48 articles). Articles are shuffled by --seed; the last --held-out of them are not trained on and are
written to OUT-data/heldout, the contexts of the others to OUT-data/train.txt (calibration). AdamW, linear warm-up and
decay, the word embeddings fixed. About half an hour with one thread.
"""

import argparse
import json
import random
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import BertForQuestionAnswering

from common.machine import provenance
from leangrid.evaluation.tasks import squad
from leangrid.models.tokenizer import load_tokenizer

_RATE, _WARM = 1e-4, 0.1


def split(path: Path, held_out: int, seed: int) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The articles of the file to train on, and those held out."""
    articles = json.loads(path.read_text(encoding="utf-8"))["data"]
    if not 0 < held_out < len(articles):
        raise SystemExit(f"{path} has {len(articles)} articles: hold out 1 to {len(articles) - 1}")
    random.Random(seed).shuffle(articles)  # noqa: S311
    return articles[:-held_out], articles[-held_out:]


def write_data(folder: Path, trained: list[dict[str, Any]], held: list[dict[str, Any]]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, articles in (("train", trained), ("heldout", held)):
        (folder / name).mkdir(exist_ok=True)
        (folder / name / "squad.json").write_text(
            json.dumps({"version": "1.1", "data": articles}, ensure_ascii=False), encoding="utf-8"
        )
    pieces = [f"{qa['question']} {paragraph['context']}" for article in trained for paragraph in article["paragraphs"]
              for qa in paragraph["qas"][:1]]  # fmt: skip
    (folder / "train.txt").write_text("\n\n".join(pieces), encoding="utf-8")


def labelled(tokenizer: Any, questions: list[squad.Question]) -> tuple[dict[str, Tensor], Tensor]:
    """Windows of tokens as the model reads them, and int64 [windows, 2]: the first and last token of each one's answer,
    or twice 0, that of [CLS], where the answer is not in the window."""
    windows = squad.windows_of(tokenizer, questions)
    owners, offsets = windows.pop("overflow_to_sample_mapping"), windows.pop("offset_mapping")
    spans = torch.zeros(len(owners), 2, dtype=torch.long)
    for row, owner in enumerate(owners.tolist()):
        start = questions[owner].starts[0]
        stop = start + len(questions[owner].answers[0])
        inside = torch.tensor([sequence == 1 for sequence in windows.sequence_ids(row)])
        inside &= (offsets[row, :, 0] < stop) & (offsets[row, :, 1] > start)
        tokens = inside.nonzero()[:, 0]
        if len(tokens) and int(offsets[row, tokens[0], 0]) <= start and int(offsets[row, tokens[-1], 1]) >= stop:
            spans[row] = torch.stack((tokens[0], tokens[-1]))
    return {name: windows[name] for name in tokenizer.model_input_names}, spans


def batches(lengths: Tensor, size: int, generator: torch.Generator) -> list[Tensor]:
    """All rows in random batches of similar length."""
    near = (lengths + 24 * torch.rand(len(lengths), generator=generator)).argsort()
    found = list(near.split(size))
    return [found[index] for index in torch.randperm(len(found), generator=generator)]


def train(model: Any, inputs: dict[str, Tensor], spans: Tensor, epochs: int, size: int, seed: int) -> None:
    lengths = inputs["attention_mask"].sum(1)
    generator = torch.Generator().manual_seed(seed)
    plan = [rows for _ in range(epochs) for rows in batches(lengths, size, generator)]
    model.bert.embeddings.word_embeddings.requires_grad_(False)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=_RATE, weight_decay=0.01)
    share = [
        min((step + 1) / (_WARM * len(plan)), (len(plan) - step) / ((1 - _WARM) * len(plan)))
        for step in range(len(plan))
    ]
    begin = time.perf_counter()
    for step, rows in enumerate(plan):
        optimizer.param_groups[0]["lr"] = _RATE * share[step]
        width = int(lengths[rows].max())
        output = model(
            **{name: tensor[rows, :width] for name, tensor in inputs.items()},
            start_positions=spans[rows, 0],
            end_positions=spans[rows, 1],
        )
        optimizer.zero_grad()
        output.loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 10 == 0:
            spent = time.perf_counter() - begin
            print(
                f"step {step + 1} of {len(plan)}, loss {float(output.loss):.3f}, {spent:.0f} s",
                file=sys.stderr,
                flush=True,
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--source", type=Path, default=Path(".models/minilm"))
    parser.add_argument("--held-out", type=int, default=12)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    data = options.out.with_name(options.out.name + "-data")
    write_data(data, *split(options.file, options.held_out, options.seed))
    trained, held = (squad.read(data / name / "squad.json").questions for name in ("train", "heldout"))
    tokenizer: Any = load_tokenizer(options.source)
    model: Any = BertForQuestionAnswering.from_pretrained(options.source, dtype=torch.float32)
    begin = time.perf_counter()
    train(model.train(), *labelled(tokenizer, trained), options.epochs, options.batch, options.seed)
    model.eval().save_pretrained(options.out)
    tokenizer.save_pretrained(options.out)
    found = squad.scores(squad.predict(model, tokenizer, held), held)
    line = {
        "benchmark": "squad_finetune",
        "model": options.out.name,
        "text": options.file.name,
        "threads": options.threads,
        "questions_trained": len(trained),
        "articles_held_out": options.held_out,
        "epochs": options.epochs,
        "train_seconds": round(time.perf_counter() - begin, 1),
        **found,
    }
    print(json.dumps(line | provenance()))


if __name__ == "__main__":
    main()
