"""vLLM's entry point ``vllm.general_plugins``: vLLM calls ``register`` in every process that it starts.

Nothing of vLLM is imported before that, so leangrid is installed and imported without it.
"""

from importlib import import_module


def register() -> None:
    """Add ``quant_method: leangrid`` to vLLM. Calling it again changes nothing."""
    import_module("leangrid.inference.vllm_linear").register()
