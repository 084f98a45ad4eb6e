"""The tokenizer of a checkpoint."""

import json
from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from leangrid.errors import CheckpointError, LeangridError, first_line
from leangrid.storage.side_files import refuse_pointers

_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
    "vocab.txt",
    "vocab.json",
    "tekken.json",
)
_JSON = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "config.json",
)
_WAY_OUT = "Restore the checkpoint's own tokenizer files"


def load_tokenizer(directory: Path) -> PreTrainedTokenizerBase | None:
    """Read the tokenizer in a checkpoint's directory; None where there is none. Code of the checkpoint is never run.

    Raises:
        CheckpointError: tokenizer files exist and cannot be read.
    """
    there = [directory / name for name in _FILES if (directory / name).is_file()]
    if not there:
        return None
    try:
        refuse_pointers(directory)
        return AutoTokenizer.from_pretrained(str(directory), local_files_only=True, trust_remote_code=False)
    except (LeangridError, MemoryError):
        raise
    except Exception as error:  # any tokenizer file may raise anything inside of transformers
        raise _refusal(directory, there, error) from error


def _refusal(directory: Path, there: list[Path], error: Exception) -> CheckpointError:
    """The error that names the file at fault or the code that the tokenizer needs, else what transformers said."""
    configs = {}
    for path in (directory / name for name in _JSON):
        try:
            configs[path.name] = json.loads(path.read_bytes()) if path.is_file() else {}
        except (OSError, ValueError, RecursionError) as broken:
            return CheckpointError(
                f"the tokenizer cannot be read: '{path.name}' is no JSON: {first_line(broken)}", path, _WAY_OUT
            )
    strange = next((name for name in _JSON if not isinstance(configs[name], dict)), None)
    if strange is not None:
        return CheckpointError(
            f"the tokenizer cannot be read: '{strange}' is no JSON object", directory / strange, _WAY_OUT
        )
    for name in ("tokenizer_config.json", "config.json"):
        code = configs[name].get("auto_map")
        asked = (
            code.get("AutoTokenizer") if isinstance(code, dict) else code if name == "tokenizer_config.json" else None
        )
        if asked:
            names = ", ".join(str(one) for one in (asked if isinstance(asked, list) else [asked]) if one)
            return CheckpointError(
                f"its tokenizer is code of its own ({names[:80]}), which leangrid never runs",
                directory / name,
                "Save it as tokenizer.json with its own software, and remove auto_map",
            )
    # transformers tries tiktoken where SentencePiece cannot read the file.
    if "tiktoken" in str(error) and (directory / "tokenizer.model").is_file():
        return CheckpointError(
            "'tokenizer.model' is no model of SentencePiece", directory / "tokenizer.model", _WAY_OUT
        )
    names = ", ".join(path.name for path in there)
    return CheckpointError(f"the tokenizer cannot be read from {names}: {first_line(error)}", directory, _WAY_OUT)
