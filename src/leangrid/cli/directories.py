"""``export``, ``report`` and ``verify``: what is done with the directory of a finished result."""

from pathlib import Path
from typing import Annotated

import typer

from leangrid.cli import options
from leangrid.cli.exits import BAD_INPUT, emit, emit_json, outcome, say
from leangrid.cli.progress_bar import Terminal


def export(
    context: typer.Context,
    model: Annotated[str, typer.Argument(help="a finished result of quantize or export", show_default=False)],
    out: Annotated[Path, typer.Argument(help="directory to make", show_default=False)],
    to: Annotated[
        str,
        typer.Option(
            "--to",
            metavar="FORMAT",
            help="compressed-tensors gptq gptq_v1 awq lut mlx gguf onnx dense",
            show_default=False,
        ),
    ],
    like: Annotated[
        Path | None, typer.Option(metavar="FILE.gguf", help="take the metadata of this file (gguf)")
    ] = None,
    overwrite: options.Overwrite = False,
    as_json: options.AsJson = False,
    quiet: options.Quiet = False,
) -> None:
    """The same codes in another engine's container: exact, or refused by name before anything is written.

    \b
    leangrid export out out-gptq --to gptq
    leangrid export out out-dense --to dense     a plain checkpoint
    """
    with outcome(quiet, debug=bool(context.obj)):
        from leangrid.exporters.export import export as run
        from leangrid.report.text import export_summary

        with Terminal(quiet=quiet) as terminal:
            values = run(model, out, to, like, overwrite=overwrite, progress=terminal).to_dict()
        emit_json(values) if as_json else emit(export_summary(values))


def report(
    context: typer.Context,
    directory: Annotated[Path, typer.Argument(help="a result of quantize or export", show_default=False)],
    open_: Annotated[bool, typer.Option("--open", help="show it in the browser")] = False,
    as_json: options.AsJson = False,
    quiet: options.Quiet = False,
) -> None:
    """Write DIR/report.html again: one file with what the run did, what it cost and how near it came.

    \b
    leangrid report out --open
    """
    with outcome(quiet, debug=bool(context.obj)):
        from leangrid.report.views import rewrite_report

        path = rewrite_report(directory)
        emit_json({"directory": str(directory), "report": str(path)}) if as_json else emit(str(path))
        if open_ and typer.launch(path.absolute().as_uri()) != 0:
            say("no browser opened; the file is written")


def verify(
    context: typer.Context,
    directory: Annotated[Path, typer.Argument(help="a result of quantize", show_default=False)],
    as_json: options.AsJson = False,
    quiet: options.Quiet = False,
) -> None:
    """Every file against manifest.json: exit 0, or 2 and a list of what differs.

    \b
    leangrid verify out
    """
    with outcome(quiet, debug=bool(context.obj)):
        from leangrid.storage.verified import verify as run

        found = run(directory)
        if as_json:
            emit_json({"directory": str(directory), "verified": bool(found), "differences": found.differences})
        else:
            emit(str(found))
        if not found:
            raise typer.Exit(BAD_INPUT)
