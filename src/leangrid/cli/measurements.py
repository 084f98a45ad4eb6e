"""``eval``, ``compare`` and ``generate``: how near a result is to its original, and what it says."""

from pathlib import Path
from typing import Annotated

import typer

from leangrid.cli import options
from leangrid.cli.exits import STOPPED, emit, emit_json, outcome, say
from leangrid.cli.progress_bar import Terminal


def evaluate(
    context: typer.Context,
    model: options.Measured,
    reference: Annotated[
        str | None, typer.Option(metavar="SOURCE", help="the original: adds KL and top-1 agreement")
    ] = None,
    text: options.Text = None,
    text_field: options.TextField = None,
    length: options.WindowLength = None,
    windows: options.Windows = 12,
    keep: Annotated[
        bool, typer.Option("--keep", help="add the figures to MODEL: its manifest, model card and report")
    ] = False,
    tasks: options.Tasks = None,
    tasks_dir: options.TasksDir = None,
    limit: options.Limit = None,
    batch_size: options.BatchSize = 16,
    judge_url: options.JudgeUrl = None,
    judge_model: options.JudgeModel = "gpt-4o-2024-05-13",
    out: options.TasksOut = None,
    device: options.Device = "cpu",
    threads: options.Threads = None,
    as_json: options.AsJson = False,
    quiet: options.Quiet = False,
) -> None:
    """Perplexity; with --reference also KL(reference || model) per token and top-1 agreement. Encoders: embedding
    distance. Tasks.

    \b
    leangrid eval out --reference ./model --text wiki.test.raw --keep
    leangrid eval out --text wikitext2 --length 2048 --windows 128 --json
    leangrid eval out --tasks arc_easy,hellaswag,mmlu --out results.json
    """
    with outcome(quiet, resumable=out is not None, debug=bool(context.obj), finished="finished tasks"):
        options.use_threads(threads)
        from leangrid import evaluation
        from leangrid.report.text import eval_summary
        from leangrid.report.views import add_evaluation
        from leangrid.storage.manifest import require_unchanged

        if keep:  # refused before the work
            require_unchanged(Path(model))
        settings = {"directory": tasks_dir, "limit": limit, "batch_size": batch_size, "out": out,
                    "judge_url": judge_url, "judge_model": judge_model}  # fmt: skip
        chosen = None if tasks is None else evaluation.Tasks.parse(tasks, **settings)
        with Terminal(quiet=quiet) as terminal:
            found = evaluation.evaluate(model, reference, text, length=length, windows=windows, device=device,
                                        tasks=chosen, progress=terminal, text_field=text_field)  # fmt: skip
        values = found.to_dict()
        failed = {name: figures["error"] for name, figures in found.tasks.items() if "error" in figures}
        if keep and not failed:
            add_evaluation(Path(model), values)
        emit_json(values) if as_json else emit(eval_summary(values))
        for name, why in failed.items():
            say(f"error: task {name}: {why}")
        if failed:
            raise typer.Exit(STOPPED)


def compare(
    context: typer.Context,
    directories: Annotated[list[Path], typer.Argument(help="results of quantize or export", show_default=False)],
    reference: Annotated[
        str | None, typer.Option(metavar="SOURCE", help="the original: measures all of them on --text")
    ] = None,
    text: Annotated[str, typer.Option(help="wikitext2, c4, embedded, or as --calibration of quantize")] = "wikitext2",
    text_field: options.TextField = None,
    length: options.WindowLength = None,
    windows: options.Windows = 12,
    plot: Annotated[
        Path | None, typer.Option(metavar="FILE.html", help="size against KL, with the table, as one page")
    ] = None,
    device: options.Device = "cpu",
    threads: options.Threads = None,
    as_json: options.AsJson = False,
    quiet: options.Quiet = False,
) -> None:
    """Several results side by side: size, bits, losses, perplexity, KL, time; a star where no other is smaller and
    nearer.

    \b
    leangrid compare out-nu4 out-nu3 --plot compare.html                what eval --keep or the quality gate measured
    leangrid compare out-nu4 out-nu3 --reference ./model --text wiki.test.raw
    """
    with outcome(quiet, debug=bool(context.obj)):
        options.use_threads(threads)
        from leangrid.evaluation.compare import compare as run
        from leangrid.report.text import comparison_summary

        with Terminal(quiet=quiet) as terminal:
            found = run(directories, reference, text, length=length, windows=windows, plot=plot, device=device,
                        progress=terminal, text_field=text_field)  # fmt: skip
        values = found.to_dict()
        emit_json(values) if as_json else emit(comparison_summary(values))


def generate(
    context: typer.Context,
    model: Annotated[str, typer.Argument(help="a result or a checkpoint directory", show_default=False)],
    prompt: Annotated[str, typer.Argument(help="what to say to it", show_default=False)],
    max_new_tokens: Annotated[int, typer.Option(metavar="N", min=1, help="stop after so many")] = 128,
    temperature: Annotated[float, typer.Option(metavar="X", min=0, help="0 takes the likeliest token")] = 0.0,
    seed: Annotated[int, typer.Option(metavar="N", min=0, max=2**63 - 1, help="of the draws")] = 0,
    raw: Annotated[bool, typer.Option("--raw", help="continue the prompt as it is, without the chat template")] = False,
    device: options.Device = "cpu",
    threads: options.Threads = None,
    as_json: options.AsJson = False,
    quiet: options.Quiet = False,
) -> None:
    """Stream a reply through our own layers: a person's first check.

    \b
    leangrid generate out "Why is the sky blue?"
    leangrid generate out "Once upon a time" --raw --temperature 0.8
    """
    with outcome(quiet, debug=bool(context.obj)):
        options.use_threads(threads)
        from leangrid.evaluation.reply import Reply

        reply = Reply.open(model, prompt, device, raw=raw)
        for piece in reply.stream_text(max_new_tokens, temperature, seed):
            if not as_json:
                emit(piece, end="")
        emit_json(reply.to_dict()) if as_json else emit("")
        if not (quiet or as_json):
            say(f"{reply.tokens} tokens, {reply.tokens_per_second:.1f} a second")
        if not reply.tokens and not quiet:
            say("the model ended its reply at once; --raw continues the prompt as it is, without the chat template")
