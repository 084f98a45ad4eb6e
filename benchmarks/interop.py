"""Does every engine read what we write? Each format in its engine, beside our own model of the same result.

    # every engine that installs here; make interop does this
    python benchmarks/interop.py
    # two of them, on results that are already there
    python benchmarks/interop.py --engines vllm,onnx --models results/

An engine is tests/interop/engines/ENGINE.txt (its packages, pinned) and run_ENGINE.py, which runs in an environment of
its own in .peers/. It does not have leangrid, except for the engines whose list says ``# with: leangrid``: there our
plugin is what is tested. A case is a result of ``leangrid quantize``, exported to the engine's container where that is
another one, opened by the engine and by ``leangrid.load``. One JSON line for each case:

* max_logit_difference, kl: over all tokens of the prompt, from our model in the engine's dtype (float32 unless its
  runner says otherwise).
* greedy_equal: whether the next 32 tokens are the same. Where they are not, ``margin`` is our model's logit of its own
  token less its logit of the engine's, at the first place where they differ: a small margin is a tie that rounding
  decides, a large one a model that was read wrongly.
* weights_equal: whether every quantized linear, as the engine itself dequantizes it, is ours bit for bit (llama.cpp
  only).
* state: ok; differs (other weights, or kl or margin above what the engine's arithmetic explains); or the reason why
  there is no figure: not installed, failed, refused.

The exit code is 1 where a case differs or fails.
"""

import argparse
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from common import lines
from common.environment import Environment, EnvironmentFailed
from common.interop_models import Models, Ours, llama_weights
from common.machine import ROOT, provenance
from leangrid.errors import LeangridError
from leangrid.models.result_reader import ResultReader

ENGINES = ROOT / "tests" / "interop" / "engines"
NEW = 32
# The largest KL, and margin of another token, of a model that was read rightly: bfloat16 holds logits near 20 to 0.06.
BOUNDS = {"float32": (1e-6, 0.01), "float16": (1e-3, 0.1), "bfloat16": (5e-3, 0.5)}


@dataclass(frozen=True)
class Engine:
    """What an engine reads: ``cases`` of (scheme, container, model). ``why`` says how its arithmetic differs from
    ours."""

    cases: tuple[tuple[str, str, str], ...]
    why: str
    bounds: tuple[float, float] | None = None  # what its arithmetic explains; None: what its dtype does, BOUNDS
    rounds: bool = True  # its weights are rounded to the model's dtype; else they are S (q - Z) in float32


