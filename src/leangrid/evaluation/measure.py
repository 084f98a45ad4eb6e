"""One model, or several, measured against one reference on the same windows."""

import gc
import hashlib
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor

from leangrid.data.calibration import affixes, check_vocabulary, cut, tokenize
from leangrid.data.corpora import check, joined
from leangrid.data.documents import Reading
from leangrid.errors import CalibrationError, CheckpointError
from leangrid.evaluation.opened import Opened, open_model
from leangrid.evaluation.tasks import Tasks, prepare, run
from leangrid.evaluation.tasks.kept import Kept, model_identity
from leangrid.metrics.divergence import Reference, divergence
from leangrid.metrics.embedding import cosine_distance, mean_pooled
from leangrid.metrics.perplexity import negative_log_likelihood, perplexity
from leangrid.progress import Event, Progress
from leangrid.storage.hub import locate_source

LENGTH, WINDOWS = 1024, 12
_WHOLE = 1 << 26  # characters; a smaller file is read to its end, and its hash is that of all its text
_OWN_ORIGINAL = "Compare a model with the checkpoint it was made from"


@dataclass(frozen=True)
class Text:
    """The windows of one evaluation and the text they come from."""

    name: str
    sha256: str
    windows: Int64[Tensor, "windows length"]

    @property
    def predicted(self) -> int:
        return self.windows.shape[0] * (self.windows.shape[1] - 1)


def evaluate(
    model: str | Path,
    reference: str | Path | None = None,
    text: str | None = None,
    *,
    length: int | None = None,
    windows: int = WINDOWS,
    device: str = "cpu",
    tasks: Tasks | None = None,
    progress: Progress | None = None,
    text_field: str | None = None,
) -> dict[str, Any]:
    """Measure one model; the keys are those of ``leangrid eval --json``.

    Args:
        model, reference: a leangrid result, a dense checkpoint directory, a hub id or a .gguf file.
        text: wikitext2, c4 (their test splits), embedded, a file or hf:org/name (see data/corpora.py): its first
            ``windows`` x ``length`` tokens, conversations in the reference's chat template. None: wikitext2, or no text
            where there are tasks and no reference.
        text_field: the column of the text's rows; None: text, or conversations.
        length: tokens a window; None: 1024, or as many as the model takes.
        tasks: task figures, under "tasks" by name.

    Returns:
        perplexity and reference_perplexity over windows x (length - 1) predicted tokens, kl_mean and kl_p99 in nats,
        top1_agreement as a share; all None where they do not apply. An encoder has embedding_cosine_mean instead. A
        task that failed has {"error": sentence}; the others keep their figures.

    Raises:
        CalibrationError: too little text, no tokenizer, or a tokenizer that does not fit. CheckpointError: unreadable
        models. TaskError: unknown tasks, or missing data; nothing was run then.
    """
    if tasks is None:
        return evaluate_many(
            [model],
            reference,
            text or "wikitext2",
            length=length,
            windows=windows,
            device=device,
            progress=progress,
            text_field=text_field,
        )[0]
    started = time.perf_counter()
    jobs, kept = prepare(tasks), Kept.open(tasks.out, model_identity(locate_source(str(model))))
    values = _result(str(model), None, None, {}, None, 0.0)
    if text is not None or reference is not None:
        values = evaluate(
            model,
            reference,
            text,
            length=length,
            windows=windows,
            device=device,
            progress=progress,
            text_field=text_field,
        )
    subject = open_model(model, device)
    values["bits_per_weight"] = bits_per_weight(subject.path, subject.model)
    values["tasks"] = run(subject, jobs, kept, progress or (lambda event: None))
    values["seconds"] = round(time.perf_counter() - started, 1)
    kept.write(values)
    return values


