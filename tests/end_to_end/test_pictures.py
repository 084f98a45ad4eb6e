"""Calibration by rows with pictures, on tiny random qwen3_vl, qwen3_5 and gemma3 with their own processors.

The oracle: where weights are left alone, what each linear of the text tower reads is what it reads in transformers' own
forward pass over the same processor's output."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import forked_ranks
import picture_models
import pytest
import tiny_models
import torch
import transformers as hf
from ranks_run import TOLERANCE, losses
from safetensors import safe_open
from zoo_adapter import Walked, hessians_watched

from leangrid.errors import CalibrationError, ResumeError
from leangrid.inference.load import load
from leangrid.models.processor import load_processor
from leangrid.progress import Event
from leangrid.recipe import Recipe
from leangrid.run.quantize import quantize
from leangrid.run.result import QuantizeResult

pytestmark = pytest.mark.filterwarnings("ignore:leangrid runs without its C")
SAMPLES, ROWS = 4, 6


@pytest.fixture(scope="module")
def source_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    made: dict[str, Path] = {}

    def source(name: str) -> Path:
        if name not in made:
            made[name] = picture_models.save(name, tmp_path_factory.mktemp(name) / "source")
        return made[name]

    return source


def messages(number: int) -> list[dict[str, Any]]:
    """Rows of other lengths, one with two pictures and one with none."""
    shown = [{"type": "image"}] * (2 if number == 1 else 0 if number == 3 else 1)
    asked = {"type": "text", "text": f"What is in picture {number}?"}
    said = {"type": "text", "text": "Colours, and nothing else that has a name. " * (1 + number % 2)}
    return [{"role": "user", "content": [*shown, asked]}, {"role": "assistant", "content": [said]}]


def pictures(number: int) -> list[Any]:
    counts = sum(part["type"] == "image" for part in messages(number)[0]["content"])
    return [picture_models.picture(20 + 8 * number, 16 + 12 * place, seed=number) for place in range(counts)]


def written(folder: Path, rows: int = ROWS) -> Path:
    """A file of rows with the pictures beside it, in a folder of their own."""
    (folder / "shown").mkdir(exist_ok=True)
    lines = []
    for number in range(rows):
        names = [f"shown/{number}-{place}.png" for place in range(len(pictures(number)))]
        for name, picture in zip(names, pictures(number), strict=True):
            picture.save(folder / name)
        lines.append(json.dumps({"messages": messages(number), "images": names}))
    file = folder / "rows.jsonl"
    file.write_text("\n".join(lines))
    return file


def recipe(file: Path, scheme: str = "NU4", **fields: Any) -> Recipe:
    return Recipe(scheme=scheme, calibration=str(file), **{"samples": SAMPLES, "length": 256, **fields})


def processed(source: Path, number: int) -> dict[str, torch.Tensor]:
    """What the processor gives for a row, made without leangrid's rows."""
    processor: Any = load_processor(source)
    text = processor.apply_chat_template(messages(number), tokenize=False)
    return dict(processor(text=[text], images=pictures(number) or None, return_tensors="pt"))


@pytest.mark.parametrize("name", picture_models.NAMES)
def test_linears_read_what_they_read_in_transformers_own_forward(
    name: str, source_of: Callable[[str], Path], tmp_path: Path
) -> None:
    source = source_of(name)
    with hessians_watched() as seen, pytest.raises(Walked):
        quantize(source, tmp_path / "out", recipe(written(tmp_path)))
    model = picture_models.build(name)
    sums: dict[str, torch.Tensor] = {}

    def add(path: str) -> Callable[..., None]:
        def hook(_module: Any, args: tuple[torch.Tensor, ...]) -> None:
            x = args[0].flatten(0, -2).double()
            sums[path] = sums.get(path, 0) + x.T @ x

        return hook

    for path, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_pre_hook(add(path))
    with torch.no_grad():
        for number in range(SAMPLES):
            model(**processed(source, number), use_cache=False)
    assert len(seen.hessians) >= 14
    for path, hessian in seen.hessians.items():
        torch.testing.assert_close(hessian, sums[path], rtol=1e-4, atol=1e-4 * float(sums[path].abs().max()))


@pytest.mark.parametrize("name", picture_models.NAMES)
def test_the_result_answers_on_pictures_and_all_but_the_text_tower_is_as_it_was(
    name: str, source_of: Callable[[str], Path], tmp_path: Path
) -> None:
    source, told = source_of(name), list[str]()
    result = quantize(
        source,
        tmp_path / "out",
        recipe(written(tmp_path), "W8A16_G32"),
        progress=lambda event: told.append(event.message),
    )
    _the_gate_measured_both(result)
    assert any(f"{SAMPLES} rows with 4 pictures" in sentence and "chat template" in sentence for sentence in told)
    for file in source.glob("*.j*"):
        if file.name != "config.json":
            assert (tmp_path / "out" / file.name).read_bytes() == file.read_bytes(), file.name
    with (
        safe_open(source / "model.safetensors", "pt") as ours,
        safe_open(tmp_path / "out/model.safetensors", "pt") as got,
    ):
        kept = set(ours.keys()) & set(got.keys())
        assert {key for key in ours.keys() if "vis" in key or "project" in key} <= kept  # noqa: SIM118
        assert all(torch.equal(ours.get_tensor(key), got.get_tensor(key)) for key in kept)
    inputs = processed(tmp_path / "out", 1)
    with torch.no_grad():
        wanted = picture_models.build(name)(**inputs).logits
        plain = hf.AutoModelForImageTextToText.from_pretrained(tmp_path / "out", dtype=torch.float32)(**inputs).logits
        own = load(tmp_path / "out", dtype=torch.float32)[0](**inputs).logits
    assert float((plain - wanted).norm() / wanted.norm()) < 0.05
    assert float((own - plain).norm() / wanted.norm()) < 1e-3


