"""The recipes that a scheme is compared with, by name: the defaults, parts switched off, the paper's procedure."""

from leangrid.recipe import Recipe
from leangrid.schemes import Scheme

# The paper's procedure, its grid searched to the optimum; its own search is Lloyd's iteration.
_PAPER = {"correct": "0", "refine": "0", "p": "4", "guard": "false"}
KNOWN: dict[str, dict[str, str]] = {
    "default": {},
    "nocorrect": {"correct": "0"},
    "norefine": {"refine": "0"},
    "neither": {"correct": "0", "refine": "0"},
    "fast": {"effort": "fast"},
    "best": {"effort": "best"},
    "paper": _PAPER,
    "paper-lloyd": _PAPER | {"search": "lloyd"},
}
# Fields of the learned grid: they do nothing to a baseline, whose variants would be the same run under several names.
_GRID_FIELDS = {"p", "steps", "search", "guard"}


def parse(texts: list[str]) -> dict[str, dict[str, str]]:
    """Name -> recipe fields, from texts such as ``default,paper`` (names of KNOWN) and
    ``quarter:correct=0.25,refine=2``."""
    found: dict[str, dict[str, str]] = {}
    for text in texts:
        name, colon, fields = text.partition(":")
        if colon:
            if name in KNOWN or not fields or not all("=" in field for field in fields.split(",")):
                raise SystemExit(
                    f"'{text}': write NAME:FIELD=VALUE,FIELD=VALUE with a name that is not one of {', '.join(KNOWN)}"
                )
            found[name] = dict(field.split("=", 1) for field in fields.split(","))  # type: ignore[misc]
            continue
        for known in filter(None, text.split(",")):
            if known not in KNOWN:
                raise SystemExit(f"'{known}' is no variant: {', '.join(KNOWN)}, or NAME:FIELD=VALUE,...")
            found[known] = KNOWN[known]
    return found


def does(recipe: Recipe) -> str:
    """A text that is equal for two resolved recipes that give the same result."""
    ignored = _GRID_FIELDS if Scheme.parse(recipe.scheme).method != "leanquant" else set()
    ignored = ignored | {"effort"} | ({"search"} if recipe.parsed.grid != "nonuniform" else {"steps"})
    return recipe.model_dump_json(exclude=ignored)
