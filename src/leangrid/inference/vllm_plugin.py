"""vLLM's door: the entry point ``vllm.general_plugins`` calls ``register`` in every process that vLLM starts.

Nothing of vLLM is imported before that, so leangrid stays installable and importable without it.
"""

from importlib import import_module


def register() -> None:
    """Add ``quant_method: leangrid`` to vLLM. Calling it again changes nothing."""
    import_module("leangrid.inference.vllm_linear").register()