@torch.no_grad()
def evaluate_many(
    models: Sequence[str | Path],
    reference: str | Path | None = None,
    text: str = "wikitext2",
    *,
    length: int | None = None,
    windows: int = WINDOWS,
    device: str = "cpu",
    progress: Progress | None = None,
    text_field: str | None = None,
) -> list[dict[str, Any]]:
    """``evaluate`` for each of ``models``, with the reference run once.

    One model is in memory at a time: the reference's log-probabilities are kept (see ``divergence.Reference``) and the
    reference itself is let go before the first model comes in. All models get the reference's tokens.
    """
    started = time.perf_counter()
    check(text, text_field)
    say = progress or (lambda event: None)
    original: Original | None = None
    corpus: Text | None = None
    if reference is not None:
        subject = open_model(reference, device)
        corpus = _text(subject, text, length, windows, text_field, say)
        original = Original.measured(subject, corpus, say)
        del subject
        gc.collect()
    shared_seconds, results = time.perf_counter() - started, []
    for name in models:
        started = time.perf_counter()
        subject = open_model(name, device)
        cut_text = corpus or _text(subject, text, length, windows, text_field, say)
        check_vocabulary(cut_text.windows, _rows(subject.model))
        figures = (
            _causal(subject, cut_text, original, say) if subject.causal else _encoder(subject, cut_text, original, say)
        )
        size = bits_per_weight(subject.path, subject.model)
        seconds = round(time.perf_counter() - started + shared_seconds / len(models), 1)
        results.append(_result(str(name), reference, cut_text, figures, size, seconds))
        del subject
        gc.collect()
    return results


@dataclass(frozen=True)
class Original:
    """What is kept of the reference: log-probabilities, or an encoder's embeddings."""

    distribution: Reference | None
    embeddings: Float[Tensor, "windows width"] | None

    @classmethod
    def measured(cls, subject: Opened, text: Text, say: Progress) -> "Original":
        if subject.causal:
            return cls(Reference(_reporting(subject, text, say), text.windows), None)
        return cls(None, _embeddings(subject, text, say))


def _causal(subject: Opened, text: Text, original: Original | None, say: Progress) -> dict[str, float]:
    if original is not None and original.distribution is None:
        raise CheckpointError(
            "the reference has no language-model head and the model has one", subject.name, _OWN_ORIGINAL
        )
    reference = None if original is None else original.distribution
    logits = _reporting(subject, text, say)
    nll, kl, agrees = [], [], []
    for index, window in enumerate(text.windows):
        found = logits(window)
        nll.append(negative_log_likelihood(found, window))
        if reference is not None:
            compared = divergence(reference.log_probs(index), found)
            kl.append(compared.kl)
            agrees.append(compared.agrees)
    figures = {"perplexity": perplexity(torch.cat(nll))}
    if reference is not None:
        every = torch.cat(kl).numpy()
        figures["reference_perplexity"] = perplexity(reference.nll)
        figures |= {"kl_mean": float(every.mean()), "kl_p99": float(np.quantile(every, 0.99))}
        figures["top1_agreement"] = float(torch.cat(agrees).double().mean())
    return figures


def _encoder(subject: Opened, text: Text, original: Original | None, say: Progress) -> dict[str, float]:
    if original is None or original.embeddings is None:
        what = "a model without a language-model head has no perplexity, only a distance from its original"
        raise CheckpointError(what, subject.name, f"Add --reference. {_OWN_ORIGINAL}")
    return {"embedding_cosine_mean": cosine_distance(original.embeddings, _embeddings(subject, text, say))}


def _embeddings(subject: Opened, text: Text, say: Progress) -> Float[Tensor, "windows width"]:
    found = []
    for index, window in enumerate(text.windows):
        found.append(mean_pooled(subject.model, window.to(_device(subject.model))).cpu())
        say(Event("window", index + 1, len(text.windows), subject.name))
    return torch.stack(found)


def _reporting(subject: Opened, text: Text, say: Progress) -> Callable[[Tensor], Tensor]:
    """Logits of a window, on the CPU in float32, with an event for each."""
    done = 0

    def logits(window: Int64[Tensor, " tokens"]) -> Float[Tensor, "tokens vocab"]:
        nonlocal done
        output: Any = subject.model(input_ids=window[None].to(_device(subject.model)), use_cache=False)
        done += 1
        say(Event("window", (done - 1) % len(text.windows) + 1, len(text.windows), subject.name))
        return output.logits[0].float().cpu()

    return logits


