"""Facts of made-up results for the tests of card, page and comparison: any part may be missing, hostile or not
finite."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from leangrid.recipe import Recipe
from leangrid.report.facts import RECORDS, RUN, Facts
from leangrid.report.records import LayerRecord, to_lines
from leangrid.solve.rescue import Rescue
from leangrid.storage import files
from leangrid.storage.manifest import seal

NOTE = Rescue("dead_columns", "3 of 16 columns", 3)
RECORD = LayerRecord("model.layers.0.mlp.down_proj", (8, 16), "NU3", 1.0, 2.5, 4.0, 0.01, (NOTE,), {"grid": 0.5}, 64)
QUALITY = {
    "measure": "kl",
    "value": 0.11,
    "top1_agreement": 0.85,
    "perplexity": 20.5,
    "reference_perplexity": 18.25,
    "limit": 1.0,
    "windows": 2,
    "tokens": 512,
    "worst_layers": [{"name": "model.layers.0.mlp.down_proj", "error": 0.12}],
}
EVALUATION = {
    "model": "out",
    "reference": "src",
    "text": "a/wiki.txt",
    "sha256_of_text": "0" * 64,
    "length": 1024,
    "windows": 12,
    "tokens": 12276,
    "perplexity": 28.94,
    "reference_perplexity": 26.1,
    "kl_mean": 0.1171,
    "kl_p99": None,
    "top1_agreement": 0.87,
    "tasks": {},
    "bits_per_weight": 3.125,
    "seconds": 60.1,
}
SAMPLE = {
    "name": "model.layers.0.mlp.down_proj",
    "row": 3,
    "columns": [0, 15, 16],
    "p": 4.0,
    "weights": [0.1, -0.2, 0.3],
    "stored": [0.1, -0.25, 0.25],
    "costs": [1.0, 1e-3, 0.0],
    "levels": [-0.25, 0.1, 0.25],
    "levels_minmax": [-0.2, 0.05, 0.3],
}
RUN_LOG = {
    "seconds": {"total": 200.0, "load": 1.0, "calibrate": 120.0, "hessian": 50.0, "solve": 20.0, "check": 4.0},
    "blocks": [
        {"seconds": 100.0, "resident_bytes": 10**9, "peak_ram_bytes": 11 * 10**8, "peak_gpu_bytes": 0},
        {"seconds": 95.0, "resident_bytes": 12 * 10**8, "peak_ram_bytes": 13 * 10**8, "peak_gpu_bytes": 0},
    ],
    "peak_ram_bytes": 13 * 10**8,
    "peak_gpu_bytes": 0,
    "bytes_before": 4 * 10**8,
    "sample": SAMPLE,
}


def manifest(source: str = "org/name", scheme: str = "NU3", **changes: Any) -> dict[str, Any]:
    recipe = Recipe(scheme=scheme).resolved()
    return {
        "recipe": recipe.model_dump(),
        "recipe_fingerprint": recipe.fingerprint(),
        "source_name": source,
        "versions": {"leangrid": "9.9", "torch": "2"},
        "devices": ["cpu"],
        "threads": [2],
        "products": ["float32"],
        "memory": [],
        "determinism": {"claim": "same bytes", "scope": {"device": ["cpu"]}, "except": []},
        "quality": QUALITY,
        "files": {
            "model.safetensors": {"bytes": 10**8, "sha256": "0" * 64},
            "README.md": {"bytes": 5, "sha256": "0" * 64},
        },
        "result": {
            "scheme": scheme,
            "format": recipe.format,
            "layers": 1,
            "bits_per_weight": 3.125,
            "loss": 1.0,
            "loss_minmax": 2.5,
            "loss_rounding": 4.0,
            "kernels": {"grid": "cpu-avx2"},
            "windows_sha256": "1" * 64,
        },
    } | changes


def facts(
    source: str = "org/name",
    scheme: str = "NU3",
    records: Sequence[LayerRecord] = (RECORD,),
    run: Any = RUN_LOG,
    **more: Any,
) -> Facts:
    return Facts(manifest(source, scheme, **more), list(records), run)


def directory(path: Path, weights: int = 100, **more: Any) -> Path:
    """A directory that verifies, with a file of ``weights`` bytes in the place of the weights."""
    path.mkdir()
    made = facts(**more)
    texts = {
        RECORDS: to_lines(made.records),
        RUN: json.dumps(made.run),
        "README.md": "# hello",
        "model.safetensors": "x" * weights,
    }
    for name, text in texts.items():
        (path / name).write_text(text, encoding="utf-8")
    listed = {
        name: {"bytes": len(text.encode()), "sha256": files.hash_file(path / name)} for name, text in texts.items()
    }
    files.write_json(path / "manifest.json", seal({**made.manifest, "files": listed}))
    return path
