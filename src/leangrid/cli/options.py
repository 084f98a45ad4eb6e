"""The arguments and options that commands share, and how their values are read."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from leangrid.errors import RecipeError

if TYPE_CHECKING:
    from leangrid.recipe import Recipe

# What quantize and plan take for a recipe: an option has the name of its field.
RecipeFile = Annotated[
    Path | None, typer.Option("--recipe", metavar="FILE.toml", help="settings from a file; options win over it")
]
Scheme = Annotated[
    str | None, typer.Option(help="W4A16_G64 in groups, W4A16 whole rows, NU4 NU3 NU2 non-uniform, _SYM, _EXACT [auto]")
]
Bits = Annotated[float | None, typer.Option(metavar="X", help="mean bits a weight (4.25); each layer's by data")]
Size = Annotated[str | None, typer.Option(metavar="5GB", help="the same by the size of the whole directory")]
Format = Annotated[str | None, typer.Option(help="compressed-tensors, lut, gptq, awq, mlx, gguf [by scheme]")]
Calibration = Annotated[str | None, typer.Option(help="c4, wikitext2, self, embedded, a file, hf:org/name [c4]")]
TextField = Annotated[
    str | None, typer.Option(metavar="NAME", help="column of its rows [text; chats by their template]")
]
Samples = Annotated[int | None, typer.Option(metavar="N", help="calibration windows [128]")]
Length = Annotated[int | None, typer.Option(metavar="N", help="tokens a window [2048]")]
Within = Annotated[str | None, typer.Option(metavar="TIME", help="instead of --samples: what 30m or 2h bear")]
Seed = Annotated[int | None, typer.Option(metavar="N", help="chooses the windows [0]")]
Effort = Annotated[
    str | None,
    typer.Option(help="fast (the paper), good, or best: it tunes [good]"),
]
P = Annotated[float | None, typer.Option(metavar="X", help="exponent of loss-error weights [NU 4, affine 2]")]
Steps = Annotated[int | None, typer.Option(metavar="T", help="steps of the affine search [2048]")]
Correct = Annotated[str | None, typer.Option(metavar="X", help="share of the inputs' error to correct, or auto [0.5]")]
Refine = Annotated[int | None, typer.Option(metavar="N", help="rounds of refit after the sweep; 0 is the paper [1]")]
Finish = Annotated[int | None, typer.Option(metavar="N", help="passes of tuning the whole model's grids [0]")]
Guide = Annotated[int | None, typer.Option(metavar="N", help="gradients a token that guide tuning; 0: none [0]")]
Tune = Annotated[int | None, typer.Option(metavar="N", help="passes of block tuning by gradient; 0: none [0]")]
Ignore = Annotated[
    list[str] | None, typer.Option(metavar="PATTERN", help="linears that stay: '*.down_proj', re:REGEX; repeat")
]
Only = Annotated[
    list[str] | None, typer.Option(metavar="PATTERN", help="quantize these alone, even '*.x_proj'; repeat")
]
Damping = Annotated[float | None, typer.Option(metavar="X", help="added to diag H, in units of its mean [0.01]")]

# Of quantize alone.
Source = Annotated[
    str,
    typer.Argument(
        help="checkpoint directory, hub id org/name[@revision], stream:org/name, or .gguf file", show_default=False
    ),
]
Out = Annotated[Path, typer.Argument(help="directory to make; called OUT.partial until complete", show_default=False)]
Restart = Annotated[bool, typer.Option("--restart", help="throw an unfinished run away")]
MaxRescued = Annotated[str, typer.Option(metavar="SHARE", help="more rescued layers than this: exit 4")]
MaxKl = Annotated[
    float | None,
    typer.Option(metavar="X", help="KL from the original above it: exit 4; encoders: 1 - cosine [by bits]"),
]
StateDir = Annotated[Path | None, typer.Option(metavar="DIR", help="for the states between blocks [OUT.partial]")]

# Of plan alone.
PlannedSource = Annotated[str | None, typer.Argument(help="as for quantize; or --shape", show_default=False)]
Shape = Annotated[
    str | None, typer.Option(metavar="NAME", help="llama-3.1-405b, ... or a config.json: no weights needed")
]
PlannedDevice = Annotated[str, typer.Option(help="cpu, cuda, or devices you do not have: h200, 2x48GB, 80GB@67TF")]

# Of the commands that measure: eval and compare.
Measured = Annotated[
    str, typer.Argument(help="a result, a checkpoint directory, a hub id or a .gguf file", show_default=False)
]
Text = Annotated[
    str | None,
    typer.Option(
        help="wikitext2, c4, embedded, or as --calibration [wikitext2; with --tasks none]", show_default=False
    ),
]
WindowLength = Annotated[int | None, typer.Option(metavar="N", help="tokens a window [1024, or what the model takes]")]
Windows = Annotated[int, typer.Option(metavar="N", help="windows, from the start of the text")]
Tasks = Annotated[
    str | None, typer.Option(metavar="NAMES", help="arc_easy,mmlu,... of lm-evaluation-harness; sts, squad, mt_bench")
]
TasksDir = Annotated[Path | None, typer.Option(metavar="DIR", help="the tasks' yaml and data files [the hub]")]
Limit = Annotated[int | None, typer.Option(metavar="N", help="documents of each task [all]")]
BatchSize = Annotated[int, typer.Option(metavar="N", help="rows of a forward pass of tasks")]
JudgeUrl = Annotated[str | None, typer.Option(metavar="URL", help="API that rates mt_bench; key: LEANGRID_JUDGE_KEY")]
JudgeModel = Annotated[str, typer.Option(metavar="NAME", help="of the judge")]
TasksOut = Annotated[
    Path | None, typer.Option(metavar="FILE", help="keeps each finished task; the same command goes on")
]

# Of several commands.
Overwrite = Annotated[bool, typer.Option("--overwrite", help="replace OUT if it is a result of ours")]
Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:1", show_default=False)]
Threads = Annotated[int | None, typer.Option(metavar="N", min=1, help="CPU threads [all]")]
AsJson = Annotated[bool, typer.Option("--json", help="one JSON object on stdout")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="no progress, no notices")]


def read_recipe(file: Path | None, options: Mapping[str, Any]) -> "Recipe":
    """The recipe of a file, or of the defaults, with those of ``options`` (all of a command's, by name) that are fields
    of a recipe and were given."""
    from leangrid.recipe import Recipe

    given = {name: options[name] for name in Recipe.model_fields if options.get(name) not in (None, [], ())}
    return Recipe(**given) if file is None else Recipe.from_file(file, **given)


def read_share(text: str) -> float:
    """ "1%" or "0.01" as 0.01; RecipeError for anything outside 0 to 1."""
    try:
        value = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 1:
        raise RecipeError(f"'{text}' is no share", "--max-rescued", "Use 1% or 0.01")
    return value


def check_limit(value: float | None) -> float | None:
    """A limit that is 0 or more, or None; RecipeError otherwise."""
    if value is not None and not value >= 0:
        raise RecipeError(f"{value} is no limit", "--max-kl", "Use a number such as 0.5, or inf for none")
    return value


def use_threads(threads: int | None) -> None:
    """Let torch use so many CPU threads; None imports nothing and changes nothing."""
    if threads is not None:
        from leangrid.machine.devices import set_threads

        set_threads(threads)
