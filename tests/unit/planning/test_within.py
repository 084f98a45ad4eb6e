"""--within: as many calibration tokens as the plan's time bears."""

from collections.abc import Callable
from pathlib import Path

import pytest
import tiny_models
from typer.testing import CliRunner

from leangrid.cli.app import app
from leangrid.errors import RecipeError
from leangrid.planning.plan import plan
from leangrid.planning.within import SHARE, WINDOWS, choose_tokens, read_duration, tokens_of_unfinished_run
from leangrid.progress import Event
from leangrid.recipe import Recipe
from leangrid.run.quantize import quantize

CARD = "48GB@16TF"  # described, so that its rates are those of no machine
SHAPE = "llama-3-8b"


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("30m", 1800), ("1h30m", 5400), ("90s", 90), ("2 h", 7200), ("1.5h", 5400), ("45min", 2700), ("1h 5m 3s", 3903)],
)
def test_times_are_read(text: str, seconds: float) -> None:
    assert read_duration(text) == seconds


@pytest.mark.parametrize("text", ["", "30", "m", "1d", "-5m", "0s", "half an hour", "5m 1h", "infh", "1e3s"])
def test_what_is_no_time_is_refused(text: str) -> None:
    with pytest.raises(RecipeError, match="is no time"):
        read_duration(text)


def seconds_of(windows: int, length: int, **fields: object) -> float:
    recipe = Recipe(scheme="NU4", samples=windows, length=length, **fields)
    return plan(None, recipe, device=CARD, shape=SHAPE).seconds["total"]


@pytest.fixture(scope="module")
def times() -> list[float]:
    return [seconds_of(*each) for each in WINDOWS]


def test_the_most_that_fits_is_chosen(times: list[float]) -> None:
    assert times == sorted(times)
    for number, needed in enumerate(times):
        chosen, planned = choose_tokens(None, Recipe(scheme="NU4"), needed / SHARE + 0.1, device=CARD, shape=SHAPE)
        assert (chosen.samples, chosen.length) == WINDOWS[number] and planned == pytest.approx(needed)
        if number:
            less, _ = choose_tokens(None, Recipe(scheme="NU4"), needed / SHARE - 0.1, device=CARD, shape=SHAPE)
            assert (less.samples, less.length) == WINDOWS[number - 1]
    assert choose_tokens(None, Recipe(scheme="NU4"), 1e9, device=CARD, shape=SHAPE)[0] == Recipe(scheme="NU4")


def test_a_time_for_nothing_says_the_least(times: list[float]) -> None:
    with pytest.raises(RecipeError, match=r"4 windows of 512 tokens, takes about .* minutes here .* Give \d+m or more"):
        choose_tokens(None, Recipe(scheme="NU4"), 0.5 * times[0], device=CARD, shape=SHAPE)


def test_what_the_recipe_names_stays() -> None:
    fixed, planned = choose_tokens(None, Recipe(scheme="NU4", samples=24), 1e9, device=CARD, shape=SHAPE)
    assert (fixed.samples, fixed.length) == (24, 2048)
    assert planned == pytest.approx(seconds_of(24, 2048))
    fixed, _ = choose_tokens(None, Recipe(scheme="NU4", length=300), 1e9, device=CARD, shape=SHAPE)
    assert (fixed.samples, fixed.length) == (128, 300)
    tuned, _ = choose_tokens(None, Recipe(scheme="NU4", tune=2), seconds_of(*WINDOWS[-1]) / SHARE, device=CARD,
                             shape=SHAPE)  # fmt: skip
    assert tuned.tune == 2 and tuned.samples < 128


@pytest.mark.parametrize("fields", [{"samples": 8, "length": 64}, {"calibration": "c4:4,embedded:4"}])
def test_where_nothing_is_left_to_choose_it_is_refused(fields: dict[str, object]) -> None:
    with pytest.raises(RecipeError, match="nothing is left to choose"):
        choose_tokens(None, Recipe(**fields), 60.0, device=CARD, shape=SHAPE)


def test_windows_are_no_longer_than_the_model_takes(tiny: Callable[..., Path]) -> None:
    chosen, _ = choose_tokens(tiny("llama2"), Recipe(), 1e9)
    assert (chosen.samples, chosen.length) == (128, tiny_models.POSITIONS)


def test_a_run_that_was_begun_keeps_its_tokens(tiny: Callable[..., Path], tmp_path: Path) -> None:
    def stop(event: Event) -> None:
        if event.stage == "block":
            raise KeyboardInterrupt

    begun = Recipe(scheme="NU3", samples=6, length=32)
    with pytest.raises(KeyboardInterrupt):
        quantize(tiny("llama2"), tmp_path / "out", begun, windows=tiny_models.tokens(6, 32), progress=stop)
    assert tokens_of_unfinished_run(tmp_path / "out", Recipe(scheme="NU3")) == begun
    assert tokens_of_unfinished_run(tmp_path / "out", Recipe(scheme="NU4")) is None
    assert tokens_of_unfinished_run(tmp_path / "other", Recipe(scheme="NU3")) is None


def test_the_command_says_what_it_chose_and_goes_on_with_it(
    tiny: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = tmp_path / "prose.txt"
    text.write_text("".join(f"Sentence number {index} of a text that is long enough.\n" for index in range(3000)))
    asked = ["quantize", str(tiny("llama2")), str(tmp_path / "out"), "--scheme", "NU3", "--calibration", str(text),
             "--length", "32"]  # fmt: skip

    def command(*more: str) -> object:
        return CliRunner().invoke(app, [*asked, *more], prog_name="leangrid")

    first = command("--within", "1h")
    assert first.exit_code == 0 and "--within 1h: --samples 128 --length 32, about" in first.output
    assert "128 x 32 tokens" in first.output
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "each of several processes would choose for itself" in command("--within", "1h", "--overwrite").output