def _text(subject: Opened, name: str, length: int | None, count: int, column: str | None, say: Progress) -> Text:
    if subject.tokenizer is None:
        raise CalibrationError("the model has no tokenizer", subject.name, "Add its tokenizer files to the directory")
    positions = getattr(subject.model.config.get_text_config(), "max_position_embeddings", None)  # type: ignore[union-attr, operator]
    limit = positions if isinstance(positions, int) and positions > 0 else None
    length = length if length is not None else min(LENGTH, limit or LENGTH)
    if limit is not None and length > limit:
        raise CalibrationError(
            f"windows of {length} tokens, but the model takes {limit}", subject.name, f"Use --length {limit}"
        )
    if length < 2 or count < 1:
        raise CalibrationError(
            f"{count} windows of {length} tokens predict nothing", "--windows, --length", "Use at least 1 and 2"
        )
    # The hub's corpora have no end worth reading to, nor have files of gigabytes; 16 characters a token is beyond any
    # tokenizer's average.
    enough, reading = 16 * count * length, Reading(name)
    whole = max(enough, _WHOLE) if name != "c4" and not name.startswith("hf:") else enough
    text = joined(name, enough=whole, column=column, tokenizer=subject.tokenizer, reading=reading)
    for sentence in (*reading.notices(), *([f"{name}: {reading.words()}"] if reading.words() else [])):
        say(Event("notice", message=sentence))
    around = affixes(subject.tokenizer)
    ids = tokenize(subject.tokenizer, text, around)
    candidates = cut(ids, length, around)
    if len(candidates) < count:
        whole = len(candidates)
        way_out = f"Use --windows {whole}" if whole else "Use a shorter --length or more text"
        raise CalibrationError(
            f"too little text: {len(ids):,} tokens, {count * length:,} needed ({count} x {length})", name, way_out
        )
    check_vocabulary(candidates[:count], _rows(subject.model))
    return Text(name, hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest(), candidates[:count].clone())


def _result(
    name: str,
    reference: str | Path | None,
    text: Text | None,
    figures: dict[str, float],
    size: float | None,
    seconds: float,
) -> dict[str, Any]:
    keys = ("perplexity", "reference_perplexity", "kl_mean", "kl_p99", "top1_agreement")
    result: dict[str, Any] = {"model": name, "reference": None if reference is None else str(reference)}
    result |= (
        dict.fromkeys(("text", "sha256_of_text", "length", "windows", "tokens"))
        if text is None
        else {
            "text": text.name,
            "sha256_of_text": text.sha256,
            "length": text.windows.shape[1],
            "windows": text.windows.shape[0],
            "tokens": text.predicted,
        }
    )
    result |= {key: figures.get(key) for key in keys} | {"tasks": {}, "bits_per_weight": size, "seconds": seconds}
    if "embedding_cosine_mean" in figures:
        result["embedding_cosine_mean"] = figures["embedding_cosine_mean"]
    return result


def bits_per_weight(path: Path, model: torch.nn.Module) -> float | None:
    """Of a leangrid result, what its manifest says; of a dense checkpoint or .gguf file, 8 x bytes / parameters; else
    None."""
    try:
        manifest = json.loads((path / "manifest.json").read_text(encoding="utf-8")) if path.is_dir() else {}
    except (OSError, ValueError):
        manifest = {}
    figures = manifest.get("result") if isinstance(manifest, dict) else None
    stated = figures.get("bits_per_weight") if isinstance(figures, dict) else None
    if isinstance(stated, int | float):
        return float(stated)
    if path.is_dir() and getattr(model.config, "quantization_config", None) is not None:
        return None
    files = list(path.glob("*.safetensors")) if path.is_dir() else [path]
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return 8 * sum(file.stat().st_size for file in files) / parameters if parameters and files else None


def _rows(model: Any) -> int | None:
    embedding = model.get_input_embeddings()
    return None if embedding is None else int(embedding.weight.shape[0])


def _device(model: torch.nn.Module) -> torch.device:
    return next(iter((*model.parameters(), *model.buffers()))).device
