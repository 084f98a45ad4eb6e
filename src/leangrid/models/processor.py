"""The processor of a checkpoint, which makes a model's inputs of text and pictures."""

import importlib.util
from pathlib import Path
from typing import Any

from transformers import AutoConfig, AutoProcessor
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING

from leangrid.errors import CheckpointError, LeangridError, first_line
from leangrid.storage.side_files import refuse_pointers

_FILES = ("processor_config.json", "preprocessor_config.json")
_WAY_OUT = "Restore the checkpoint's own processor files, or calibrate by text"


def load_processor(directory: Path) -> Any | None:
    """Read transformers' processor for text and pictures in a checkpoint's directory; None where its files are not
    there. Code of the checkpoint is never run.

    Where torchvision is not installed, pictures are prepared by Pillow, and a processor that also takes videos is
    opened without that part.

    Raises:
        CheckpointError: the files cannot be read, are no processor for pictures, or need a package that is not here.
    """
    there = [directory / name for name in _FILES if (directory / name).is_file()]
    if not there:
        return None
    _require_pillow(directory)
    names = ", ".join(path.name for path in there)
    try:
        refuse_pointers(directory)
        try:
            found = AutoProcessor.from_pretrained(str(directory), local_files_only=True, trust_remote_code=False)
        except ImportError:  # torchvision, without which transformers has no processors for videos
            found = _without_videos(directory)
    except (LeangridError, MemoryError):
        raise
    except ImportError as error:
        what = f"its processor needs a package that is not installed: {first_line(error)}"
        raise CheckpointError(what, directory, "Install it (pip install torchvision), or calibrate by text") from error
    except Exception as error:  # any of the files may raise anything inside of transformers
        what = f"the processor cannot be read from {names}: {first_line(error)}"
        raise CheckpointError(what, directory, _WAY_OUT) from error
    if getattr(found, "image_processor", None) is None or getattr(found, "tokenizer", None) is None:
        what = f"{names} hold a {type(found).__name__}, which takes no text with pictures"
        raise CheckpointError(what, directory, _WAY_OUT)
    return found


def _require_pillow(directory: Path) -> None:
    if importlib.util.find_spec("PIL") is None:
        what = "pictures are read with the package Pillow, which is not installed"
        raise CheckpointError(what, directory, "pip install pillow, or calibrate by text")


def _without_videos(directory: Path) -> Any:
    """The processor without its part for videos."""
    config = AutoConfig.from_pretrained(str(directory), local_files_only=True, trust_remote_code=False)
    named = PROCESSOR_MAPPING[type(config)]

    class WithoutVideos(named):  # pyright: ignore[reportGeneralTypeIssues, reportUntypedBaseClass]
        """Its class, of the parts that need no torchvision."""

        @classmethod
        def get_attributes(cls) -> list[str]:
            return [name for name in super().get_attributes() if "video" not in name]

    return WithoutVideos.from_pretrained(str(directory), local_files_only=True, trust_remote_code=False)
