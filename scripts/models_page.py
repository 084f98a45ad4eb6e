"""Writes docs/models.md: of every type that `make zoo` tried what is quantized and what stays, or why it is refused.

    python scripts/models_page.py [FOLDER]

The records in FOLDER, one JSON file a type, replace those in tests/zoo/records.jsonl; without FOLDER the page is
written from what is there.

    python scripts/models_page.py --counts FOLDER

says how the types in FOLDER ended, which had other configs than the usual, and writes nothing."""

import argparse
import json
import re
import sys
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PAGE, RESULTS = ROOT / "docs" / "models.md", ROOT / "tests" / "zoo" / "records.jsonl"
FAMILIES = {"causal": "Causal language models", "image-text": "Models of text and pictures", "encoder": "Encoders"}
_FIELDS = ("type", "family", "class", "transformers", "stage", "error", "refused", "blocks", "cover", "quantized",
           "kept", "twice", "schemes", "faults", "figures")  # fmt: skip
_INTRO = """# Models

A model is not looked up in a list: its blocks, and which linears of a block read the same input, are found by running \
its own code once on a few tokens without weights. This page is generated from `make zoo`, which makes every type of \
transformers {version} tiny and random, writes it as transformers does, quantizes it to 8 affine bits and to NU4, and \
holds the result against the source:

* the weights that changed are those that should, every other byte is the source's;
* the logits are no further from the source's than 1.5 times those of plain rounding;
* `leangrid.load`, and transformers without leangrid, give the logits of the source with the stored weights put in;
* both streams of the calibration end where the source and the reopened result end, and each linear's Hessian is that \
of hooks on transformers' own model.

`make zoo VARY=SEED` tries other configs of the same types by the same measures: embeddings tied or not, biases, 1 to \
11 layers, other counts of heads and experts, sizes that no group divides, odd vocabularies, other activations, \
windows and rotary tables, what published models of a type have together (a mixture in Gemma 4, no low-rank queries in \
DeepSeek), stored in bfloat16, over several files, with the config of transformers 4, or under the names of the model \
without its head.

A tiny model shows that the way is right, not how much quality a real one keeps: that is on [quality](quality.md).
"""


def main() -> None:
    """Merge the records and write the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", nargs="?", type=Path)
    parser.add_argument("--counts", action="store_true")
    given = parser.parse_args()
    if given.counts and given.folder is None:
        parser.error("--counts needs the folder of the records")
    if given.counts:
        print(counts([json.loads(path.read_text(encoding="utf-8")) for path in sorted(given.folder.glob("*.json"))]))
        return
    records = read(RESULTS)
    if given.folder is not None:
        new = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(given.folder.glob("*.json"))]
        records |= {(r["family"], r["type"]): {k: r[k] for k in _FIELDS if k in r} for r in new}
        lines = [json.dumps(records[key]) for key in sorted(records)]
        RESULTS.write_text("\n".join(lines) + "\n", encoding="utf-8")
    PAGE.write_text(page(records.values()), encoding="utf-8")
    print(f"{PAGE.relative_to(ROOT)}: {len(records)} types")


def read(path: Path) -> dict[tuple[str, str], dict[str, Any]]:
    """The records of a file by family and type."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    return {(r["family"], r["type"]): r for r in map(json.loads, lines)}


def page(records: Iterable[dict[str, Any]]) -> str:
    """The whole page."""
    records = list(records)
    versions = sorted({r["transformers"] for r in records if r.get("transformers")})
    parts = [_INTRO.format(version=" and ".join(versions)), _counts(records), _customs(records)]
    for family, title in FAMILIES.items():
        parts.append(f"## {title}\n\n{_table([r for r in records if r['family'] == family])}")
    return "\n".join(parts)


def outcome(record: dict[str, Any]) -> str:
    """In which column of the counts a type is."""
    if record["stage"] == "source" and "error" in record:
        return "not made by transformers"
    if record.get("refused"):
        return "refused"
    if record["stage"] != "done" or record["faults"]:
        return "fails"
    return "quantized" if record["cover"] >= 0.9 else "quantized in part"


