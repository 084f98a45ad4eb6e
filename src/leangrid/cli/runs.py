"""``quantize`` and ``plan``: a run, and what it would cost."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from leangrid.cli import options
from leangrid.cli.exits import emit, emit_json, outcome, say
from leangrid.cli.progress_bar import Terminal

if TYPE_CHECKING:
    from leangrid.recipe import Recipe


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
    within: options.Within = None,
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
    leangrid quantize model.gguf out --calibration self --within 1h     no data, no network
    """
    with outcome(quiet, resumable=True, debug=bool(context.obj)):
        settings = _within(options.read_recipe(recipe, context.params), context.params)
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


def _within(settings: "Recipe", given: Mapping[str, Any]) -> "Recipe":
    """The recipe with as much calibration text as a run in the time that --within names bears; with that of the run
    that was begun, if there is one. ``given``: the command's arguments and options."""
    asked = given["within"]
    if asked is None:
        return settings
    from leangrid.errors import RecipeError
    from leangrid.planning import within
    from leangrid.report.units import format_duration

    seconds = within.read_duration(asked)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        what = "each of several processes would choose for itself"
        raise RecipeError(what, "--within", "Give --samples and --length; leangrid plan --within names them")
    begun = "out" in given and not given["restart"] and within.tokens_of_unfinished_run(given["out"], settings)
    if begun:
        return begun
    chosen, planned = within.choose_tokens(
        given["source"], settings, seconds, given["threads"], given["device"], shape=given.get("shape")
    )
    if not given["quiet"]:
        tokens = f"--samples {chosen.samples} --length {chosen.length}"
        say(f"--within {asked}: {tokens}, about {format_duration(planned)} by the plan")
    return chosen


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
    within: options.Within = None,
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
        settings = _within(options.read_recipe(recipe, context.params), context.params)
        from leangrid.machine.memory import without_garbage_collection
        from leangrid.report.text import plan_summary

        with without_garbage_collection():  # of what is imported, too
            from leangrid.planning.plan import plan as estimate

            values = estimate(source, settings, threads=threads, device=device, shape=shape).to_dict()
        emit_json(values) if as_json else emit(plan_summary(values))
