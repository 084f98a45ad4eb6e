"""The checkpoint's tokenizer, or None where it has none."""

from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from leangrid.errors import CheckpointError

_FILES = ("tokenizer.json", "tokenizer.model", "vocab.txt", "vocab.json", "tokenizer_config.json")


def load_tokenizer(directory: Path) -> PreTrainedTokenizerBase | None:
    """Read the tokenizer beside the weights; never runs a checkpoint's own code.

    Raises:
        CheckpointError: tokenizer files exist and cannot be read.
    """
    if not any((directory / name).is_file() for name in _FILES):
        return None
    try:
        return AutoTokenizer.from_pretrained(str(directory), local_files_only=True)
    except (ValueError, OSError, KeyError, TypeError, RuntimeError, ImportError) as error:
        raise CheckpointError(
            f"the tokenizer cannot be read: {error}", directory, "Restore the checkpoint's own tokenizer files"
        ) from error
