"""What a command prints on stdout for people: aligned rows, plain text, the same in a file as on a terminal."""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from leangrid.report.budget import describe_budget
from leangrid.report.experts import describe_experts
from leangrid.report.found import describe_found
from leangrid.report.shares import describe_shares
from leangrid.report.tuning import describe_finish, describe_tuning
from leangrid.report.units import format_duration, format_size


def format_table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A table as aligned text: numbers to the right, words to the left."""
    lines = [[str(cell) for cell in head], *([_cell(cell) for cell in row] for row in rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(head))]
    numeric = [all(_is_number(line[column]) for line in lines[1:]) and len(lines) > 1 for column in range(len(head))]
    shown = []
    for line in lines:
        cells = (
            cell.rjust(width) if right else cell.ljust(width)
            for cell, width, right in zip(line, widths, numeric, strict=True)
        )
        shown.append("  ".join(cells).rstrip())
    return "\n".join((shown[0], "-" * len(max(shown, key=len)), *shown[1:]))


def format_pairs(rows: Iterable[tuple[str, object]]) -> str:
    """One name and value in each line; values that are None are left out."""
    shown = [(name, _cell(value)) for name, value in rows if value is not None]
    width = max((len(name) for name, _ in shown), default=0)
    return "\n".join(f"{name.ljust(width)}  {value}" for name, value in shown)


def quantize_summary(result: Mapping[str, Any]) -> str:
    """The JSON of ``quantize`` or ``plan`` as lines."""
    seconds = result.get("seconds") or {}
    stages = ", ".join(
        f"{name} {format_duration(value)}" for name, value in seconds.items() if name != "total" and value >= 0.5
    )
    loss = result.get("loss")
    better = (
        f" ({_less(loss, result['loss_minmax'])} than min-max GPTQ)"
        if loss is not None and result.get("loss_minmax")
        else ""
    )
    total = format_duration(seconds["total"]) + (f" ({stages})" if stages else "") if "total" in seconds else None
    return format_pairs((
        ("out", result.get("out")),
        ("scheme", result.get("scheme")),
        ("layers", result.get("layers")),
        ("bits per weight", result.get("bits_per_weight")),
        ("size", _size(result, "bytes")),
        ("loss", None if loss is None else f"{loss:.4g}{better}"),
        ("rescues", result.get("rescues")),
        *describe_budget(result.get("budget") or {}),
        *describe_experts(result.get("experts") or {}),
        *describe_shares(result.get("correction") or {}),
        *describe_tuning(result.get("tuning") or {}),
        *describe_finish(result.get("finish") or {}),
        *_quality(result.get("quality") or {}),
        ("time", total),
        ("bound by", result.get("bound")),
        ("peak RAM", _size(result, "peak_ram_bytes")),
        ("peak GPU memory", _size(result, "peak_gpu_bytes") if result.get("peak_gpu_bytes") else None),
        ("kernels", ", ".join(f"{name} {path}" for name, path in (result.get("kernels") or {}).items()) or None),
        *_planned(result),
    ))  # fmt: skip


def _planned(result: Mapping[str, Any]) -> Iterator[tuple[str, object]]:
    """The rows that a plan has and a result has not: disk, place of the hidden states, devices, assumed speeds."""
    yield "disk", _size(result, "disk_bytes")
    placement, rates = result.get("placement") or {}, result.get("rates") or {}
    if result.get("layer_plans"):
        held = "in RAM" if placement.get("host_streams") or not result.get("peak_gpu_bytes") else "on the device"
        instead = f" ({format_size(result['memory']['ram_with_states_on_disk'])} of RAM with them in files)"
        yield "hidden states", "in files" if placement.get("disk_streams") else held + instead
    if result.get("devices", 1) > 1:
        yield "devices", f"{result['devices']}, each as above; RAM is of all together"
    if rates.get("assumed"):
        speeds = ", ".join(f"{name} {rates[name] / 1e12:.1f} TFLOP/s" for name in ("forward", "sums", "algebra"))
        yield (
            "assumed",
            f"{speeds}, {format_size(rates['link'])}/s between devices, {format_size(rates['disk'])}/s to disk",
        )


def plan_summary(result: Mapping[str, Any]) -> str:
    """The JSON of ``plan``: a table of its layers, what was found of the model, then the figures as lines."""
    found = describe_found(result.get("structure") or {}, result.get("kept") or [], result.get("stored_as"))
    opened = result.get("opened_in") or {}
    words = (name if word == "yes" else f"{name}: {word}" for name, word in opened.items())
    found += [("opened by", "; ".join(words))] if opened else []
    if result.get("calibration"):
        found += [("calibration", f"{result['samples']} x {result['length']} tokens: {result['calibration']}")]
    return _layer_table(result) + format_pairs(found) + "\n\n" * bool(found) + quantize_summary(result)


def export_summary(result: Mapping[str, Any]) -> str:
    """The JSON of ``export`` as lines."""
    return format_pairs((
        ("out", result["out"]),
        ("format", result["format"]),
        ("scheme", result["scheme"]),
        ("layers", result["layers"]),
        ("bits per weight", result["bits_per_weight"]),
        ("size", _size(result, "bytes")),
        ("time", format_duration(result["seconds"])),
    ))  # fmt: skip


def eval_summary(result: Mapping[str, Any]) -> str:
    """The JSON of ``eval`` as lines."""
    text = (
        f"{result['text']}, {result['windows']} windows of {result['length']} tokens"
        if result["text"] is not None
        else None
    )
    return format_pairs((
        ("model", result["model"]),
        ("reference", result["reference"]),
        ("text", text),
        ("perplexity", result["perplexity"]),
        ("reference's", result["reference_perplexity"]),
        ("KL mean (nats)", result["kl_mean"]),
        ("KL 99th percentile", result["kl_p99"]),
        ("top-1 agreement", None if result["top1_agreement"] is None else f"{result['top1_agreement']:.1%}"),
        ("1 - cosine of embeddings", result.get("embedding_cosine_mean")),
        *((name, _task(found)) for name, found in (result.get("tasks") or {}).items()),
        ("bits per weight", result["bits_per_weight"]),
        ("time", format_duration(result["seconds"])),
    ))  # fmt: skip


def comparison_summary(result: Mapping[str, Any]) -> str:
    """The JSON of ``compare`` as a table; columns without any value are left out."""
    columns = (
        ("", lambda row: "*" if row["front"] else " "),
        ("name", lambda row: row["name"]),
        ("scheme", lambda row: row["scheme"]),
        ("format", lambda row: row["format"]),
        ("bits/weight", lambda row: row["bits_per_weight"]),
        ("size", lambda row: format_size(row["bytes"])),
        ("loss", lambda row: row["loss"]),
        ("perplexity", lambda row: row["perplexity"]),
        ("KL mean", lambda row: row["kl_mean"]),
        ("same token", lambda row: None if row["top1_agreement"] is None else f"{row['top1_agreement']:.1%}"),
        ("1 - cosine", lambda row: row["embedding_cosine_mean"]),
        ("seconds", lambda row: row["seconds"]),
    )
    rows = result["rows"]
    shown = [(head, [value(row) for row in rows]) for head, value in columns]
    shown = [(head, values) for head, values in shown if any(value is not None for value in values)]
    cells = [
        ["-" if value is None else value for value in line]
        for line in zip(*(values for _, values in shown), strict=True)
    ]
    notes = [result["measured_on"], "* no other is smaller and nearer"]
    return format_table([head for head, _ in shown], cells) + "\n" + "\n".join(note for note in notes if note)


def _layer_table(values: Mapping[str, Any]) -> str:
    """The layers of a plan, with those that repeat in every block in one row; "" where the plan lists none."""
    kinds: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for layer in values.get("layer_plans") or []:
        kinds.setdefault(
            (re.sub(r"\.\d+\.", ".*.", layer["name"]), f"{layer['rows']} x {layer['cols']}", layer["scheme"]), []
        ).append(layer)
    rows = [
        (
            name,
            shape,
            scheme,
            len(found),
            format_size(sum(la["bytes_before"] for la in found)),
            format_size(sum(la["bytes_after"] for la in found)),
        )
        for (name, shape, scheme), found in kinds.items()
    ]
    return format_table(("layer", "shape", "scheme", "count", "before", "after"), rows) + "\n\n" if rows else ""


def _task(found: Mapping[str, Any]) -> str:
    """One task's figures in a line: acc 0.512 ± 0.01, acc_norm ..., n 2376."""
    if "error" in found:
        return f"failed: {found['error']}"
    shown = []
    metrics = [
        (name, value)
        for name, value in found.items()
        if isinstance(value, float) and "stderr" not in name and name != "seconds"
    ]
    for index, (name, value) in enumerate(metrics):
        error = found.get(f"{name}_stderr", found.get("stderr") if index == 0 else None)
        shown.append(f"{name} {_cell(value)}" + ("" if error is None else f" ± {error:.2g}"))
    return f"{', '.join(shown)}, n {found['n']}"


