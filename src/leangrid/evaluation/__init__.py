"""How far a quantized model is from its original: perplexity, KL per token, top-1 agreement, embedding distance; and
tasks."""

from leangrid.evaluation.measure import evaluate, evaluate_many
from leangrid.evaluation.tasks import Tasks

__all__ = ["Tasks", "evaluate", "evaluate_many"]
