"""``evaluate`` on real directories: its figures against their definitions, and what it refuses."""

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import tiny_models
import torch
import zoo_models

from leangrid.errors import CalibrationError, CheckpointError, ShapeError
from leangrid.evaluation import Evaluation, evaluate, evaluate_many
from leangrid.progress import Event
from leangrid.recipe import Recipe
from leangrid.run.quantize import quantize

Tiny = Callable[..., Path]
KEYS = [
    "model",
    "reference",
    "text",
    "sha256_of_text",
    "length",
    "windows",
    "tokens",
    "perplexity",
    "reference_perplexity",
    "kl_mean",
    "kl_p99",
    "top1_agreement",
    "tasks",
    "bits_per_weight",
    "seconds",
]


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    file = tmp_path_factory.mktemp("text") / "prose.txt"
    file.write_text("".join(f"Sentence number {index} of a text that is long enough.\n" for index in range(300)))
    return str(file)


def test_a_model_against_its_original_by_the_definition(tiny: Tiny, text: str, tmp_path: Path) -> None:
    near = tiny_models.build("llama3")
    generator = torch.Generator().manual_seed(0)
    for parameter in near.parameters():
        parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.02)
    near.save_pretrained(tmp_path)
    tiny_models.tokenizer().save_pretrained(tmp_path)
    found = evaluate(str(tmp_path), str(tiny("llama3")), text, length=40, windows=3)
    ids = torch.tensor(tiny_models.tokenizer()(Path(text).read_text())["input_ids"][:120]).view(3, 40)
    with torch.no_grad():
        models = (near, tiny_models.build("llama3"))
        model, original = (each(input_ids=ids).logits.double().log_softmax(-1)[:, :-1] for each in models)
    kl = (original.exp() * (original - model)).sum(-1).flatten()
    nll = [-scores.gather(-1, ids[:, 1:, None]).mean().item() for scores in (model, original)]
    assert found.kl_mean == pytest.approx(kl.mean().item(), rel=1e-4)
    assert found.kl_p99 == pytest.approx(kl.quantile(0.99).item(), rel=1e-4)
    assert found.perplexity == pytest.approx(math.exp(nll[0]), rel=1e-4)
    assert found.reference_perplexity == pytest.approx(math.exp(nll[1]), rel=1e-4)
    assert found.top1_agreement == pytest.approx((original.argmax(-1) == model.argmax(-1)).double().mean().item())
    assert 0 < found.top1_agreement < 1


def test_figures_are_read_by_attribute_by_key_and_as_a_dict() -> None:
    found = Evaluation("m", perplexity=2.5)
    assert found.perplexity == found["perplexity"] == found.to_dict()["perplexity"] == 2.5
    assert found.to_json() == found.to_dict() and "embedding_cosine_mean" not in found.to_dict()
    with pytest.raises(KeyError):
        found["nothing"]


def test_the_json_has_the_promised_keys(tiny: Tiny, text: str) -> None:
    found = evaluate(tiny("llama3"), tiny("llama3"), text, length=32, windows=2)
    assert list(found.to_dict()) == KEYS
    assert json.loads(json.dumps(found.to_dict())) == found.to_dict()
    assert (found.length, found.windows, found.tokens, found.tasks) == (32, 2, 62, {})
    assert found.kl_mean == 0 and found.top1_agreement == 1 and found.perplexity == found.reference_perplexity
    assert found.bits_per_weight == pytest.approx(32, rel=0.05)
    alone = evaluate(tiny("llama3"), text=text, length=32, windows=2)
    assert alone.perplexity == found.perplexity and alone.kl_mean is None and alone.reference_perplexity is None


