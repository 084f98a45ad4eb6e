"""How far a quantized model is from its original: perplexity, KL per token, top-1 agreement, embedding distance; and tasks."""

from leangrid.evaluate.measure import evaluate, evaluate_many
from leangrid.evaluate.tasks import Tasks

__all__ = ["Tasks", "evaluate", "evaluate_many"]
