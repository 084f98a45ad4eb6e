"""``quantize`` and ``plan``: a run, and what it would cost."""

import os
from pathlib import Path
from typing import Any

import typer

from leangrid.cli import options
from leangrid.cli.exits import emit, emit_json, outcome, say
from leangrid.cli.progress_bar import Terminal


def quantize(
    context: typer.Context,
    source: options.Source,
    out: options.Out,
    scheme: options.Scheme = None,
    bits: options.Bits = None,
    size: options.Size = None,
    recipe: options.RecipeFile = None,
    format: options.Format = None,
    ignore: options.Ignore = None,
    only: options.Only = None,
    calibration: options.Calibration = None,
    text_field: options.TextField = None,
    samples: options.Samples = None,
    length: options.Length = None,
    seed: options.Seed = None,
    effort: options.Effort = None,
    p: options.P = None,
    steps: options.Steps = None,
    correct: options.Correct = None,
    refine: options.Refine = None,
    tune: options.Tune = None,
    guide: options.Guide = None,
    finish: options.Finish = None,
    damping: options.Damping = None,
    device: options.Device = "cpu",
    threads: options.Threads = None,
    overwrite: options.Overwrite = False,
    restart: options.Restart = False,
    max_rescued: options.MaxRescued = "1%",
    max_kl: options.MaxKl = None,
    state_dir: options.StateDir = None,
    as_json: options.AsJson = False,
    quiet: options.Quiet = False,
) -> None:
    """Quantize a checkpoint. Stopped at any moment, the same command resumes.

    \b
    leangrid quantize ./model out --scheme NU4
    leangrid quantize org/name out --scheme W4A16_G64 --calibration my.jsonl --samples 128
    leangrid quantize model.gguf out --calibration self        no data, no network
    """
    with outcome(quiet, resumable=True, debug=bool(context.obj)):
        settings = options.read_recipe(recipe, context.params)
        limits = {"max_rescued": options.read_share(max_rescued), "max_kl": options.check_limit(max_kl)}
        from leangrid.report.text import quantize_summary
        from leangrid.run.quantize import quantize as run

        follows = os.environ.get("RANK", "0") != "0"  # of several processes only the first prints
        with Terminal(quiet=quiet or follows) as terminal:
            result = run(source, out, settings, device=device, threads=threads, overwrite=overwrite, restart=restart,
                         state_dir=state_dir, progress=terminal, **limits)  # fmt: skip
        if not follows:
            values = result.to_dict()
            emit_json(values) if as_json else emit(quantize_summary(values))
            _say_what_failed(result, out, max_rescued)
        if result.exit_code:
            raise typer.Exit(result.exit_code)


def _say_what_failed(result: Any, out: Path, max_rescued: str) -> None:
    """One line on stderr for each limit that the finished result does not meet."""
    if result.exit_code and result.too_many_rescues:
        say(f"finished, but more than {max_rescued} of the layers needed a rescue: see {out / 'records.jsonl'}")
    if result.exit_code and not result.quality["passed"]:
        from leangrid.gate.quality import Quality

        say(f"finished, but {Quality.from_dict(result.quality).verdict}")


def plan(
    context: typer.Context,
    source: options.PlannedSource = None,
    shape: options.Shape = None,
    scheme: options.Scheme = None,
    bits: options.Bits = None,
    size: options.Size = None,
    recipe: options.RecipeFile = None,
    format: options.Format = None,
    ignore: options.Ignore = None,
    only: options.Only = None,
    calibration: options.Calibration = None,
    text_field: options.TextField = None,
    samples: options.Samples = None,
    length: options.Length = None,
    seed: options.Seed = None,
    effort: options.Effort = None,
    p: options.P = None,
    steps: options.Steps = None,
    correct: options.Correct = None,
    refine: options.Refine = None,
    tune: options.Tune = None,
    guide: options.Guide = None,
    finish: options.Finish = None,
    damping: options.Damping = None,
    device: options.PlannedDevice = "cpu",
    threads: options.Threads = None,
    as_json: options.AsJson = False,
    quiet: options.Quiet = False,
) -> None:
    """What quantize would do and cost, from the headers alone. Exit 2 if it cannot fit.

    \b
    leangrid plan ./model --scheme NU3 --samples 64
    leangrid plan --shape llama-3.1-405b --device 2x48GB
    """
    with outcome(quiet, debug=bool(context.obj)):
        settings = options.read_recipe(recipe, context.params)
        from leangrid.machine.memory import without_garbage_collection
        from leangrid.report.text import plan_summary

        with without_garbage_collection():  # of what is imported, too
            from leangrid.planning.plan import plan as estimate

            values = estimate(source, settings, threads=threads, device=device, shape=shape).to_dict()
        emit_json(values) if as_json else emit(plan_summary(values))