def _the_gate_measured_both(result: QuantizeResult) -> None:
    quality = result.quality
    assert quality["passed"] and quality["original"] == "transformers"
    assert quality["unseen"]["text"] == "Python's documentation"
    assert quality["pictures"]["windows"] == 2 and quality["pictures"]["value"] != quality["value"]


def test_a_stopped_run_resumes_to_the_same_bytes(source_of: Callable[[str], Path], tmp_path: Path) -> None:
    source, wanted = source_of("qwen3_vl"), recipe(written(tmp_path))

    def stop(event: Event) -> None:
        if event.stage == "block" and event.block == 0:
            raise KeyboardInterrupt

    quantize(source, tmp_path / "whole", wanted)
    with pytest.raises(KeyboardInterrupt):
        quantize(source, tmp_path / "out", wanted, progress=stop)
    events: list[Event] = []
    quantize(source, tmp_path / "out", wanted, progress=events.append)
    assert [event.block for event in events if event.stage == "block"] == [1], "block 0 was done again"
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    whole, resumed = (json.loads((tmp_path / name / "manifest.json").read_text()) for name in ("whole", "out"))
    assert whole["calibration"] == resumed["calibration"] and whole["calibration"]["pictures"] == 4
    assert whole["result"]["windows_sha256"] == resumed["result"]["windows_sha256"]


@pytest.mark.fault("C12")
def test_another_picture_under_the_same_name_is_another_run(source_of: Callable[[str], Path], tmp_path: Path) -> None:
    source, file = source_of("gemma3"), written(tmp_path)

    def stop(event: Event) -> None:
        if event.stage == "block":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantize(source, tmp_path / "out", recipe(file), progress=stop)
    picture_models.picture(seed=99).save(tmp_path / "shown/0-0.png")
    with pytest.raises(ResumeError, match="windows"):
        quantize(source, tmp_path / "out", recipe(file))


@pytest.mark.fault("N13")
def test_what_cannot_be_calibrated_is_one_sentence_and_leaves_nothing(
    source_of: Callable[[str], Path], tmp_path: Path
) -> None:
    file, source = written(tmp_path), source_of("gemma3")
    text_only = tiny_models.save("llama2", tmp_path / "text")
    bare = tmp_path / "bare"
    bare.mkdir()
    for path in source.iterdir():
        if "processor" not in path.name:
            (bare / path.name).symlink_to(path)
    long, few = recipe(file, length=8), recipe(file, samples=7)
    for model, asked, said in (
        (text_only, recipe(file), "its rows have pictures, and this model takes text alone"),
        (bare, recipe(file), "the checkpoint has no processor"),
        (source, long, "every row has more than 8 tokens"),
        (source, few, "too few rows: 6 can be used, 7 are needed"),
    ):
        with pytest.raises(CalibrationError, match=said):
            quantize(model, tmp_path / "out", asked)
    (tmp_path / "shown/1-1.png").unlink()
    with pytest.raises(CalibrationError, match=r"'shown/1-1\.png' cannot be read: No such file.*rows\.jsonl:2"):
        quantize(source, tmp_path / "out", recipe(file))
    assert not list(tmp_path.glob("out*"))
    # The column of the text by its name: pictures are none of a text-only model's business.
    plain = tmp_path / "plain.jsonl"
    plain.write_text(json.dumps({"text": "words and words " * 100, "image": "gone.png"}))
    assert quantize(text_only, tmp_path / "out", recipe(plain, samples=2, length=32, text_field="text")).layers == 14


def test_two_ranks_share_the_rows(source_of: Callable[[str], Path], tmp_path: Path) -> None:
    words = ("--calibration", written(tmp_path), "--samples", 3, "--length", 256, "--threads", 1)
    for name, count in (("one", 1), ("two", 2)):
        job = forked_ranks.command("quantize", source_of("qwen3_vl"), tmp_path / name, *words)
        assert [ended.status for ended in forked_ranks.run(count, job)] == [0] * count
    one, two = losses(tmp_path / "one"), losses(tmp_path / "two")
    assert one.keys() == two.keys() and all(abs(two[key] / one[key] - 1) < TOLERANCE for key in one)


def test_the_whole_model_is_finished_on_its_rows(source_of: Callable[[str], Path], tmp_path: Path) -> None:
    wanted = recipe(written(tmp_path), "RTN4_G32", finish=2)
    found = quantize(source_of("qwen3_vl"), tmp_path / "out", wanted).finish
    assert found["best"] > 0 and found["held_after"] < found["held_before"]


def test_blocks_are_tuned_by_what_predictions_on_its_rows_feel(
    source_of: Callable[[str], Path], tmp_path: Path
) -> None:
    stored = []
    for draws in (0, 2):
        wanted = recipe(written(tmp_path), "RTN3_G32", tune=2, guide=draws)
        result = quantize(source_of("qwen3_vl"), tmp_path / f"out-{draws}", wanted)
        assert result.tuning["tuned"] > 0 and not result.tuning["trouble"]
        stored.append((tmp_path / f"out-{draws}" / "model.safetensors").read_bytes())
    assert stored[0] != stored[1]
