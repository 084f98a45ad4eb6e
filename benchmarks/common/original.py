"""The unquantized model, ready to have results compared with it: a causal model on a text, an encoder on the STS
Benchmark."""

import hashlib
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

import leangrid
from leangrid.data.calibration import check_vocabulary, cut_windows, find_affixes, tokenize_text
from leangrid.data.corpora import read_joined_text
from leangrid.evaluation.tasks.sts import Pairs, correlation, embed_sentences
from leangrid.metrics.divergence import ReferenceLogits, divergence
from leangrid.metrics.embedding import cosine_distance
from leangrid.metrics.perplexity import negative_log_likelihood, perplexity


class Original(Protocol):
    """``about`` holds the fields of a result line that say on what is measured and what the original itself reaches."""

    about: dict[str, Any]

    def measure(self, directory: Path) -> dict[str, Any]:
        """The figures of the quantized model in ``directory``."""
        ...


class CausalOriginal:
    """Next-token figures by the functions of ``leangrid eval``. The original runs once, its log-probabilities are
    kept."""

    def __init__(self, model: Any, tokenizer: Any, text: str, windows: int, length: int, device: str = "cpu") -> None:
        self.device = device
        whole, around = read_joined_text(text), find_affixes(tokenizer)
        ids = tokenize_text(tokenizer, whole, around)
        self.windows = cut_windows(ids, length, around)[:windows].clone()
        if len(self.windows) < windows:
            raise SystemExit(
                f"{text}: {len(ids)} tokens are {len(self.windows)} windows of {length}, {windows} are asked for"
            )
        check_vocabulary(self.windows, model.get_input_embeddings().weight.shape[0])
        self.reference = ReferenceLogits(self._logits(model), self.windows)
        self.about = {
            "text": Path(text).name,
            "sha256_of_text": hashlib.sha256(whole.encode("utf-8", "surrogatepass")).hexdigest(),
            "length": length,
            "windows": windows,
            "tokens": windows * (length - 1),
            "reference_perplexity": perplexity(self.reference.nll),
        }

    def measure(self, directory: Path) -> dict[str, Any]:
        """Perplexity, KL per token (mean and 99th percentile, in nats) and top-1 agreement."""
        return self.measure_model(open_dense(directory, self.device)[0])

    @torch.no_grad()
    def measure_model(self, model: Any) -> dict[str, Any]:
        """The same of a model that is open."""
        logits = self._logits(model)
        nll, kl, agrees = [], [], []
        for index, window in enumerate(self.windows):
            found = logits(window)
            compared = divergence(self.reference.log_probs(index), found)
            nll.append(negative_log_likelihood(found, window))
            kl.append(compared.kl)
            agrees.append(compared.agrees)
        every = torch.cat(kl).numpy()
        return {
            "perplexity": perplexity(torch.cat(nll)),
            "kl_mean": float(every.mean()),
            "kl_p99": float(np.quantile(every, 0.99)),
            "kl_stderr_of_windows": float(np.std([float(part.mean()) for part in kl]) / len(kl) ** 0.5),
            "top1_agreement": float(torch.cat(agrees).double().mean()),
        }

    def _logits(self, model: Any) -> Any:
        @torch.no_grad()
        def logits(window: Tensor) -> Tensor:
            return model(input_ids=window[None].to(model.device), use_cache=False).logits[0].float().cpu()

        return logits


class EncoderOriginal:
    """STS Benchmark figures of a sentence encoder. The original's embeddings are kept."""

    def __init__(self, model: Any, tokenizer: Any, text: str) -> None:
        if not text.endswith(".csv"):
            raise SystemExit("an encoder is measured on the STS Benchmark: --text sts-test.csv")
        self.pairs = Pairs.read(Path(text))
        self.embeddings = embed_sentences(model, tokenizer, self.pairs.sentences)
        self.about = {
            "text": Path(text).name,
            "sha256_of_text": self.pairs.sha256,
            "sentences": len(self.pairs.sentences),
            "reference_sts_spearman": correlation(self.embeddings, self.pairs),
        }

    def measure(self, directory: Path) -> dict[str, Any]:
        """The Spearman correlation in points of 100, and the mean over all sentences of 1 - cosine with the original's
        embedding. The second is what ranks two quantizations."""
        model, tokenizer = open_dense(directory)
        found = embed_sentences(model, tokenizer, self.pairs.sentences)
        return {
            "sts_spearman": correlation(found, self.pairs),
            "embedding_cosine_mean": cosine_distance(found, self.embeddings),
        }


def open_dense(directory: Path, device: str = "cpu") -> tuple[Any, Any]:
    """Model and tokenizer with dense weights: in float32 on a CPU, so that no 16-bit rounding of activations is
    measured too; on another device in the dtype that is stored."""
    return leangrid.load(directory, device=device, dtype=torch.float32 if device == "cpu" else None, dense=True)


def open_original(source: Path, text: str, windows: int, length: int, device: str = "cpu") -> Original:
    """The model in ``source``, run on the first ``windows`` x ``length`` tokens of ``text``; SystemExit where it has no
    tokenizer or the text is too short."""
    model, tokenizer = open_dense(source, device)
    if tokenizer is None:
        raise SystemExit(f"{source} has no tokenizer")
    if model.can_generate():
        return CausalOriginal(model, tokenizer, text, windows, length, device)
    return EncoderOriginal(model, tokenizer, text)