def test_many_models_share_one_reference_and_quantized_ones_are_read(tiny: Tiny, text: str, tmp_path: Path) -> None:
    source = tiny("llama3")
    for scheme in ("NU2", "NU4"):
        quantize(source, tmp_path / scheme, Recipe(scheme=scheme), windows=tiny_models.tokens(8, 32))
    seen: list[Event] = []
    names = [str(tmp_path / "NU4"), str(tmp_path / "NU2"), str(source)]
    four, two, same = evaluate_many(names, source, text, length=64, windows=2, progress=seen.append)
    assert 0 == same.kl_mean < four.kl_mean < two.kl_mean
    assert four.kl_p99 > four.kl_mean and four.top1_agreement > two.top1_agreement
    assert (
        four.bits_per_weight
        == json.loads((tmp_path / "NU4" / "manifest.json").read_text())["result"]["bits_per_weight"]
    )
    assert four == replace(evaluate(names[0], source, text, length=64, windows=2), seconds=four.seconds)
    assert [(event.layer, event.block) for event in seen] == [
        (name, index) for name in [str(source), *names] for index in (1, 2)
    ]


def test_encoders_are_measured_by_their_embeddings(tiny: Tiny, text: str) -> None:
    found = evaluate(tiny("bert", seed=1), tiny("bert"), text, length=24, windows=3)
    ids = torch.tensor(tiny_models.tokenizer()(Path(text).read_text())["input_ids"][:72]).view(3, 24)
    with torch.no_grad():
        model, original = (
            tiny_models.build("bert", seed=seed)(input_ids=ids).last_hidden_state.mean(1) for seed in (1, 0)
        )
    expected = (1 - torch.cosine_similarity(model, original)).mean().item()
    assert expected > 0.01 and found.embedding_cosine_mean == pytest.approx(expected, rel=1e-3)
    assert found.perplexity is None and found.kl_mean is None
    assert evaluate(tiny("bert"), tiny("bert"), text, length=24, windows=3).embedding_cosine_mean == pytest.approx(
        0, abs=1e-9
    )
    with pytest.raises(CheckpointError, match="reference"):
        evaluate(tiny("bert"), text=text, length=24, windows=3)


def test_a_window_is_as_long_as_the_model_takes_unless_said(tiny: Tiny, text: str) -> None:
    assert evaluate(tiny("llama3"), text=text, windows=1).length == tiny_models.POSITIONS
    with pytest.raises(CalibrationError, match="--length 512"):
        evaluate(tiny("llama3"), text=text, windows=1, length=513)


def test_too_little_text_says_have_and_need(tiny: Tiny, text: str) -> None:
    with pytest.raises(CalibrationError, match=r"[\d,]+ tokens, 512,000 needed .*--windows \d+"):
        evaluate(tiny("llama3"), text=text, windows=1000)


def test_another_vocabulary_and_an_encoder_reference_are_refused(tiny: Tiny, text: str, tmp_path: Path) -> None:
    model = tiny_models.build("llama3")
    model.resize_token_embeddings(tiny_models.VOCAB + 1)
    model.save_pretrained(tmp_path)
    tiny_models.tokenizer().save_pretrained(tmp_path)
    with pytest.raises(ShapeError, match="513 against the reference's 512"):
        evaluate(tmp_path, tiny("llama3"), text, length=16, windows=1)
    with pytest.raises(CheckpointError, match="no language-model head"):
        evaluate(tiny("llama3"), tiny("bert"), text, length=16, windows=1)


def test_a_model_without_tokenizer_is_refused(text: str, tmp_path: Path) -> None:
    tiny_models.build("llama3").save_pretrained(tmp_path)
    with pytest.raises(CalibrationError, match="no tokenizer"):
        evaluate(tmp_path, text=text)


@pytest.mark.parametrize(
    ("model_type", "words"),
    [("blip-2", "says nothing to text alone: .*pixel_values"), ("florence2", "answers a text with another")],
)
def test_a_model_that_does_not_go_on_with_a_text_is_refused(
    model_type: str, words: str, text: str, tmp_path: Path
) -> None:
    zoo_models.save(zoo_models.build(model_type, "image-text"), tmp_path)
    tiny_models.tokenizer().save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=words):
        evaluate(tmp_path, text=text, length=16, windows=1)
