"""One model, or several, measured against one reference on the same windows."""

import gc
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor

from leangrid.data.calibration import check_vocabulary
from leangrid.data.corpora import check_corpus
from leangrid.errors import CheckpointError, first_line
from leangrid.evaluation.opened import Opened, load_model
from leangrid.evaluation.results import Evaluation
from leangrid.evaluation.tasks import Tasks, prepare_tasks, run_tasks
from leangrid.evaluation.tasks.saved_results import SavedResults, identify_model
from leangrid.evaluation.windows import WINDOWS, TextRequest, TextWindows, read_windows
from leangrid.metrics.divergence import ReferenceLogits, divergence
from leangrid.metrics.embedding import cosine_distance, mean_pooled
from leangrid.metrics.perplexity import negative_log_likelihood, perplexity
from leangrid.progress import Event, Progress
from leangrid.storage.hub import locate_source
from leangrid.storage.manifest import read_manifest

_OWN_ORIGINAL = "Compare a model with the checkpoint it was made from"
_JUDGED = "What quantize measured of its blocks stands in the result's manifest.json, under quality"


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
) -> Evaluation:
    """Measure one model: perplexity of a text, distance from the original, tasks.

    Args:
        model, reference: a leangrid result, a dense checkpoint directory, a hub id or a .gguf file. None for
            ``reference``: the model alone is measured.
        text: wikitext2, c4 (their test splits), embedded, a file or hf:org/name (see data/corpora.py): its first
            ``windows`` x ``length`` tokens, conversations in the reference's chat template. None: wikitext2, or no text
            where there are tasks and no reference.
        length: tokens of a window; None: 1024, or as many as the model takes.
        windows: how many windows.
        device: where the models run, such as ``cpu`` or ``cuda``.
        tasks: tasks to run as well; None: none.
        progress: is called with an Event after every window and before every task.
        text_field: the column of the text's rows; None: text, or conversations.

    Returns:
        The figures; ``to_dict()`` gives them under the keys of ``leangrid eval --json``.

    Raises:
        CalibrationError: too little text, no tokenizer, or a tokenizer that does not fit. CheckpointError: a model that
            cannot be read, or an encoder without a reference. TaskError: unknown tasks, or missing data; nothing was
            run then.

    Example:
        >>> found = leangrid.evaluate("out", reference="model", text="text.txt", length=32, windows=2)
        >>> found.tokens, found.kl_mean > 0, found.top1_agreement <= 1
        (62, True, True)
    """
    request, say = TextRequest(text or "wikitext2", length, windows, text_field), progress or (lambda event: None)
    if tasks is None:
        return _measure([model], reference, request, device, say)[0]
    started = time.perf_counter()
    jobs = prepare_tasks(tasks)
    saved = SavedResults.open(tasks.out, identify_model(locate_source(str(model))))
    found = Evaluation(str(model))
    if text is not None or reference is not None:
        found = _measure([model], reference, request, device, say)[0]
    subject = load_model(model, device)
    size = bits_per_weight(subject.path, subject.model)
    figures = run_tasks(subject, jobs, saved, say)
    found = replace(found, tasks=figures, bits_per_weight=size, seconds=round(time.perf_counter() - started, 1))
    saved.write(found.to_dict())
    return found


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
) -> list[Evaluation]:
    """``evaluate`` for each of ``models``, with the reference run once and its tokens for all of them.

    One model is in memory at a time: the reference's log-probabilities are held (see ``divergence.ReferenceLogits``),
    and the reference itself is freed before the first model is loaded."""
    request = TextRequest(text, length, windows, text_field)
    return _measure(models, reference, request, device, progress or (lambda event: None))


@torch.no_grad()
def _measure(
    models: Sequence[str | Path], reference: str | Path | None, request: TextRequest, device: str, say: Progress
) -> list[Evaluation]:
    started = time.perf_counter()
    check_corpus(request.name, request.column)
    original: Original | None = None
    shared: TextWindows | None = None
    if reference is not None:
        subject = load_model(reference, device)
        shared = read_windows(subject, request, say)
        original = Original.measure(subject, shared, say)
        del subject
        gc.collect()
    shared_seconds, results = time.perf_counter() - started, []
    for name in models:
        started = time.perf_counter()
        subject = load_model(name, device)
        windows = shared or read_windows(subject, request, say)
        check_vocabulary(windows.tokens, subject.embedding_rows)
        measure = _measure_decoder if subject.has_lm_head else _measure_encoder
        found = Evaluation(
            model=str(name),
            reference=None if reference is None else str(reference),
            text=windows.name,
            sha256_of_text=windows.sha256,
            length=windows.tokens.shape[1],
            windows=windows.tokens.shape[0],
            tokens=windows.predicted,
            **measure(subject, windows, original, say),
            bits_per_weight=bits_per_weight(subject.path, subject.model),
        )
        seconds = time.perf_counter() - started + shared_seconds / len(models)
        results.append(replace(found, seconds=round(seconds, 1)))
        del subject
        gc.collect()
    return results


