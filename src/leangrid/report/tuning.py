"""What tuning did, of blocks and of the whole model, from the journal's word; for summary, manifest and model card."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

_SHOWN = 3  # blocks shown by name


def tuning_figures(blocks: Sequence[tuple[str, Mapping[str, Any]]]) -> dict[str, Any]:
    """The figures over all blocks; empty for a run without tuning.

    Args:
        blocks: (name, ``Tuning.to_json()`` of solve/tuning.py) of each block that was to be tuned.

    Returns:
        "tuned" and "kept": how many blocks got better on the held-out windows, and how many stay as they were solved;
        "error" and "held_error": geometric means over the tuned blocks of after / before, on the windows that were
        tuned on and on those held out; "moved": mean share of codes that changed; "trouble": a sentence for each block
        that could not be tuned to its end; "blocks": all values by block.
    """
    if not blocks:
        return {}
    tuned = [one for _, one in blocks if one["best"]]
    return {
        "tuned": len(tuned),
        "kept": len(blocks) - len(tuned),
        "error": _mean_ratio([(one["before"], one["after"]) for one in tuned]),
        "held_error": _mean_ratio([(one["held_before"], one["held_after"]) for one in tuned]),
        "moved": round(sum(one["moved"] for one in tuned) / max(1, len(tuned)), 6),
        "trouble": [f"{name}: {one['trouble']}" for name, one in blocks if one["trouble"]],
        "blocks": [{"block": name, **one} for name, one in blocks],
    }


def describe_tuning(found: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The figures as (name, value) rows; no row without tuning."""
    if not found:
        return []
    rows = []
    if found["tuned"]:
        words = f"{found['tuned']} blocks: their error fell to {found['held_error']:.2f} of what it was on held-out "
        words += f"windows ({found['error']:.2f} on as many others); {found['moved']:.1%} of their codes moved"
        rows.append(("tuned", words))
    if found["kept"]:
        more = f"; {'; '.join(found['trouble'][:_SHOWN])}" if found["trouble"] else ""
        rows.append(("not tuned", f"{found['kept']} blocks stay as they were solved{more}"))
    return rows


def finish_figures(found: Mapping[str, Any]) -> dict[str, Any]:
    """The manifest's entry ``finish`` from what the journal notes of a finished model; empty without.

    "measure": "kl", the mean divergence of the next-token distributions in nats, or "relative squared error" of the
    last hidden states; then the fields of ``Tuning`` in solve/tuning.py that are of use where codes stay. "memory":
    what was done otherwise where it ran out.
    """
    if not found:
        return {}
    kept = ("before", "after", "held_before", "held_after", "best", "trouble")
    figures = {"measure": found["measure"], **{name: found["tuning"][name] for name in kept}}
    return {"finish": figures | ({"memory": found["memory"]} if "memory" in found else {})}


def describe_finish(found: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The figures as one (name, value) row; no row where no model was to be finished."""
    if not found:
        return []
    if not found["best"]:
        return [("not finished", found["trouble"] or "its error on held-out windows did not fall")]
    what = "KL" if found["measure"] == "kl" else "error"
    words = f"{what} on held-out windows {found['held_before']:.4g} before, {found['held_after']:.4g} after pass "
    words += f"{found['best']} ({found['before']:.4g} and {found['after']:.4g} on as many others)"
    return [("finished", "; ".join(filter(None, (words, found["trouble"], found.get("memory")))))]


def _mean_ratio(pairs: Sequence[tuple[float, float]]) -> float:
    """The geometric mean of after / before; 1 for none."""
    logs = [math.log(after / before) if after > 0 else -math.inf for before, after in pairs]
    return round(math.exp(sum(logs) / len(logs)), 4) if logs else 1.0
