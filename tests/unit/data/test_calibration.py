"""Windows are the joined text's tokens, cut without padding, the same for the same recipe."""

import json
from pathlib import Path

import pytest
import tiny_models
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from leangrid.data.calibration import cut_windows, decode_start, find_affixes, hash_windows, make_windows
from leangrid.errors import CalibrationError
from leangrid.recipe import Recipe


def words_tokenizer(template: str | None) -> PreTrainedTokenizerFast:
    """One id a word; ``template`` such as "[CLS] $A [SEP]" surrounds every text."""
    vocabulary = {"[CLS]": 0, "[SEP]": 1, "[UNK]": 2} | {f"w{index}": 3 + index for index in range(100)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if template:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=template, special_tokens=[("[CLS]", 0), ("[SEP]", 1)]
        )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]")


def words_file(folder: Path, count: int) -> str:
    file = folder / "words.txt"
    file.write_text(" ".join(f"w{index % 100}" for index in range(count)))
    return str(file)


def recipe(calibration: str, samples: int, length: int, seed: int = 0) -> Recipe:
    return Recipe(scheme="NU4", calibration=calibration, samples=samples, length=length, seed=seed)


def test_a_file_gives_its_first_tokens_in_order(tmp_path: Path) -> None:
    found = make_windows(recipe(words_file(tmp_path, 40), 3, 10), words_tokenizer(None))
    assert found.dtype == torch.int64
    assert found.tolist() == [[3 + index for index in range(start, start + 10)] for start in (0, 10, 20)]


def test_documents_are_joined_by_blank_lines_and_tokenized_as_one_text(tmp_path: Path) -> None:
    documents = [" ".join(["text of a document,", str(index), "and more words"] * 5) for index in range(200)]
    file = tmp_path / "a.jsonl"
    file.write_text("".join(json.dumps({"text": document}) + "\n" for document in documents))
    tokenizer = tiny_models.tokenizer()
    whole = tokenizer("\n\n".join(documents))["input_ids"]
    assert make_windows(recipe(str(file), 7, 33), tokenizer).flatten().tolist() == whole[: 7 * 33]


def test_a_giant_document_gives_the_tokens_of_the_whole(tmp_path: Path) -> None:
    text = "Pneumonoultramicroscopic words, 12345 of them.\n" * 20_000
    file = tmp_path / "a.txt"
    file.write_text(text)
    tokenizer = tiny_models.tokenizer()
    found = make_windows(recipe(str(file), 4, 100), tokenizer).flatten().tolist()
    assert found == tokenizer(text[:4000])["input_ids"][:400]


def test_a_text_of_long_words_is_read_until_there_are_tokens_enough(tmp_path: Path) -> None:
    file = tmp_path / "long.txt"
    file.write_text(" ".join(f"{'x' * 60} w{index % 100}" for index in range(500)))
    found = make_windows(recipe(str(file), 10, 80), words_tokenizer(None))
    assert found.flatten()[1::2].tolist() == [3 + index % 100 for index in range(400)]


def test_bos_opens_the_text_once_and_special_tokens_of_an_encoder_every_window(tmp_path: Path) -> None:
    file = words_file(tmp_path, 40)
    decoder = make_windows(recipe(file, 2, 8), words_tokenizer("[CLS] $A"))
    assert decoder.tolist() == [[0, 3, 4, 5, 6, 7, 8, 9], [10, 11, 12, 13, 14, 15, 16, 17]]
    encoder = make_windows(recipe(file, 2, 8), words_tokenizer("[CLS] $A [SEP]"))
    assert encoder.tolist() == [[0, 3, 4, 5, 6, 7, 8, 1], [0, 9, 10, 11, 12, 13, 14, 1]]


@pytest.mark.parametrize(
    ("template", "expected"), [(None, ((), ())), ("[CLS] $A", ((0,), ())), ("[CLS] $A [SEP]", ((0,), (1,)))]
)
def test_affixes(template: str | None, expected: tuple[tuple[int, ...], tuple[int, ...]]) -> None:
    found = find_affixes(words_tokenizer(template))
    assert (found.prefix, found.suffix) == expected


def test_the_incomplete_tail_is_left_out() -> None:
    bare = find_affixes(words_tokenizer(None))
    assert cut_windows(list(range(10)), 3, bare).tolist() == [[0, 1, 2], [3, 4, 5], [6, 7, 8]]
    assert cut_windows([], 3, bare).shape == (0, 3)


def test_the_seed_chooses_among_the_windows_of_a_corpus(monkeypatch: pytest.MonkeyPatch) -> None:
    words = tuple(f"w{index % 100} w{index // 100}" for index in range(2000))
    monkeypatch.setattr("leangrid.data.corpora._embedded", lambda: words)
    tokenizer = words_tokenizer(None)
    first, again, other = (make_windows(recipe("embedded", 4, 16, seed), tokenizer) for seed in (0, 0, 1))
    assert hash_windows(first) == hash_windows(again) != hash_windows(other)
    everything = make_windows(recipe("embedded", 250, 16), tokenizer)
    in_order = torch.tensor(tokenizer(" ".join(words))["input_ids"]).view(250, 16)
    assert {tuple(row) for row in everything.tolist()} == {tuple(row) for row in in_order.tolist()}  # each once
    assert not torch.equal(everything, in_order)


def test_hash_is_of_the_bytes() -> None:
    assert hash_windows(torch.tensor([[1, 2]])) == hash_windows(torch.tensor([[1, 0, 2]])[:, ::2])
    assert hash_windows(torch.tensor([[1, 2]])) != hash_windows(torch.tensor([[2, 1]]))


def test_self_asks_the_sampler_and_checks_what_it_gives() -> None:
    asked = []

    def sampler(samples: int, length: int, seed: int) -> torch.Tensor:
        asked.append((samples, length, seed))
        return torch.full((samples, length), 9)

    assert make_windows(recipe("self", 2, 8, 5), None, sampler, vocab_rows=10).shape == (2, 8)
    assert asked == [(2, 8, 5)]
    with pytest.raises(CalibrationError, match="embedding of 9"):
        make_windows(recipe("self", 2, 8), None, sampler, vocab_rows=9)
    with pytest.raises(CalibrationError, match="sample"):
        make_windows(recipe("self", 2, 8), None)


def test_the_start_is_shown_on_one_line() -> None:
    tokenizer = tiny_models.tokenizer()
    ids = torch.tensor([tokenizer("The first\n\nwindow of text, and more of it")["input_ids"]])
    assert decode_start(tokenizer, ids, 20) == "The first window of "
