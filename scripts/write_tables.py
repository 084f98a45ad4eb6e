"""Fill the generated tables of README.md from benchmarks/results: numbers in the README are never typed.

A table stands between two comments; the first says which file, which lines and which columns:

    <!-- table: quality.jsonl model=SmolLM2-135M-Instruct | scheme, bits_per_weight:.2f, kl_mean:.3f -->
    <!-- end -->

Lines are chosen by equal fields and keep the order of the file; a column is a field of the JSON line, with a format if wanted.
"""

import json
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
MARKER = re.compile(r"(?P<open><!-- table: (?P<file>\S+)(?P<where>[^|>]*)\|(?P<columns>[^>]*)-->\n).*?(?P<close><!-- end -->)", re.DOTALL)


def rows(file: str, where: str) -> list[dict]:
    """The JSON lines of ``file`` (or the "rows" of a .json file) whose fields equal every ``name=value`` in ``where``."""
    text = (ROOT / "benchmarks" / "results" / file).read_text(encoding="utf-8")
    wanted = dict(part.split("=", 1) for part in where.split())
    lines = json.loads(text)["rows"] if file.endswith(".json") else [json.loads(line) for line in text.splitlines() if line.strip()]
    return [line for line in lines if all(str(line.get(name)) == value for name, value in wanted.items())]


def cell(line: dict, column: str) -> str:
    name, _, form = column.partition(":")
    value = line.get(name)
    return "" if value is None else format(value, form)


def table(found: re.Match[str]) -> str:
    """The marker with a fresh table inside."""
    columns = [column.strip() for column in found["columns"].split(",")]
    lines = rows(found["file"], found["where"])
    if not lines:
        sys.exit(f"README.md: no line of {found['file']} has{found['where']}")
    heads = [column.partition(":")[0].replace("_", " ") for column in columns]
    body = [heads, ["---"] * len(columns), *([cell(line, column) for column in columns] for line in lines)]
    return found["open"] + "\n".join(f"| {' | '.join(cells)} |" for cells in body) + "\n" + found["close"]


def rendered(text: str) -> str:
    """``text`` with every table written anew."""
    return MARKER.sub(table, text)


if __name__ == "__main__":
    readme = ROOT / "README.md"
    readme.write_text(rendered(readme.read_text(encoding="utf-8")), encoding="utf-8")
