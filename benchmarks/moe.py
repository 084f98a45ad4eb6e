"""How well is a mixture of experts quantized, and what does the shared prior change for experts with few tokens?

    python benchmarks/moe.py --text wiki.train.paragraphs-4444.txt --evaluate wiki.test.raw --model DIR \\
        --out benchmarks/results/moe.jsonl

No checkpoint of a real mixture fits here, so a small model is made, once, in DIR: transformers' Qwen3-MoE with 64
experts, 8 of them for each token, trained on the first part of the text (--steps), with a byte-level BPE of the same
text. It is bfloat16, as checkpoints are. The rest of the text calibrates; the measurements are on another file.

There are two sizes of calibration: --samples windows, and --few, where experts have fewer tokens than their linears
have columns. With few windows three variants differ in the Hessian of such an expert (run/experts.py):

* prior: its own sum blended with the prior, the Hessian of what all experts read, as ``leangrid quantize`` does;
* own: its own sum, however few tokens are in it (where there is none, the prior);
* weights: the identity, so that only the expert's weights count.

Each quantization runs in a process of its own. One JSON line for each run: KL, perplexity, losses, and the tokens of
the experts.
"""

import argparse
import json
import math
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from common import quantize_process
from common.original import CausalOriginal, open_dense
from common.task_list import Tasks, run_each
from common.workload import Workload
from leangrid.models.tokenizer import load_tokenizer
from leangrid.run import experts
from leangrid.run.experts import blend_with_prior
from leangrid.solve.hessian import Hessian, HessianSum

EXPERTS, CHOSEN, HIDDEN, INNER, BLOCKS, VOCABULARY, LENGTH = 64, 8, 256, 128, 2, 1024, 256
NAME, SCHEMES, FILLS = "qwen3-moe-64x8", ("NU4", "W4A16", "GPTQ4", "RTN4", "NU3"), ("prior", "own", "weights")
STARVING = ("NU4", "W4A16", "NU3")  # those that are run with few tokens too
_BATCH, _TRAINED = 4, 0.9  # windows of a step; share of the text that is trained on, the rest calibrates


def make_model(directory: Path, text: Path, steps: int) -> Path:
    """The checkpoint in ``directory``, with calibration.txt and training.json beside it; it is trained where it does
    not exist yet."""
    source = directory / "source"
    if (directory / "training.json").is_file():
        return source
    directory.mkdir(parents=True, exist_ok=True)
    whole = text.read_text(encoding="utf-8")
    cut = whole.rfind("\n", 0, int(len(whole) * _TRAINED))
    (directory / "calibration.txt").write_text(whole[cut:], encoding="utf-8")
    tokenizer = _tokenizer(whole[:cut])
    ids = torch.tensor(tokenizer(whole[:cut]).input_ids)
    model, figures = _trained(ids, steps)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(torch.bfloat16)
    model.save_pretrained(source)
    tokenizer.save_pretrained(source)
    figures |= {
        "text": text.name,
        "experts": EXPERTS,
        "experts_per_token": CHOSEN,
        "hidden": HIDDEN,
        "expert_intermediate": INNER,
    }
    (directory / "training.json").write_text(json.dumps(figures), encoding="utf-8")
    return source


def _tokenizer(text: str) -> transformers.PreTrainedTokenizerFast:
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=["<eos>"], initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator(text.splitlines(keepends=True), trainer)
    return transformers.PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<eos>")  # noqa: S106


