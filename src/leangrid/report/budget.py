"""What was chosen within a budget of bits or bytes; for summary, manifest, plan and model card."""

from collections.abc import Mapping
from typing import Any

from leangrid.report.units import format_size


def budget_figures(account: Mapping[str, Any]) -> dict[str, Any]:
    """The manifest's account of a budget without its table of units."""
    return {name: value for name, value in account.items() if name != "units"}


def describe_budget(found: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The figures of a result, or of a plan, as (name, value) rows; no row without a budget."""
    if not found:
        return []
    given = f"{found['bits']:g} bits a weight" if "bits" in found else format_size(found["size"])
    if "widths" not in found:
        words = f"{found['candidates'][0]} to {found['candidates'][-1]} ({found['bits_from']:.2f} to "
        words += f"{found['bits_to']:.2f} bits a weight) for {found['units']} units of linears"
        return [("budget", f"{given}: {words}; the run chooses from data, here it is spread evenly")]
    widths = ", ".join(f"{name} x {count}" for name, count in found["widths"].items())
    by = "KL" if found["measure"] == "kl" else "error of the last hidden states"
    return [("budget", f"{given}: {widths}; {by} expected {found['expected']:.4g}")]
