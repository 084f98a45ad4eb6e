"""What was found of a model, as rows of a name and a text: for plan, model card and page.

planning/structure.py makes the values, of which a manifest holds a copy."""

from collections.abc import Mapping, Sequence
from typing import Any

from leangrid.report.units import format_size

_NAMES = 6  # summaries of names in a row
_FLOWS = 4


def describe_found(
    structure: Mapping[str, Any], kept: Sequence[Mapping[str, Any]], source: Mapping[str, Any] | None
) -> list[tuple[str, str]]:
    """Rows: what the source is stored in, the blocks, the groups of each kind of block, what stays and why, what flows
    between the blocks. Empty where ``structure`` is."""
    if not structure:
        return []
    rows = []
    if source:
        size = f"{format_size(source['bytes'])} of {source['what']} ({source['method']})"
        rows.append(("source", f"{size}; {source['tensors']} tensors are dequantized as they are read"))
    rows.append(("blocks", _blocks(structure)))
    for kind in structure["kinds"]:
        groups = " | ".join(_group(names) for names in kind["groups"]) or "nothing"
        rows.append((f"{kind['count']} {kind['module']}", groups))
    rows += _kept(kept)
    flows = list(structure["flows"])
    more = f"; and {len(flows) - _FLOWS} more" if len(flows) > _FLOWS else ""
    rows.append(("between blocks", "hidden states" + (f", and: {'; '.join(flows[:_FLOWS])}{more}" if flows else "")))
    return rows


def _blocks(structure: Mapping[str, Any]) -> str:
    text = f"{structure['blocks']} in {', '.join(structure['lists'])}"
    if structure["calls"] > structure["blocks"]:
        text += f", called {structure['calls']} times in a pass"
    return text + (f"; {structure['idle']} more that text does not reach" if structure["idle"] else "")


def _group(names: Sequence[str]) -> str:
    """The names of a group, those of one module together: self_attn.{q_proj, k_proj, v_proj}."""
    owners: dict[str, list[str]] = {}
    for name in names:
        owner, dot, last = name.rpartition(".")
        owners.setdefault(owner + dot, []).append(last)
    return ", ".join(
        owner + (last[0] if len(last) == 1 else "{" + ", ".join(last) + "}") for owner, last in owners.items()
    )


def _kept(kept: Sequence[Mapping[str, Any]]) -> list[tuple[str, str]]:
    """One row for each reason."""
    reasons: dict[str, list[str]] = {}
    for entry in kept:
        count = f" ({entry['count']})" if entry["count"] > 1 else ""
        reasons.setdefault(entry["why"], []).append(f"{entry['name']}{count}")
    rows = []
    for why, names in reasons.items():
        more = f" and {len(names) - _NAMES} more" if len(names) > _NAMES else ""
        rows.append(("stays", f"{', '.join(names[:_NAMES])}{more}: {why}"))
    return rows
