"""The processor of a checkpoint: opened from its own files, without code of theirs and without torchvision."""

import json
from pathlib import Path

import picture_models
import pytest
import tiny_models

from leangrid.errors import CheckpointError
from leangrid.models.processor import load_processor


@pytest.mark.parametrize("name", picture_models.NAMES)
def test_it_takes_text_and_pictures(name: str, tmp_path: Path) -> None:
    found = load_processor(picture_models.save(name, tmp_path))
    assert found is not None and found.image_processor is not None
    text = f"a {found.image_token} b"
    given = found(text=[text], images=[picture_models.picture()], return_tensors="pt")
    assert {"input_ids", "pixel_values"} <= set(given)


def test_none_where_there_are_no_such_files(tmp_path: Path) -> None:
    assert load_processor(tiny_models.save("llama2", tmp_path)) is None


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ('{"image_processor_type": ', "cannot be read from preprocessor_config.json"),
        (json.dumps({"image_processor_type": "NoSuchProcessor"}), "cannot be read from preprocessor_config.json"),
        ("version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "Git LFS pointer"),
    ],
)
def test_broken_files_are_one_sentence(changed: str, said: str, tmp_path: Path) -> None:
    source = picture_models.save("gemma3", tmp_path)
    (source / "processor_config.json").unlink()
    (source / "preprocessor_config.json").write_text(changed)
    with pytest.raises(CheckpointError, match=said):
        load_processor(source)


def test_a_processor_that_takes_no_pictures_is_refused(tmp_path: Path) -> None:
    source = tiny_models.save("llama2", tmp_path)
    (source / "preprocessor_config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="takes no text with pictures"):
        load_processor(source)
