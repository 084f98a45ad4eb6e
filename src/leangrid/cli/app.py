"""The command line. Each command reads its options, makes one call and prints what came back: the result on stdout,
everything else on stderr."""

from typing import Annotated

import typer

from leangrid.cli import directories, measurements, runs
from leangrid.cli.exits import Command, Commands, emit

app = typer.Typer(
    cls=Commands,
    no_args_is_help=True,
    invoke_without_command=True,  # for --version
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"max_content_width": 120, "help_option_names": ["-h", "--help"]},
)


@app.callback()
def _options(
    context: typer.Context,
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
    context.obj = debug  # every command reads it
    if version:
        from leangrid import __version__

        emit(__version__)
        raise typer.Exit


# In the order in which the help lists them.
for name, command in {
    "quantize": runs.quantize,
    "plan": runs.plan,
    "eval": measurements.evaluate,
    "export": directories.export,
    "generate": measurements.generate,
    "report": directories.report,
    "compare": measurements.compare,
    "verify": directories.verify,
}.items():
    app.command(name, cls=Command)(command)


def main() -> None:
    """The console script."""
    app(prog_name="leangrid")
