"""How far a quantized model is from its original: perplexity, KL per token, top-1 agreement, embedding distance."""

from leangrid.evaluate.measure import evaluate, evaluate_many

__all__ = ["evaluate", "evaluate_many"]
