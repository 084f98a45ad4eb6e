"""Tokens per expert of a mixture of experts, from the records of its linears; for summary, model card and page."""

import re
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from leangrid.report.records import LayerRecord

_EXPERT = re.compile(r"(.+?)\.(?:mlp|block_sparse_moe)\.experts\.(\d+)\.")


def expert_figures(records: Sequence[LayerRecord]) -> dict[str, Any]:
    """How many calibration tokens the routers sent to each expert; empty for a model without experts.

    Returns:
        {"experts", "min", "median", "max", "starved", "unseen"} over all experts, and under "blocks" the same of each
        block, with the name of the block as "block". A token counts once for each expert that it is sent to. "starved"
        is how many experts had fewer tokens than one of their linears has columns, "unseen" how many had none.
    """
    blocks: dict[str, dict[str, list[LayerRecord]]] = {}
    for record in records:
        if match := _EXPERT.match(record.name):
            blocks.setdefault(match[1], {}).setdefault(match[2], []).append(record)
    if not blocks:
        return {}
    every = [linears for experts in blocks.values() for linears in experts.values()]
    return _figures(every) | {
        "blocks": [{"block": name, **_figures(list(experts.values()))} for name, experts in blocks.items()]
    }


def _figures(experts: Sequence[Sequence[LayerRecord]]) -> dict[str, Any]:
    tokens = [max(record.tokens for record in linears) for linears in experts]
    kinds = [{rescue.kind for record in linears for rescue in record.rescues} for linears in experts]
    unseen = sum("unseen_expert" in found for found in kinds)
    starved = sum("starved_expert" in found for found in kinds)
    return {
        "experts": len(experts),
        "min": min(tokens),
        "median": statistics.median(tokens),
        "max": max(tokens),
        "starved": starved,
        "unseen": unseen,
    }


def describe_experts(found: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The figures over all experts as (name, value) rows; no row for a model without experts."""
    if not found:
        return []
    lines = [
        (
            "tokens per expert",
            f"{found['min']:,} / {found['median']:,.0f} / {found['max']:,} (least, median, most of {found['experts']})",
        )
    ]
    if found["starved"] or found["unseen"]:
        lines.append(
            (
                "starved experts",
                f"{found['starved']}, and {found['unseen']} that saw no token: calibrate with more text",
            )
        )
    return lines
