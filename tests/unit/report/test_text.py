"""Tables and units for people."""

import pytest

from leangrid.report.text import (
    eval_summary,
    format_duration,
    format_pairs,
    format_size,
    format_table,
    quantize_summary,
)


def test_numbers_go_right_and_words_left() -> None:
    assert format_table(("name", "loss"), [("a", 1.5), ("longer", 12345.678)]) == (
        "name         loss\n-----------------\na             1.5\nlonger  1.235e+04"
    )


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0 B"), (999, "999 B"), (1000, "1.0 kB"), (4_250_000, "4.2 MB"), (3e15, "3000.0 TB")]
)
def test_size(count: float, text: str) -> None:
    assert format_size(count) == text


@pytest.mark.parametrize(
    ("seconds", "text"), [(-3, "0 s"), (59.4, "59 s"), (59.6, "1 min 00 s"), (185, "3 min 05 s"), (7800, "2 h 10 min")]
)
def test_duration(seconds: float, text: str) -> None:
    assert format_duration(seconds) == text


def test_unknown_values_are_left_out() -> None:
    assert format_pairs([("a", 1), ("bcd", None), ("ef", "x")]) == "a   1\nef  x"


def test_a_run_in_lines() -> None:
    seconds = {"total": 61.0, "grid": 60.0, "pack": 0.1}
    values = {
        "out": "o",
        "scheme": "NU4",
        "loss": 3.0,
        "loss_minmax": 4.0,
        "bytes": 2000,
        "seconds": seconds,
        "kernels": {"grid": "torch"},
    }
    text = quantize_summary(values)
    assert (
        "25% less than min-max GPTQ" in text
        and "2.0 kB" in text
        and "1 min 01 s (grid 1 min 00 s)" in text
        and "GPU" not in text
    )
    assert "25% more" in quantize_summary(values | {"loss": 5.0})


def test_an_evaluation_in_lines() -> None:
    values: dict[str, object] = {
        "model": "m",
        "text": "t",
        "windows": 12,
        "length": 1024,
        "perplexity": 28.94,
        "top1_agreement": 0.873,
    }
    values |= dict.fromkeys(("reference", "reference_perplexity", "kl_mean", "kl_p99")) | {
        "bits_per_weight": 4.25,
        "seconds": 5.0,
    }
    text = eval_summary(values)
    assert "28.94" in text and "87.3%" in text and "KL" not in text and "12 windows of 1024 tokens" in text
