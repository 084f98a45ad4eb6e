"""A quantized directory as a model that answers: layers, loading, transformers' and vLLM's entry points."""
