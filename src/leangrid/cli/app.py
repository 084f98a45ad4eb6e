"""The command line: parse, make one call, print what came back. stdout carries the result, stderr everything else."""

import os
from pathlib import Path
from typing import Annotated, Any

import typer

from leangrid.cli.exits import BAD_INPUT, STOPPED, Commands, emit, emit_json, outcome, say
from leangrid.cli.progress_bar import Terminal
from leangrid.errors import RecipeError
from leangrid.report.text import comparison_summary, eval_summary, export_summary, plan_summary, quantize_summary

_WIDE = {"max_content_width": 120, "help_option_names": ["-h", "--help"]}
app = typer.Typer(
    cls=Commands,
    no_args_is_help=True,
    invoke_without_command=True,  # for --version
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings=_WIDE,
)

Source = Annotated[
    str,
    typer.Argument(
        help="checkpoint directory, hub id org/name[@revision], stream:org/name, or .gguf file", show_default=False
    ),
]
Scheme = Annotated[
    str | None, typer.Option(help="W4A16_G64 in groups, W4A16 whole rows, NU4 NU3 NU2 non-uniform, _SYM, _EXACT [auto]")
]
RecipeFile = Annotated[
    Path | None, typer.Option("--recipe", metavar="FILE.toml", help="settings from a file; options win over it")
]
FormatName = Annotated[
    str | None, typer.Option("--format", help="compressed-tensors, lut, gptq, awq or mlx [by scheme]")
]
Calibration = Annotated[str | None, typer.Option(help="c4, wikitext2, self, embedded, a file, hf:org/name [c4]")]
TextField = Annotated[
    str | None, typer.Option(metavar="NAME", help="column of its rows [text; chats by their template]")
]
Samples = Annotated[int | None, typer.Option(metavar="N", help="calibration windows [128]")]
Length = Annotated[int | None, typer.Option(metavar="N", help="tokens a window [2048]")]
Seed = Annotated[int | None, typer.Option(metavar="N", help="chooses the windows [0]")]
P = Annotated[float | None, typer.Option(metavar="X", help="exponent of loss-error weights [4 non-uniform, 2 affine]")]
Steps = Annotated[int | None, typer.Option(metavar="T", help="steps of the affine search [2048]")]
Correct = Annotated[
    float | None, typer.Option(metavar="X", help="share of the inputs' error to correct; 0 is the paper [0.5]")
]
Refine = Annotated[int | None, typer.Option(metavar="N", help="rounds of refit after the sweep; 0 is the paper [1]")]
Damping = Annotated[float | None, typer.Option(metavar="X", help="added to diag H, in units of its mean [0.01]")]
Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:1", show_default=False)]
Threads = Annotated[int | None, typer.Option(metavar="N", min=1, help="CPU threads [all]")]
AsJson = Annotated[bool, typer.Option("--json", help="one JSON object on stdout")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="no progress, no notices")]

_debug = False


@app.callback()
def _options(
    version: Annotated[bool, typer.Option("--version", help="print the version")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="tracebacks for every error")] = False,
) -> None:
    """LLM weights on learned grids: a checkpoint in, a quarter of the bytes out, the same model.

    \b
    leangrid plan org/name --scheme NU4        what it would cost
    leangrid quantize org/name out             the main job
    leangrid eval out --reference org/name     how near it came
    leangrid report out --open                 what it did, as a page
    leangrid export out out-dense --to dense   for another engine
    leangrid generate out "Why is the sky blue?"
    """
    global _debug
    _debug = debug
    if version:
        from leangrid import __version__

        emit(__version__)
        raise typer.Exit