@dataclass(frozen=True)
class Original:
    """What is held of the reference: its log-probabilities, or an encoder's embeddings."""

    distribution: ReferenceLogits | None
    embeddings: Float[Tensor, "windows width"] | None

    @classmethod
    def measure(cls, subject: Opened, windows: TextWindows, say: Progress) -> "Original":
        """Run the reference on all windows."""
        if subject.has_lm_head:
            return cls(ReferenceLogits(_logits_of(subject, windows, say), windows.tokens), None)
        return cls(None, _embeddings(subject, windows, say))


def _measure_decoder(subject: Opened, windows: TextWindows, original: Original | None, say: Progress) -> dict[str, Any]:
    if original is not None and original.distribution is None:
        what = "the reference has no language-model head and the model has one"
        raise CheckpointError(what, subject.name, _OWN_ORIGINAL)
    reference = None if original is None else original.distribution
    logits_of = _logits_of(subject, windows, say)
    nll, kl, agrees = [], [], []
    for index, window in enumerate(windows.tokens):
        logits = logits_of(window)
        nll.append(negative_log_likelihood(logits, window))
        if reference is not None:
            compared = divergence(reference.log_probs(index), logits)
            kl.append(compared.kl)
            agrees.append(compared.agrees)
    figures = {"perplexity": perplexity(torch.cat(nll))}
    if reference is not None:
        every = torch.cat(kl).numpy()
        figures["reference_perplexity"] = perplexity(reference.nll)
        figures |= {"kl_mean": float(every.mean()), "kl_p99": float(np.quantile(every, 0.99))}
        figures["top1_agreement"] = float(torch.cat(agrees).double().mean())
    return figures


def _measure_encoder(subject: Opened, windows: TextWindows, original: Original | None, say: Progress) -> dict[str, Any]:
    if original is None or original.embeddings is None:
        what = "a model without a language-model head has no perplexity, only a distance from its original"
        raise CheckpointError(what, subject.name, f"Add --reference. {_OWN_ORIGINAL}")
    return {"embedding_cosine_mean": cosine_distance(original.embeddings, _embeddings(subject, windows, say))}


def _embeddings(subject: Opened, windows: TextWindows, say: Progress) -> Float[Tensor, "windows width"]:
    found = []
    for index, window in enumerate(windows.tokens):
        found.append(mean_pooled(subject.model, window.to(subject.device)).cpu())
        say(Event("window", index + 1, len(windows.tokens), subject.name))
    return torch.stack(found)


def _logits_of(subject: Opened, windows: TextWindows, say: Progress) -> Callable[[Tensor], Tensor]:
    """A function from a window to its logits, on the CPU in float32, which also reports an event for each window."""
    done = 0

    def logits(window: Int64[Tensor, " tokens"]) -> Float[Tensor, "tokens vocab"]:
        nonlocal done
        try:
            output = subject.model(input_ids=window[None].to(subject.device), use_cache=False)
        except (TypeError, ValueError, AttributeError) as error:  # it asks for pictures, or for another text
            what = f"the model says nothing to text alone: {first_line(error)}"
            raise CheckpointError(what, subject.name, _JUDGED) from error
        if output.logits.shape[1] != len(window):
            raise CheckpointError("the model answers a text with another one", subject.name, _JUDGED)
        done += 1
        say(Event("window", (done - 1) % len(windows.tokens) + 1, len(windows.tokens), subject.name))
        return output.logits[0].float().cpu()

    return logits


def bits_per_weight(path: Path, model: torch.nn.Module) -> float | None:
    """Bits of a weight: for a leangrid result what its manifest says, for a dense checkpoint or .gguf file 8 x bytes /
    parameters, else None."""
    try:
        manifest = read_manifest(path) if path.is_dir() else {}
    except (OSError, ValueError):
        manifest = {}
    figures = manifest.get("result")
    stated = figures.get("bits_per_weight") if isinstance(figures, dict) else None
    if isinstance(stated, int | float):
        return float(stated)
    if path.is_dir() and getattr(model.config, "quantization_config", None) is not None:
        return None
    files = list(path.glob("*.safetensors")) if path.is_dir() else [path]
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return 8 * sum(file.stat().st_size for file in files) / parameters if parameters and files else None