def counts(records: list[dict[str, Any]]) -> str:
    """How many types ended how, and a line for each that was not quantized."""
    shown = [f"{found}: {number}" for found, number in sorted(Counter(map(outcome, records)).items())]
    for record in records:
        if outcome(record) not in ("quantized", "quantized in part"):
            why = record.get("error") or "; ".join(record["faults"])
            shown.append(f"{outcome(record)}: {record['family']} {record['type']} {record.get('varied', [])}: {why}")
    return "\n".join(shown)


def _counts(records: list[dict[str, Any]]) -> str:
    columns = ("quantized", "quantized in part", "refused", "fails", "not made by transformers")
    lines = [f"| | types | {' | '.join(columns)} |", "| --- |" + " ---: |" * (len(columns) + 1)]
    for family, title in FAMILIES.items():
        found = Counter(outcome(r) for r in records if r["family"] == family)
        lines.append(f"| {title} | {found.total()} | {' | '.join(str(found[c]) for c in columns)} |")
    return "\n".join(lines) + "\n\nIn part: more than a tenth of the numbers in its blocks' matrices stay.\n"


def _customs(records: list[dict[str, Any]]) -> str:
    """What stays in 16 bits wherever it is found."""
    found: dict[str, Counter[str]] = {}
    for record in records:
        for why, names in record.get("kept", {}).items():
            found.setdefault(why, Counter()).update(_leaf(name) for name in names)
    lines = [
        f"* {why}: {', '.join(f'`{name}`' for name, _ in names.most_common(5))}{', ...' if len(names) > 5 else ''}"
        for why, names in sorted(found.items())
    ]
    return "Of the blocks' matrices these stay in 16 bits, and why:\n\n" + "\n".join(lines) + "\n"


def _leaf(name: str) -> str:
    return ".".join(name.rpartition(".*.")[2].split(".")[-2:])


def _table(records: list[dict[str, Any]]) -> str:
    lines = ["| type | quantized | stays | affine result opened by |", "| --- | --- | --- | --- |"]
    for record in sorted(records, key=lambda r: r["type"]):
        lines.append(f"| {record['type']} | {' | '.join(_row(record))} |")
    return "\n".join(lines) + "\n"


def _row(record: dict[str, Any]) -> tuple[str, str, str]:
    found = outcome(record)
    if found in ("refused", "fails", "not made by transformers"):
        why = record.get("error") or "; ".join(record["faults"])
        why = re.sub(r"^\w+Error: ", "", why).replace("|", "/").replace("\n", " ")[:300]
        return f"{found}: {why}", "", ""
    stays = "; ".join(f"{_grouped(names)}: {why}" for why, names in record["kept"].items())
    share = "" if record["cover"] >= 0.9 else f"{1 - record['cover']:.0%} of the matrices. "
    return _grouped(record["quantized"]), share + stays, _opened(record)


def _opened(record: dict[str, Any]) -> str:
    """What opens the affine result."""
    if record["schemes"] == ["NU4"]:
        return "none: only NU4 fits its transposed linears"
    figures = {name.partition(".")[2]: value for name, value in record["figures"].items() if name[:3] != "NU4"}
    if "plain" in figures:
        return "transformers, leangrid" + ("; some names are the modules'" if figures.get("renamed") else "")
    return "leangrid; transformers once exported as dense"


def _grouped(names: Iterable[str]) -> str:
    """Names below the blocks, those of one module together: `self_attn.{q_proj, k_proj}`."""
    parents: dict[str, list[str]] = {}
    for name in names:
        parent, _, leaf = name.partition(".*.")[2].rpartition(".")
        leaves = parents.setdefault(parent, [])
        if leaf not in leaves:
            leaves.append(leaf)
    shown = [
        ".".join(filter(None, (parent, leaves[0] if len(leaves) == 1 else f"{{{', '.join(leaves)}}}")))
        for parent, leaves in parents.items()
    ]
    return ", ".join(f"`{one}`" for one in shown)


if __name__ == "__main__":
    sys.exit(main())