def _trained(ids: torch.Tensor, steps: int) -> tuple[transformers.PreTrainedModel, dict[str, Any]]:
    """The trained model and its training figures: AdamW on random windows, with the balancing loss of the routers, as
    such models are trained."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": HIDDEN,
        "intermediate_size": 4 * INNER,
        "moe_intermediate_size": INNER,
        "num_hidden_layers": BLOCKS,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "num_experts": EXPERTS,
        "num_experts_per_tok": CHOSEN,
        "norm_topk_prob": True,
        "max_position_embeddings": 2048,
        "tie_word_embeddings": False,
        "output_router_logits": True,
        "router_aux_loss_coef": 0.001,
        "bos_token_id": None,
        "eos_token_id": 0,
        "pad_token_id": None,
    }
    model = transformers.Qwen3MoeForCausalLM(transformers.Qwen3MoeConfig(**sizes)).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.95), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / 20, 0.5 + 0.5 * math.cos(math.pi * step / steps))
    )
    begin, losses = time.perf_counter(), []
    for step in range(steps):
        starts = torch.randint(len(ids) - LENGTH, (_BATCH,))
        batch = torch.stack([ids[start : start + LENGTH] for start in starts.tolist()])
        out = model(input_ids=batch, labels=batch)
        out.loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(float(out.loss.detach()))
        if step % 50 == 0:
            print(
                f"step {step} of {steps}: loss {losses[-1]:.2f}, {time.perf_counter() - begin:.0f} s",
                file=sys.stderr,
                flush=True,
            )
    model.config.output_router_logits = False
    figures = {
        "steps": steps,
        "tokens": steps * _BATCH * LENGTH,
        "loss": sum(losses[-10:]) / 10,
        "seconds": time.perf_counter() - begin,
    }
    return model.eval(), figures


def blend_otherwise(fill: str, own: HessianSum, prior: Hessian | None, name: str) -> Hessian:
    """``experts.blend_with_prior`` with another Hessian, chosen by ``fill``, for an expert that has fewer tokens than
    columns."""
    as_ever = blend_with_prior(own, prior, name)
    if not as_ever.blended or (fill == "own" and not own.tokens):
        return as_ever
    if fill == "own":
        return replace(own.finish(), blended=as_ever.blended)
    return replace(as_ever, matrix=torch.eye(len(as_ever.matrix)))


def list_runs(schemes: Sequence[str]) -> Iterator[tuple[str, str, str]]:
    """(calibration, scheme, fill) of every run. Fills are compared only where experts have few tokens."""
    yield from (("enough", scheme, "prior") for scheme in schemes)
    yield from (("few", scheme, fill) for scheme in schemes if scheme in STARVING for fill in FILLS)


def measure_run(
    work: Workload, original: CausalOriginal, scheme: str, fill: str, folder: Path, threads: int | None
) -> dict[str, Any]:
    """Quantize, measure, delete the result."""
    out, recipe = folder / "out", work.recipe(scheme, {}).model_dump(exclude={"calibration"})
    program = [quantize_process.__file__] if fill == "prior" else [__file__, "--fill", fill]
    shutil.rmtree(folder / "out.partial", ignore_errors=True)  # of a run that failed
    result = quantize_process.quantize(work.source, out, recipe, work.windows_file, threads, program=program)
    figures = original.measure(out)
    shutil.rmtree(out)
    kept = (
        "bits_per_weight",
        "layers",
        "loss",
        "loss_minmax",
        "loss_rounding",
        "rescues",
        "notes",
        "experts",
        "seconds",
        "peak_ram_bytes",
        "kernels",
    )
    return figures | {name: result[name] for name in kept}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, required=True, help="trained on and calibrated with")
    parser.add_argument("--evaluate", type=Path, required=True, help="measured on")
    parser.add_argument("--model", type=Path, required=True, help="where the trained model is kept, or is made")
    parser.add_argument("--steps", type=int, default=900, help="of training, each of 1,024 tokens")
    parser.add_argument("--samples", type=int, default=64, help="calibration windows of 256 tokens")
    parser.add_argument("--few", type=int, default=2, help="the same where experts starve")
    parser.add_argument("--windows", type=int, default=64, help="windows that are measured on")
    parser.add_argument("--schemes", default=",".join(SCHEMES), help="with commas between them")
    parser.add_argument("--only", choices=("enough", "few"), help="one of the two calibrations")
    parser.add_argument("--fills", default=",".join(FILLS), help="of the few, with commas between them")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--out", type=Path, help="results file; a line of the same measurement is replaced")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    source = make_model(options.model, options.text, options.steps)
    training = json.loads((options.model / "training.json").read_text(encoding="utf-8"))
    with tempfile.TemporaryDirectory() as temporary:
        folder, works = Path(temporary), {}
        for name, samples in (("enough", options.samples), ("few", options.few)):
            (folder / name).mkdir()
            works[name] = Workload.open(
                source, str(options.model / "calibration.txt"), samples, LENGTH, 0, folder / name, NAME
            )
        original = CausalOriginal(
            open_dense(source)[0], load_tokenizer(source), str(options.evaluate), options.windows, LENGTH
        )

        def tasks() -> Tasks:
            for calibration, scheme, fill in list_runs(options.schemes.split(",")):
                if options.only not in (None, calibration) or (
                    calibration == "few" and fill not in options.fills.split(",")
                ):
                    continue
                work = works[calibration]
                print(f"{calibration} {scheme} {fill}", file=sys.stderr, flush=True)
                head = {
                    "benchmark": "moe",
                    "model": NAME,
                    "scheme": scheme,
                    "variant": f"{calibration}, {fill}",
                    "calibration": calibration,
                    "calibration_tokens": work.windows.numel(),
                    "fill": fill,
                    "recipe": work.recipe(scheme, {}).model_dump(),
                    "windows_sha256": work.windows_sha256,
                    "threads": options.threads or torch.get_num_threads(),
                    **original.about,
                    "training": training,
                }
                yield head, partial(measure_run, work, original, scheme, fill, folder, options.threads)

        run_each(tasks(), options.out)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--fill"]:  # a child of ``measured``: one run of the tool with that fill
        experts.blend_with_prior = partial(blend_otherwise, sys.argv[2])
        quantize_process.main()
    else:
        main()
