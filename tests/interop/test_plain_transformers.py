"""Affine results of other kinds of models, opened by transformers in a process without leangrid: the logits that
``leangrid.load`` gives; or a sentence before work where transformers opens none."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import zoo_models
from safetensors.torch import load_file

import leangrid
from leangrid.recipe import Recipe

pytestmark = pytest.mark.interop

ALIKE = 1e-4  # relative distance of logits from the same weights
# What the results show: a vision tower and renamed modules, experts stored one by one, with a layer that predicts
# further tokens, projections cut apart, a convolution that a converter makes, a hybrid, experts that transformers
# replaces by linears.
OPENED = [
    ("gemma3", "image-text", "RTN8"),
    ("qwen3_moe", "causal", "RTN8_SYM"),
    ("deepseek_v3", "causal", "RTN8_SYM"),
    ("hrm_text", "causal", "RTN8_SYM"),
    ("kimi_linear", "causal", "RTN8_SYM"),
    ("qwen3_next", "causal", "RTN8_SYM"),
    ("llama4", "image-text", "RTN8_SYM"),
]
PLAIN = """
import sys, pathlib, torch, zoo_models
from safetensors.torch import load_file, save_file
for place in map(pathlib.Path, sys.argv[1:]):
    try:
        logits = zoo_models.run(zoo_models.open_plain(place / "out"), load_file(place / "ids.safetensors")["ids"])
        save_file({"logits": logits.contiguous()}, place / "plain.safetensors")
    except Exception as error:
        (place / "error").write_text(f"{type(error).__name__}: {error}")
assert "leangrid" not in sys.modules
"""


def quantized(kind: str, family: str, scheme: str, place: Path, layers: dict[str, str] | None = None) -> list[str]:
    """Write the result to ``place / "out"`` and what ``leangrid.load`` makes of it; the run's notices."""
    from safetensors.torch import save_file

    model, ids = zoo_models.build(kind, family), zoo_models.tokens(2, 16)
    zoo_models.save(model, place / "source")
    recipe, said = Recipe(scheme=scheme, samples=2, length=16, layers=layers or {}, format="compressed-tensors"), []
    leangrid.quantize(
        place / "source", place / "out", recipe, windows=ids, progress=lambda e: said.append(e.message), max_kl=1e9
    )
    opened, _ = leangrid.load(place / "out", dtype=torch.float32)
    save_file({"ids": ids}, place / "ids.safetensors")
    save_file({"logits": zoo_models.run(opened, ids).contiguous()}, place / "ours.safetensors")
    return [one for one in said if one]


def open_plainly(*places: Path) -> None:
    """Open every result in one process without leangrid."""
    support = str(Path(zoo_models.__file__).parent)
    command = [sys.executable, "-c", f"import sys; sys.path.insert(0, {support!r})\n{PLAIN}", *map(str, places)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]


def distance(place: Path) -> float:
    assert not (place / "error").exists(), (place / "error").read_text()
    ours, plain = (load_file(place / f"{side}.safetensors")["logits"] for side in ("ours", "plain"))
    assert ours.isfinite().all()
    return float((plain - ours).norm() / ours.norm())


def test_results_of_every_kind_open_without_leangrid(tmp_path: Path) -> None:
    places = {f"{kind} {scheme}": tmp_path / kind for kind, _, scheme in OPENED}
    for kind, family, scheme in OPENED:
        said = quantized(kind, family, scheme, tmp_path / kind)
        assert not [one for one in said if "without leangrid does not" in one]
        manifest = json.loads((tmp_path / kind / "out" / "manifest.json").read_text())
        assert manifest["opened_in"] == {"leangrid.load": "yes", "transformers": "yes"}
    open_plainly(*places.values())
    far = {name: distance(place) for name, place in places.items()}
    assert max(far.values()) < ALIKE, far


def test_experts_and_other_linears_of_two_schemes_open(tmp_path: Path) -> None:
    """The others with zero points, which transformers takes where all of them have one scheme."""
    quantized("qwen3_moe", "causal", "RTN8", tmp_path, {"re:.*experts.*": "RTN4_SYM"})
    groups = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]["config_groups"]
    assert sorted(group["weights"]["num_bits"] for group in groups.values()) == [4, 8]
    open_plainly(tmp_path)
    assert distance(tmp_path) < ALIKE


@pytest.mark.parametrize(
    ("kind", "scheme", "words"),
    [
        ("gpt_oss", "RTN8_SYM", "no place for packed experts of this model; it opens what leangrid export"),
        ("qwen3_moe", "RTN8", "it opens RTN8_SYM"),
    ],
)
def test_what_does_not_open_is_said_before_work(kind: str, scheme: str, words: str, tmp_path: Path) -> None:
    said = quantized(kind, "causal", scheme, tmp_path)
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    plan = leangrid.plan(tmp_path / "source", Recipe(scheme=scheme, samples=2, length=16))
    assert [one for one in said if words in one and "leangrid.load opens" in one]
    assert words in manifest["opened_in"]["transformers"] and manifest["opened_in"] == plan.opened_in
    open_plainly(tmp_path)
    assert (tmp_path / "error").exists()
