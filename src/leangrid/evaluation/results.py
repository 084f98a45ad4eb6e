"""What ``evaluate`` and ``compare`` return."""

from dataclasses import dataclass, field
from typing import Any

from leangrid.results import Result

Number = int | float


@dataclass(frozen=True)
class Evaluation(Result):
    """How one model predicts a text, how far it is from its original, and how well it does tasks.

    Figures that do not apply are None: without a reference those that compare, for an encoder all but
    ``embedding_cosine_mean``, and where only tasks were run everything about the text.

    Attributes:
        model, reference: as they were given.
        text: name of the text; ``sha256_of_text`` is of the text as it was read, UTF-8.
        length, windows: tokens of a window, and how many windows.
        tokens: predicted tokens, windows x (length - 1).
        perplexity, reference_perplexity: of the model and of the reference.
        kl_mean, kl_p99: KL(reference || model) per predicted token in nats, mean and 99th percentile.
        top1_agreement: share of predicted tokens for which both models prefer the same token.
        tasks: figures of each task by its name; {"error": sentence} for one that failed.
        bits_per_weight: of the quantized linears, as the manifest says; of another checkpoint 8 x bytes / parameters.
        seconds: wall time.
        embedding_cosine_mean: mean of 1 - cosine similarity of the embeddings of model and reference; encoders only.

    Example:
        >>> found = leangrid.evaluate("out", text="text.txt", length=32, windows=2)
        >>> found.kl_mean is None, found.perplexity == found.to_dict()["perplexity"]
        (True, True)
    """

    model: str
    reference: str | None = None
    text: str | None = None
    sha256_of_text: str | None = None
    length: int | None = None
    windows: int | None = None
    tokens: int | None = None
    perplexity: float | None = None
    reference_perplexity: float | None = None
    kl_mean: float | None = None
    kl_p99: float | None = None
    top1_agreement: float | None = None
    tasks: dict[str, dict[str, Any]] = field(default_factory=dict)
    bits_per_weight: float | None = None
    seconds: float = 0.0
    embedding_cosine_mean: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """The object that ``leangrid eval --json`` prints; ``embedding_cosine_mean`` is there for encoders only."""
        values = super().to_dict()
        if self.embedding_cosine_mean is None:
            del values["embedding_cosine_mean"]
        return values


@dataclass(frozen=True)
class ComparedResult:
    """One result of a comparison. What was not recorded or not measured is None.

    Attributes:
        name: the last part of the directory's path.
        scheme, format, bits_per_weight: as in its manifest.
        bytes: size of the files with the weights.
        loss, loss_minmax, loss_rounding: sums over the layers of tr(E H E^T)/2: of the result, of min-max GPTQ, of
            rounding.
        perplexity, kl_mean, kl_p99, top1_agreement, embedding_cosine_mean: as in ``Evaluation``.
        seconds: what the run took.
        front: whether no other result is both smaller and nearer to the original.
    """

    name: str
    scheme: str | None
    format: str | None
    bits_per_weight: Number | None
    bytes: int
    loss: Number | None
    loss_minmax: Number | None
    loss_rounding: Number | None
    perplexity: Number | None
    kl_mean: Number | None
    kl_p99: Number | None
    top1_agreement: Number | None
    embedding_cosine_mean: Number | None
    seconds: Number | None
    front: bool = False

    @property
    def distance(self) -> Number | None:
        """How far from the original: mean KL, of an encoder 1 - cosine."""
        return self.kl_mean if self.kl_mean is not None else self.embedding_cosine_mean


@dataclass(frozen=True)
class Comparison(Result):
    """Several results side by side.

    Attributes:
        rows: one for each directory, in the order given.
        measured_on: a sentence that says which text the figures are from.
        reference: as it was given.
        reference_perplexity: of the original, where all figures have the same.
        plot: the file that was written; None where none was asked for.

    Example:
        >>> found = leangrid.compare(["out"])
        >>> found.measured_on
        'by the quality gate of each run, on the first calibration windows'
        >>> [(row.name, row.distance > 0) for row in found.rows]
        [('out', True)]
    """

    rows: list[ComparedResult]
    measured_on: str
    reference: str | None
    reference_perplexity: Number | None
    plot: str | None