@app.command()
def quantize(
    source: Source,
    out: Annotated[
        Path, typer.Argument(help="directory to make; called OUT.partial until complete", show_default=False)
    ],
    scheme: Scheme = None,
    recipe: RecipeFile = None,
    format_: FormatName = None,
    calibration: Calibration = None,
    text_field: TextField = None,
    samples: Samples = None,
    length: Length = None,
    seed: Seed = None,
    p: P = None,
    steps: Steps = None,
    correct: Correct = None,
    refine: Refine = None,
    damping: Damping = None,
    device: Device = "cpu",
    threads: Threads = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="replace OUT if it is a result of ours")] = False,
    restart: Annotated[bool, typer.Option("--restart", help="throw an unfinished run away")] = False,
    max_rescued: Annotated[str, typer.Option(metavar="SHARE", help="more rescued layers than this: exit 4")] = "1%",
    max_kl: Annotated[
        float | None,
        typer.Option(metavar="X", help="KL from the original above it: exit 4; encoders: 1 - cosine [by bits]"),
    ] = None,
    state_dir: Annotated[
        Path | None, typer.Option(metavar="DIR", help="for the states between blocks [OUT.partial]")
    ] = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Quantize a checkpoint. Stopped at any moment, the same command resumes.

    \b
    leangrid quantize ./model out --scheme NU4
    leangrid quantize org/name out --scheme W4A16_G64 --calibration my.jsonl --samples 128
    leangrid quantize model.gguf out --calibration self        no data, no network
    """
    with outcome(quiet, resumable=True, debug=_debug):
        settings = _recipe(
            recipe,
            scheme=scheme,
            format=format_,
            calibration=calibration,
            text_field=text_field,
            samples=samples,
            length=length,
            seed=seed,
            p=p,
            steps=steps,
            correct=correct,
            refine=refine,
            damping=damping,
        )
        limit = share(max_rescued)
        distance = positive(max_kl)
        from leangrid.run.quality_gate import verdict
        from leangrid.run.quantize import quantize as run

        follows = os.environ.get("RANK", "0") != "0"  # rank 0 alone speaks
        with Terminal(quiet=quiet or follows) as terminal:
            result = run(
                source,
                out,
                settings,
                device=device,
                threads=threads,
                overwrite=overwrite,
                restart=restart,
                max_rescued=limit,
                max_kl=distance,
                state_dir=state_dir,
                progress=terminal,
            )
        if follows:
            raise typer.Exit(result.exit_code)
        values = result.to_json()
        emit_json(values) if as_json else emit(quantize_summary(values))
        if result.exit_code:
            if result.too_many_rescues:
                say(f"finished, but more than {max_rescued} of the layers needed a rescue: see {out / 'records.jsonl'}")
            if not result.quality["passed"]:
                say(f"finished, but {verdict(result.quality)}")
            raise typer.Exit(result.exit_code)


@app.command()
def plan(
    source: Annotated[str | None, typer.Argument(help="as for quantize; or --shape", show_default=False)] = None,
    shape: Annotated[
        str | None, typer.Option(metavar="NAME", help="llama-3.1-405b, ... or a config.json: no weights needed")
    ] = None,
    scheme: Scheme = None,
    recipe: RecipeFile = None,
    format_: FormatName = None,
    calibration: Calibration = None,
    text_field: TextField = None,
    samples: Samples = None,
    length: Length = None,
    seed: Seed = None,
    p: P = None,
    steps: Steps = None,
    correct: Correct = None,
    refine: Refine = None,
    damping: Damping = None,
    device: Annotated[str, typer.Option(help="cpu, cuda, or devices you do not have: 2x48GB, 80GB@67TF")] = "cpu",
    threads: Threads = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """What quantize would do and cost, from the headers alone. Exit 2 if it cannot fit.

    \b
    leangrid plan ./model --scheme NU3 --samples 64
    leangrid plan --shape llama-3.1-405b --device 2x48GB
    """
    with outcome(quiet, debug=_debug):
        settings = _recipe(
            recipe,
            scheme=scheme,
            format=format_,
            calibration=calibration,
            text_field=text_field,
            samples=samples,
            length=length,
            seed=seed,
            p=p,
            steps=steps,
            correct=correct,
            refine=refine,
            damping=damping,
        )
        from leangrid.planning.plan import plan as estimate

        values = estimate(source, settings, threads=threads, device=device, shape=shape).to_json()
        emit_json(values) if as_json else emit(plan_summary(values))


@app.command("eval")
def evaluate_(
    model: Annotated[
        str, typer.Argument(help="a result, a checkpoint directory, a hub id or a .gguf file", show_default=False)
    ],
    reference: Annotated[
        str | None, typer.Option(metavar="SOURCE", help="the original: adds KL and top-1 agreement")
    ] = None,
    text: Annotated[
        str | None,
        typer.Option(
            help="wikitext2, c4, embedded, or as --calibration [wikitext2; with --tasks none]", show_default=False
        ),
    ] = None,
    text_field: TextField = None,
    length: Annotated[
        int | None, typer.Option(metavar="N", help="tokens a window [1024, or what the model takes]")
    ] = None,
    windows: Annotated[int, typer.Option(metavar="N", help="windows, from the start of the text")] = 12,
    keep: Annotated[
        bool, typer.Option("--keep", help="add the figures to MODEL: its manifest, model card and report")
    ] = False,
    tasks: Annotated[
        str | None,
        typer.Option(metavar="NAMES", help="arc_easy,mmlu,... of lm-evaluation-harness; sts, squad, mt_bench"),
    ] = None,
    tasks_dir: Annotated[
        Path | None, typer.Option(metavar="DIR", help="the tasks' yaml and data files [the hub]")
    ] = None,
    limit: Annotated[int | None, typer.Option(metavar="N", help="documents of each task [all]")] = None,
    batch_size: Annotated[int, typer.Option(metavar="N", help="rows of a forward pass of tasks")] = 16,
    judge_url: Annotated[
        str | None, typer.Option(metavar="URL", help="API that rates mt_bench; key: LEANGRID_JUDGE_KEY")
    ] = None,
    judge_model: Annotated[str, typer.Option(metavar="NAME", help="of the judge")] = "gpt-4o-2024-05-13",
    out: Annotated[
        Path | None, typer.Option(metavar="FILE", help="keeps each finished task; the same command goes on")
    ] = None,
    device: Device = "cpu",
    threads: Threads = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Perplexity; with --reference also KL(reference || model) per token and top-1 agreement. Encoders: embedding
    distance. Tasks.

    \b
    leangrid eval out --reference ./model --text wiki.test.raw --keep
    leangrid eval out --text wikitext2 --length 2048 --windows 128 --json
    leangrid eval out --tasks arc_easy,hellaswag,mmlu --out results.json
    """
    with outcome(quiet, resumable=out is not None, debug=_debug, kept="finished tasks"):
        _use_threads(threads)
        from leangrid.evaluation import Tasks, evaluate
        from leangrid.report.views import keep as keep_in
        from leangrid.storage.writer import require_sound

        if keep:  # refused before the work
            require_sound(Path(model))
        chosen = (
            None
            if tasks is None
            else Tasks.parse(
                tasks,
                directory=tasks_dir,
                limit=limit,
                batch_size=batch_size,
                out=out,
                judge_url=judge_url,
                judge_model=judge_model,
            )
        )
        with Terminal(quiet=quiet) as terminal:
            values = evaluate(
                model,
                reference,
                text,
                length=length,
                windows=windows,
                device=device,
                tasks=chosen,
                progress=terminal,
                text_field=text_field,
            )
        failed = {name: found["error"] for name, found in values["tasks"].items() if "error" in found}
        if keep and not failed:
            keep_in(Path(model), values)
        emit_json(values) if as_json else emit(eval_summary(values))
        for name, why in failed.items():
            say(f"error: task {name}: {why}")
        if failed:
            raise typer.Exit(STOPPED)


