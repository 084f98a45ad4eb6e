"""Writes the generated tables of README.md, docs and experiments from the committed result lines, so that no number in
them is typed.

    # rewrites the pages
    python benchmarks/table.py
    # exit 1 where a table is not up to date
    python benchmarks/table.py --check

A table stands between two comments; the first says which file, which lines and which columns. A list has one row for
each line:

    <!-- table: quality.jsonl model=SmolLM2-135M-Instruct | scheme, bits_per_weight:.2f, kl_mean:.3f -->
    <!-- end -->

A pivot has one row for each scheme (or whatever its second part names) and one column for each variant; the last part
is what a cell shows, several values with a slash between them. NAME=HEAD gives a column another head:

    <!-- pivot: quality.jsonl model=stories260K | scheme, bits:.2f | variant: default, paper | kl_mean:.3f -->
    <!-- end -->

With a question mark (``table?:``, ``pivot?:``) the lines may be missing: "Not run yet" stands there until they are
measured.

Lines are chosen by equal fields and keep the order of the file. A field inside another is written recipe.p, a value
with spaces in double quotes: machine.cpu="AMD EPYC", several values with commas: scheme=NU4,NU3. A list with a third
part, ``once: engine, scheme``, shows only the last of all lines that agree in these fields. A file lies in
benchmarks/results, or, with a slash in its name, where its path from the project's root says.
"""

import argparse
import json
import re
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PAGES = (
    "README.md",
    "docs/quality.md",
    "docs/serving.md",
    "docs/performance.md",
    "docs/choosing.md",
    "docs/tasks.md",
    "docs/scale.md",
    "docs/distributed.md",
    "docs/moe.md",
    "experiments/README.md",
)
RESULTS = ROOT / "benchmarks" / "results"
MARKER = re.compile(
    r"(?P<open><!-- (?P<kind>table|pivot)(?P<planned>\??): (?P<file>[^\s|>]+)(?P<rest>[^>]*?)-->\n)"
    r".*?(?P<close><!-- end -->)",
    re.DOTALL,
)
Line = dict[str, Any]


class Column:
    """A column, written ``name:format=head``: a field of the line, its format, and the head of the column."""

    def __init__(self, text: str) -> None:
        body, _, head = text.strip().partition("=")
        self.name, _, self.form = body.partition(":")
        self.head = head or self.name.rpartition(".")[2].replace("_", " ")

    def cell(self, line: Line) -> str:
        value = field(line, self.name)
        return "" if value is None else format(value, self.form)


def field(line: Line, name: str) -> Any:
    """``line["a"]["b"]`` for ``a.b``; an element of a list by its number, as in ``a.0``; None where there is none."""
    value: Any = line
    for part in name.split("."):
        if isinstance(value, list):
            value = dict(enumerate(value)).get(int(part)) if part.isdigit() else None
        else:
            value = value.get(part) if isinstance(value, dict) else None
    return value


def read_rows(file: str, where: str, results: Path = RESULTS, planned: bool = False) -> list[Line]:
    """The JSON lines of ``file`` (or the "rows" of a .json file) whose fields equal every ``name=value`` in ``where``.

    SystemExit where there is none, unless the table is ``planned``.
    """
    path = ROOT / file if "/" in file else results / file
    if planned and not path.exists():
        return []
    text = path.read_text(encoding="utf-8")
    wanted = dict(part.split("=", 1) for part in shlex.split(where))
    lines = (
        json.loads(text)["rows"]
        if file.endswith(".json")
        else [json.loads(line) for line in text.splitlines() if line.strip()]
    )
    chosen = [
        line for line in lines if all(str(field(line, name)) in value.split(",") for name, value in wanted.items())
    ]
    if not chosen and not planned:
        raise SystemExit(f"no line of {file} has {where.strip() or 'anything'}")
    return chosen


def list_rows(lines: Sequence[Line], columns: str, once: str = "") -> list[list[str]]:
    """Head and one row a line; with ``once: NAME, NAME`` only the last of all lines that agree in these fields."""
    chosen = [Column(text) for text in columns.split(",")]
    if once:
        word, _, names = once.strip().partition(":")
        if word != "once":
            raise SystemExit(f"cannot read {once.strip()}")
        keys = [name.strip() for name in names.split(",")]
        lines = list({tuple(str(field(line, key)) for key in keys): line for line in lines}.values())
    return [[column.head for column in chosen], *([column.cell(line) for column in chosen] for line in lines)]


def pivot_rows(lines: Sequence[Line], row_columns: str, across: str, values: str) -> list[list[str]]:
    """The head, and one row for each value of the first row column. Where two lines belong in one cell, the later one
    is shown."""
    left, shown = [Column(text) for text in row_columns.split(",")], [Column(text) for text in values.split(",")]
    name, _, names = across.strip().partition(":")
    tops = [Column(text) for text in names.split(",")]
    table = [[column.head for column in left] + [top.head for top in tops]]
    for key in dict.fromkeys(left[0].cell(line) for line in lines):
        here = [line for line in lines if left[0].cell(line) == key]
        found = [[line for line in here if str(field(line, name)) == top.name] for top in tops]
        if any(found):
            first = next(cell[-1] for cell in found if cell)
            cells = [" / ".join(column.cell(cell[-1]) for column in shown) if cell else "" for cell in found]
            table.append([column.cell(first) for column in left] + cells)
    return table


def render(text: str, results: Path = RESULTS) -> str:
    """``text`` with every table written again from the results."""

    def fresh(found: re.Match[str]) -> str:
        where, *parts = found["rest"].split("|")
        if len(parts) not in ((1, 2) if found["kind"] == "table" else (3,)):
            raise SystemExit(f"cannot read {found['open'].strip()}")
        lines = read_rows(found["file"], where, results, bool(found["planned"]))
        if not lines:
            return f"{found['open']}*Not run yet.*\n{found['close']}"
        table = list_rows(lines, *parts) if found["kind"] == "table" else pivot_rows(lines, *parts)
        numeric = (
            [re.fullmatch(r"[-+0-9._,%/ einf]*", cell) is not None for cell in table[1]]
            if len(table) > 1
            else [False] * len(table[0])
        )
        rule = ["---:" if number else "---" for number in numeric]
        body = "\n".join(f"| {' | '.join(cells)} |" for cells in (table[0], rule, *table[1:]))
        return f"{found['open']}{body}\n{found['close']}"

    return MARKER.sub(fresh, text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing; exit 1 where a table is not up to date")
    options = parser.parse_args()
    for page in (ROOT / name for name in PAGES):
        before = page.read_text(encoding="utf-8")
        after = render(before)
        if options.check and after != before:
            sys.exit(f"{page.relative_to(ROOT)} is not up to date: python benchmarks/table.py")
        if after != before:
            page.write_text(after, encoding="utf-8")


if __name__ == "__main__":
    main()
