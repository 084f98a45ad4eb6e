"""What does the quality gate cost a run, and what does it notice? One JSON line for each amount of calibration text.

    python benchmarks/gate.py --source MODEL --calibration c4.jsonl --amounts 16x1024 4x32 [--scheme W4A16_G64] \\
        [--out FILE.jsonl]

Each run is a process of its own. ``check_seconds`` are the gate's part of ``seconds``. ``seen`` and ``unseen`` are the
distances from the original on the calibration text and on text that was not in it, with that of plain rounding;
``warnings`` are what a user is told.
"""

import argparse
import json
import multiprocessing
import tempfile
from pathlib import Path
from typing import Any

from common.machine import provenance


def measure(source: str, calibration: str, scheme: str, samples: int, length: int) -> dict[str, Any]:
    """One run: its seconds and memory, and the findings of its quality gate."""
    import leangrid

    recipe = leangrid.Recipe(scheme=scheme, calibration=calibration, samples=samples, length=length)
    with tempfile.TemporaryDirectory() as folder:
        result = leangrid.quantize(source, Path(folder) / "out", recipe)
    quality = result.quality
    return {
        "samples": samples,
        "length": length,
        "seconds": round(result.seconds["total"], 1),
        "check_seconds": round(result.seconds["check"], 1),
        "peak_ram_bytes": result.peak_ram_bytes,
        "original": quality["original"],
        "seen": {"value": quality["value"], "rounding": quality.get("rounding")},
        "unseen": quality.get("unseen"),
        "warnings": quality.get("warnings", []),
        "passed": quality["passed"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", required=True)
    parser.add_argument("--calibration", default="embedded")
    parser.add_argument("--scheme", default="W4A16_G64")
    parser.add_argument("--amounts", nargs="+", default=["16x1024", "4x32"], metavar="SAMPLESxLENGTH")
    parser.add_argument("--out", type=Path)
    asked = parser.parse_args()
    lines = []
    for amount in asked.amounts:
        samples, length = map(int, amount.split("x"))
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            found = pool.apply(measure, (asked.source, asked.calibration, asked.scheme, samples, length))
        name = Path(asked.source).name.split(".")[0]
        text = "embedded" if asked.calibration == "embedded" else Path(asked.calibration).name
        line = {
            "benchmark": "gate",
            "model": name,
            "scheme": asked.scheme,
            "variant": amount,
            "calibration": text,
            **found,
            **provenance(),
        }
        lines.append(json.dumps(line))
        print(lines[-1], flush=True)
    if asked.out is not None:
        asked.out.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


if __name__ == "__main__":
    main()