TINY, GEMMA, REAL = "tiny-llama", "tiny-gemma3", "SmolLM2-135M-Instruct"
KNOWN: dict[str, Engine] = {
    "transformers": Engine(
        (
            ("W4A16_G64", "compressed-tensors", REAL),
            ("W3A16_G64", "compressed-tensors", REAL),
            ("W8A16", "compressed-tensors", TINY),
            ("W4A16_G64_SYM", "compressed-tensors", TINY),
            ("W2A16_G32", "compressed-tensors", TINY),
            ("W5A16", "compressed-tensors", TINY),
            ("W6A16_G64", "compressed-tensors", TINY),
        ),
        "float32 products of the same weights",
    ),
    "transformers_leangrid": Engine((("NU4", "lut", REAL), ("NU3", "lut", TINY), ("NU2", "lut", TINY)), "our layers"),
    "vllm": Engine(
        (
            ("W4A16_G64", "compressed-tensors", REAL),
            ("W4A16", "compressed-tensors", TINY),
            ("W4A16_G64_SYM", "compressed-tensors", TINY),
            ("W4A16_G64", "awq", REAL),
            ("NU4", "lut", REAL),
            ("NU3", "lut", TINY),
            ("NU2", "lut", TINY),
        ),
        "float32; 16-bit products in vLLM's own kernels",
    ),
    "gptqmodel": Engine(
        (
            ("W4A16_G64", "gptq", REAL),
            ("W3A16_G64", "gptq", REAL),
            ("W4A16_G64", "awq", REAL),
            ("W8A16", "gptq", TINY),
            ("W2A16_G32", "gptq", TINY),
            ("W4A16_G64_SYM", "gptq_v1", TINY),
        ),
        "bfloat16 products",
    ),
    "transformers_gptqmodel": Engine((("W4A16_G64", "gptq", REAL), ("W4A16_G64", "awq", REAL)), "bfloat16 products"),
    "llama": Engine(
        (
            ("W4A16_G64", "gguf", REAL),
            ("W4A16_G32_SYM", "gguf", TINY),
            ("W4A16", "gguf", TINY),
            ("W3A16_G64_SYM", "gguf", TINY),
            ("W2A16", "gguf", TINY),
            ("W5A16", "gguf", TINY),
            ("W6A16_SYM", "gguf", TINY),
            ("W8A16_SYM", "gguf", TINY),
            *((scheme, "gguf", REAL) for scheme in ("Q4_K", "Q3_K", "Q2_K", "Q4_0")),
            *(
                (scheme, "gguf", TINY)
                for scheme in ("Q4_K", "Q3_K", "Q2_K", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q5_K", "Q6_K", "Q8_0")
            ),
        ),
        "8-bit activations",
        bounds=(0.02, 0.5),
        rounds=False,
    ),
    "mlx": Engine(
        (
            ("W4A16_G64", "mlx", REAL),
            ("W3A16_G64", "mlx", TINY),
            ("W4A16_G64_SYM", "mlx", TINY),
            ("W2A16_G32", "mlx", TINY),
            ("W5A16_G64", "mlx", TINY),
            ("W6A16_G64", "mlx", TINY),
            ("W8A16_G128", "mlx", TINY),
            ("W4A16_G64", "mlx", GEMMA),
        ),
        "float32 products in another order",
        rounds=False,
    ),
    "onnx": Engine(
        (
            ("W4A16_G64", "onnx", REAL),
            ("W4A16", "onnx", TINY),
            ("W4A16_G64_SYM", "onnx", TINY),
            ("W8A16", "onnx", TINY),
            ("W2A16_G32", "onnx", TINY),
        ),
        "float32 products in another order",
        rounds=False,
    ),
}


def compare_answers(ours: Ours, theirs: dict[str, Any], logits: torch.Tensor | None) -> dict[str, Any]:
    """The figures of a case, from our model's answer and the engine's. ``logits`` float32 [prompt, vocab or more] are
    the engine's; None where it gives none."""
    found: dict[str, Any] = {}
    if logits is not None:
        mine, other = ours.logits.double(), logits[:, : ours.logits.shape[1]].double()  # engines pad the vocabulary
        log_mine, log_other = mine.log_softmax(-1), other.log_softmax(-1)
        found["max_logit_difference"] = float((mine - other).abs().max())
        found["kl"] = float((log_mine.exp() * (log_mine - log_other)).sum(-1).mean())
    said, expected = ours.until_end(theirs["tokens"]), ours.until_end(ours.tokens)
    found["greedy_equal"] = said == expected
    found["greedy_tokens"] = len(expected)
    if said != expected:
        place = next(
            (i for i, pair in enumerate(zip(said, expected, strict=False)) if pair[0] != pair[1]),
            min(len(said), len(expected)),
        )
        found["first_difference"] = place
        chosen, other = (
            tokens[place : place + 1] or list(ours.ends) for tokens in (expected, said)
        )  # one may end the text here
        if chosen and other:
            found["margin"] = float(ours.steps[place, chosen].max() - ours.steps[place, other].max())
    return found


def verdict(found: dict[str, Any], engine: Engine) -> str:
    """ "ok", or "differs" where a figure is above what the engine's arithmetic explains."""
    kl, margin = engine.bounds or BOUNDS[found["dtype"]]
    near = found.get("kl", 0.0) <= kl and (found["greedy_equal"] or found.get("margin", margin) < margin)
    return "ok" if near and found.get("weights_equal", True) else "differs"


def equal_weights(directory: Path, file: Path) -> bool:
    """Whether ``file`` holds every quantized linear of the result bit for bit as llama.cpp stores it."""
    theirs = load_file(file)
    return all(
        torch.equal(theirs[name], weight.flatten()) for name, weight in llama_weights(ResultReader.verified(directory))
    )


def run_case(
    name: str, case: tuple[str, str, str], models: Models, settings: argparse.Namespace, folder: Path
) -> dict[str, Any]:
    """The fields of the line of one case, without its provenance."""
    scheme, container, model = case
    about = models.about(scheme, container, model)
    environment = environment_of(name, settings)
    try:
        directory, exported = models.result(scheme, container, model), models.exported(scheme, container, model)
        job = {
            "model": str(exported),
            "tokens": models.prompt(model),
            "new": NEW,
            "logits": str(folder / "logits.safetensors"),
            "weights": str(folder / "weights.safetensors"),
            "threads": settings.threads,
        }
        for kind in ("logits", "weights"):
            Path(job[kind]).unlink(missing_ok=True)
        theirs = environment.run(job, folder)
    except LeangridError as error:
        return about | {"state": f"refused: {error}"}
    except EnvironmentFailed as error:
        return about | {"state": f"failed: {str(error).strip().splitlines()[-1][:300]}", "log": str(error)}
    dtype = theirs.get("dtype", "float32")
    logits = load_file(folder / "logits.safetensors")["logits"] if (folder / "logits.safetensors").is_file() else None
    rounds = theirs.get("rounds", KNOWN[name].rounds)
    found = {"dtype": dtype} | compare_answers(
        Ours.of(directory, models.prompt(model), NEW, getattr(torch, dtype), rounds), theirs, logits
    )
    if (folder / "weights.safetensors").is_file():
        found["weights_equal"] = equal_weights(directory, folder / "weights.safetensors")
    notes = {"note": theirs["note"]} if "note" in theirs else {}
    return about | {
        **found,
        "state": verdict(found, KNOWN[name]),
        **notes,
        "version": next(iter(theirs["versions"].values())),
        "engine_versions": theirs["versions"],
    }


def environment_of(name: str, settings: argparse.Namespace) -> Environment:
    """The environment of an engine, with its runner."""
    return Environment(name, settings.environments.absolute(), ENGINES)


def installed(name: str, settings: argparse.Namespace) -> str | None:
    """The reason why an engine's environment does not exist; None where it does."""
    environment = environment_of(name, settings)
    try:
        if not settings.no_build:
            environment.build()
    except EnvironmentFailed as error:
        return f"not installed: {str(error).strip().splitlines()[-1][:300]}"
    return (
        None if environment.python.exists() else f"not installed: no folder {environment.name} among the environments"
    )


def run(names: list[str], settings: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    """Run all cases of all engines; each line is printed, and added to --out, as soon as it is measured."""
    origin, done = provenance(), []
    models = Models(settings.models, folder)
    for name in names:
        missing = installed(name, settings)
        for case in KNOWN[name].cases:
            if any(
                asked and found not in asked.split(",")
                for asked, found in ((settings.schemes, case[0]), (settings.of, case[2]))
            ):
                continue
            found = (
                run_case(name, case, models, settings, folder)
                if missing is None
                else models.about(*case) | {"state": missing}
            )
            if log := found.pop("log", ""):
                print(log, file=sys.stderr, flush=True)
            line = {"benchmark": "interop", "engine": name, **found, "arithmetic": KNOWN[name].why, **origin}
            lines.show(line, settings.out)
            done.append(line)
    return done


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engines", default=",".join(KNOWN), help="with commas between them")
    parser.add_argument("--schemes", default="", help="only these, with commas between them")
    parser.add_argument("--of", default="", help=f"only of these models, with commas between them: {REAL}, {TINY} ...")
    parser.add_argument(
        "--models", type=Path, default=ROOT / ".cache" / "interop", help="where the results are kept, and made once"
    )
    parser.add_argument("--environments", type=Path, default=ROOT / ".peers", help="where the engines are installed")
    parser.add_argument("--no-build", action="store_true", help="take the environments as they are")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, help="results file; a line of the same case is replaced")
    settings = parser.parse_args()
    names = [name for name in settings.engines.split(",") if name]
    if unknown := set(names) - KNOWN.keys():
        parser.error(f"no such engine: {', '.join(sorted(unknown))}; known: {', '.join(KNOWN)}")
    torch.set_num_threads(settings.threads)
    with tempfile.TemporaryDirectory() as temporary:
        done = run(names, settings, Path(temporary))
    bad = [line for line in done if not line["state"].startswith(("ok", "not installed"))]
    for line in bad:
        print(f"{line['engine']} {line['scheme']} {line['format']} {line['model']}: {line['state']}", file=sys.stderr)
    raise SystemExit(1 if bad else 0)


if __name__ == "__main__":
    main()