def _quality(found: Mapping[str, Any]) -> list[tuple[str, object]]:
    """The quality gate's figures: on the calibration text, on unseen text, and its warnings about the calibration."""
    if found.get("value") is None:
        return []
    name = "KL to the original" if found["measure"] == "kl" else "1 - cosine"
    rows: list[tuple[str, object]] = [
        (name, f"{found['value']:.4g} on {found['tokens']} tokens (allowed {found['limit']:g})")
    ]
    unseen = found.get("unseen") or {}
    if unseen.get("value") is not None:
        beside = f", plain rounding {unseen['rounding']:.4g}" if unseen.get("rounding") is not None else ""
        rows.append(("on unseen text", f"{unseen['value']:.4g} on {unseen['tokens']} tokens{beside}"))
    pictures = found.get("pictures") or {}
    if pictures.get("value") is not None:
        rows.append(("on pictures", f"{pictures['value']:.4g} on {pictures['tokens']} tokens"))
    return rows + [("warning", warning) for warning in found.get("warnings", [])]


def _less(loss: int | float, other: int | float) -> str:
    share = 1 - loss / other
    return f"{abs(share):.0%} {'less' if share >= 0 else 'more'}"


def _size(result: Mapping[str, Any], key: str) -> str | None:
    return None if result.get(key) is None else format_size(result[key])


def _cell(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _is_number(text: str) -> bool:
    try:
        float(text.rstrip("%"))
    except ValueError:
        return False
    return True
