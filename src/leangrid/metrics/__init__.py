"""Perplexity, and how far two models are apart, as functions of logits and embeddings."""
