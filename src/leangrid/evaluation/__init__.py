"""How far a quantized model is from its original (perplexity, KL per token, top-1 agreement, distance of embeddings),
and how well it does tasks."""

from leangrid.evaluation.measure import evaluate, evaluate_many
from leangrid.evaluation.results import ComparedResult, Comparison, Evaluation
from leangrid.evaluation.tasks import Tasks

__all__ = ["ComparedResult", "Comparison", "Evaluation", "Tasks", "evaluate", "evaluate_many"]