@app.command()
def export(
    model: Annotated[str, typer.Argument(help="a finished result of quantize or export", show_default=False)],
    out: Annotated[Path, typer.Argument(help="directory to make", show_default=False)],
    to: Annotated[
        str,
        typer.Option(
            "--to", metavar="FORMAT", help="compressed-tensors gptq gptq_v1 awq lut dense", show_default=False
        ),
    ],
    like: Annotated[
        Path | None, typer.Option(metavar="FILE.gguf", help="take the metadata of this file (gguf)")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="replace OUT if it is a result of ours")] = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """The same codes in another engine's container: exact, or refused by name before anything is written.

    \b
    leangrid export out out-gptq --to gptq
    leangrid export out out-dense --to dense     a plain checkpoint
    """
    with outcome(quiet, debug=_debug):
        from leangrid.exporters.export import export as run

        with Terminal(quiet=quiet) as terminal:
            values = run(model, out, to, like, overwrite=overwrite, progress=terminal).to_json()
        emit_json(values) if as_json else emit(export_summary(values))


@app.command()
def generate(
    model: Annotated[str, typer.Argument(help="a result or a checkpoint directory", show_default=False)],
    prompt: Annotated[str, typer.Argument(help="what to say to it", show_default=False)],
    max_new_tokens: Annotated[int, typer.Option(metavar="N", min=1, help="stop after so many")] = 128,
    temperature: Annotated[float, typer.Option(metavar="X", min=0, help="0 takes the likeliest token")] = 0.0,
    seed: Annotated[int, typer.Option(metavar="N", min=0, max=2**63 - 1, help="of the draws")] = 0,
    raw: Annotated[bool, typer.Option("--raw", help="continue the prompt as it is, without the chat template")] = False,
    device: Device = "cpu",
    threads: Threads = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Stream a reply through our own layers: a person's first check.

    \b
    leangrid generate out "Why is the sky blue?"
    leangrid generate out "Once upon a time" --raw --temperature 0.8
    """
    with outcome(quiet, debug=_debug):
        _use_threads(threads)
        from leangrid.evaluation.reply import Reply

        reply = Reply.open(model, prompt, device, raw=raw)
        for piece in reply.pieces(max_new_tokens, temperature, seed):
            if not as_json:
                emit(piece, end="")
        emit_json(reply.to_json()) if as_json else emit("")
        if not (quiet or as_json):
            say(f"{reply.tokens} tokens, {reply.tokens_per_second:.1f} a second")
        if not reply.tokens and not quiet:
            say("the model ended its reply at once; --raw continues the prompt as it is, without the chat template")


@app.command()
def report(
    directory: Annotated[Path, typer.Argument(help="a result of quantize or export", show_default=False)],
    open_: Annotated[bool, typer.Option("--open", help="show it in the browser")] = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Write DIR/report.html again: one file with what the run did, what it cost and how near it came.

    \b
    leangrid report out --open
    """
    with outcome(quiet, debug=_debug):
        from leangrid.report.views import rewrite

        path = rewrite(directory)
        emit_json({"directory": str(directory), "report": str(path)}) if as_json else emit(str(path))
        if open_ and typer.launch(path.absolute().as_uri()) != 0:
            say("no browser opened; the file is written")


@app.command()
def compare(
    directories: Annotated[list[Path], typer.Argument(help="results of quantize or export", show_default=False)],
    reference: Annotated[
        str | None, typer.Option(metavar="SOURCE", help="the original: measures all of them on --text")
    ] = None,
    text: Annotated[str, typer.Option(help="wikitext2, c4, embedded, or as --calibration of quantize")] = "wikitext2",
    text_field: TextField = None,
    length: Annotated[
        int | None, typer.Option(metavar="N", help="tokens a window [1024, or what the model takes]")
    ] = None,
    windows: Annotated[int, typer.Option(metavar="N", help="windows, from the start of the text")] = 12,
    plot: Annotated[
        Path | None, typer.Option(metavar="FILE.html", help="size against KL, with the table, as one page")
    ] = None,
    device: Device = "cpu",
    threads: Threads = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Several results side by side: size, bits, losses, perplexity, KL, time; a star where no other is smaller and
    nearer.

    \b
    leangrid compare out-nu4 out-nu3 --plot compare.html                what eval --keep or the quality gate measured
    leangrid compare out-nu4 out-nu3 --reference ./model --text wiki.test.raw
    """
    with outcome(quiet, debug=_debug):
        _use_threads(threads)
        from leangrid.evaluation.compare import compare as run

        with Terminal(quiet=quiet) as terminal:
            values = run(
                directories,
                reference,
                text,
                length=length,
                windows=windows,
                plot=plot,
                device=device,
                progress=terminal,
                text_field=text_field,
            )
        emit_json(values) if as_json else emit(comparison_summary(values))


@app.command()
def verify(
    directory: Annotated[Path, typer.Argument(help="a result of quantize", show_default=False)],
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Every file against manifest.json: exit 0, or 2 and a list of what differs.

    \b
    leangrid verify out
    """
    with outcome(quiet, debug=_debug):
        from leangrid.storage.verified import verify as compare

        found = compare(directory)
        if as_json:
            emit_json({"directory": str(directory), "verified": bool(found), "differences": found.differences})
        else:
            emit(str(found))
        if not found:
            raise typer.Exit(BAD_INPUT)


def share(text: str) -> float:
    """ "1%" or "0.01" as 0.01; RecipeError for anything outside 0..1."""
    try:
        value = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 1:
        raise RecipeError(f"'{text}' is no share", "--max-rescued", "Use 1% or 0.01")
    return value


def positive(value: float | None) -> float | None:
    """A limit that is 0 or more; RecipeError otherwise."""
    if value is not None and not value >= 0:
        raise RecipeError(f"{value} is no limit", "--max-kl", "Use a number such as 0.5, or inf for none")
    return value


def _recipe(file: Path | None, **options: Any) -> Any:
    """The recipe from a file, defaults and the options that were given."""
    from leangrid.recipe import Recipe

    given = {name: value for name, value in options.items() if value is not None}
    return Recipe.build(**given) if file is None else Recipe.from_file(file, **given)


def _use_threads(threads: int | None) -> None:
    if threads is not None:
        from leangrid.machine.devices import use_threads

        use_threads(threads)


def main() -> None:
    """The console script."""
    app(prog_name="leangrid")
