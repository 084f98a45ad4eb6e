"""The result has every file that a loader of the original reads, or the run is refused before it begins."""

import json
import os
from pathlib import Path

import pytest
from safetensors.numpy import save_file
from tiny_run import digest, run, write_source

from leangrid.errors import CheckpointError
from leangrid.storage.hub import locate_source
from leangrid.storage.manifest import list_differences
from leangrid.storage.side_files import find_side_files, list_module_patterns

LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"
READ = (
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "spiece.model",
    "tokenizer.model",
    "sentencepiece.bpe.model",
    "source.spm",
    "target_vocab.json",
    "qwen.tiktoken",
    "tekken.json",
    "bpe.codes",
    "normalizer.json",
    "tokenizer.4.0.0.json",
    "chat_template.jinja",
    "chat_template.json",
    "chat_templates/rag.jinja",
    "additional_chat_templates/tool_use.jinja",
    "generation_config.json",
    "processor_config.json",
    "preprocessor_config.json",
    "video_preprocessor_config.json",
    "sentence_bert_config.json",
    "config_sentence_transformers.json",
    "LICENSE.txt",
)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_source(tmp_path / "source")


def sentence(source: Path, *kinds: str) -> Path:
    """A model of sentence-transformers with these modules after the transformer; those with weights have them."""
    listed = [{"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"}]
    for index, kind in enumerate(kinds, 1):
        listed.append(
            {
                "idx": index,
                "name": str(index),
                "path": f"{index}_{kind}",
                "type": f"sentence_transformers.models.{kind}",
            }
        )
        if kind != "Normalize":
            write(source / f"{index}_{kind}" / "config.json", '{"a": 1}')
        if kind == "Dense":
            import numpy

            save_file(
                {"linear.weight": numpy.ones((8, 8), "float32")}, source / f"{index}_{kind}" / "model.safetensors"
            )
    (source / "modules.json").write_text(json.dumps(listed))
    return source


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


@pytest.mark.fault("O9")
def test_everything_that_a_loader_reads_is_in_the_result_byte_for_byte(source: Path, tmp_path: Path) -> None:
    for name in READ:
        write(source / name, f'{{ "of":   "{name}" }}')
    for name in (
        "modeling_x.py",
        "pytorch_model.bin",
        "README.md",
        "training_args.bin",
        "chat_templates/x.py",
        ".cache.json",
    ):
        write(source / name, "not read")
    run(source, tmp_path / "out")
    held = digest(tmp_path / "out")
    assert {name: held.get(name) for name in READ} == {name: digest(source)[name] for name in READ}
    assert not {"modeling_x.py", "pytorch_model.bin", "training_args.bin", "chat_templates/x.py", ".cache.json"} & set(
        held
    )


@pytest.mark.fault("O9")
def test_no_config_asks_for_code_that_is_not_there(source: Path, tmp_path: Path) -> None:
    config = {
        "image_processor": {"auto_map": {"AutoImageProcessor": "evil.Evil"}, "size": 3},
        "auto_map": {"AutoProcessor": "evil.Evil"},
    }
    write(source / "processor_config.json", json.dumps(config))
    write(source / "vocab.json", '{"auto_map": 3}')
    run(source, tmp_path / "out")
    assert json.loads((tmp_path / "out" / "processor_config.json").read_text()) == {"image_processor": {"size": 3}}
    assert (tmp_path / "out" / "vocab.json").read_text() == '{"auto_map": 3}'


@pytest.mark.fault("O9")
@pytest.mark.parametrize(
    ("name", "target", "text"),
    [
        ("tokenizer.json", "elsewhere/tokenizer.json", "{}"),
        ("vocab.txt", "elsewhere/vocab.txt", "a"),
        ("vocab.txt", "cache/models--org--name/blobs/vocabulary", "a"),
        ("tokenizer.model", "dvc/files/md5/ab/" + "0123456789" * 3, "x"),
        ("tokenizer.json", "data/llama-tokenizer.json", '{"version": "1.0"}'),
    ],
)
def test_a_link_to_the_models_own_file_is_followed(
    source: Path, tmp_path: Path, name: str, target: str, text: str
) -> None:
    (source / name).unlink(missing_ok=True)
    (source / name).symlink_to(write(tmp_path / target, text))
    run(source, tmp_path / "out")
    assert (tmp_path / "out" / name).read_text() == text and not (tmp_path / "out" / name).is_symlink()


@pytest.mark.fault("O9")
@pytest.mark.parametrize(
    ("name", "target", "text", "said"),
    [
        ("vocab.txt", "etc/passwd", "root", "vocab.txt.*leads out"),
        ("generation_config.json", "secret", "secret", "generation_config.json.*leads out"),
        ("special_tokens_map.json", ".docker/config.json", "{}", "special_tokens_map.json.*leads out"),
        ("1_Pooling/config.json", ".docker/config.json", "{}", "1_Pooling/config.json.*leads out"),
        ("added_tokens.json", "list", "[]", "added_tokens.json.*leads out"),
        ("merges.txt", None, "", "merges.txt.*not there"),
        ("tokenizer.model", "x/tokenizer.model", LFS, "Git LFS pointer"),
    ],
)
def test_a_link_that_leads_elsewhere_is_refused_by_name(
    source: Path, tmp_path: Path, name: str, target: str | None, text: str, said: str
) -> None:
    (source / name).parent.mkdir(exist_ok=True)
    (source / name).symlink_to(tmp_path / "gone" if target is None else write(tmp_path / target, text))
    with pytest.raises(CheckpointError, match=said):
        find_side_files(source)


@pytest.mark.fault("O9")
@pytest.mark.parametrize(
    "name",
    ["tokenizer.json", "chat_template.jinja", "vocab.txt", "modules.json", "2_Dense/model.safetensors", "merges.txt"],
)
def test_a_pointer_of_git_lfs_is_named(source: Path, name: str) -> None:
    write(sentence(source, "Pooling", "Dense") / name, LFS)
    with pytest.raises(CheckpointError, match=f"{Path(name).name}.*Git LFS pointer.*git lfs pull"):
        find_side_files(source)


def test_what_is_no_readable_file_is_refused(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (source / "vocab.txt").mkdir()
    with pytest.raises(CheckpointError, match=r"'vocab\.txt' is not a file"):
        find_side_files(source)
    (source / "vocab.txt").rmdir()
    os.mkfifo(source / "vocab.txt")
    with pytest.raises(CheckpointError, match=r"'vocab\.txt' is not a file"):
        find_side_files(source)
    (source / "vocab.txt").unlink()
    monkeypatch.setattr("leangrid.storage.side_files._MOST_BYTES", 1)
    with pytest.raises(CheckpointError, match=r"'tokenizer\.json' has 2 bytes"):
        find_side_files(source)


@pytest.mark.fault("O9")
def test_the_modules_of_sentence_transformers_are_copied_whole(source: Path, tmp_path: Path) -> None:
    sentence(source, "Pooling", "Dense", "Normalize", "Router")
    for name in (
        "query_0_StaticEmbedding/tokenizer.json",
        "query_0_StaticEmbedding/config.json",
        "x.py",
        "pytorch_model.bin",
    ):
        write(source / "4_Router" / name, "{}")
    write(source / "4_Router" / "model.safetensors", "w")
    found, notices = find_side_files(source)
    expected = {
        "tokenizer.json",
        "modules.json",
        "1_Pooling/config.json",
        "2_Dense/config.json",
        "2_Dense/model.safetensors",
        "4_Router/config.json",
        "4_Router/model.safetensors",
        "4_Router/query_0_StaticEmbedding/tokenizer.json",
        "4_Router/query_0_StaticEmbedding/config.json",
    }
    assert set(found) == expected and any("x.py" in notice for notice in notices)
    run(source, tmp_path / "out")
    assert expected <= set(digest(tmp_path / "out")) and list_differences(tmp_path / "out") == []
    assert "2_Dense/*.safetensors" in list_module_patterns(source)


@pytest.mark.fault("O9")
def test_a_module_that_cannot_be_copied_is_refused_by_name(source: Path, tmp_path: Path) -> None:
    sentence(source, "Pooling", "Dense")
    (source / "2_Dense" / "model.safetensors").rename(source / "2_Dense" / "pytorch_model.bin")
    with pytest.raises(
        CheckpointError, match=r"'2_Dense' has pickled weights only \(pytorch_model\.bin\).*as safetensors"
    ):
        find_side_files(source)
    (source / "2_Dense" / "pytorch_model.bin").unlink()
    with pytest.raises(CheckpointError, match="'2_Dense' has no weights"):
        find_side_files(source)
    (source / "2_Dense" / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"'2_Dense' has no config\.json"):
        find_side_files(source)
    (source / "2_Dense").rmdir()
    with pytest.raises(CheckpointError, match=r"'2_Dense', which modules\.json names, is not there"):
        find_side_files(source)
    write(tmp_path / "other" / "config.json", "{}")
    (source / "2_Dense").symlink_to(tmp_path / "other")
    with pytest.raises(CheckpointError, match="2_Dense"):
        find_side_files(source)


@pytest.mark.fault("O9")
@pytest.mark.parametrize("path", ["../other", "/etc", "a/../../b", ".git", "a\\b", "x/" * 7])
def test_a_modules_path_leads_nowhere_else(source: Path, path: str) -> None:
    write(source / "modules.json", json.dumps([{"idx": 0, "path": path, "type": "sentence_transformers.models.Dense"}]))
    with pytest.raises(CheckpointError, match=r"modules\.json.*no folder of the checkpoint"):
        find_side_files(source)


@pytest.mark.parametrize("text", ["{}", "[3]", '[{"type": "x"}]', "[", "[" * 100_000])
def test_a_damaged_list_of_modules_is_refused(source: Path, text: str) -> None:
    with pytest.raises(CheckpointError, match=r"modules\.json"):
        find_side_files(write(source / "modules.json", text).parent)


@pytest.mark.fault("O4")
def test_verify_misses_a_module_that_no_manifest_ever_held(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sentence(source, "Pooling", "Dense", "Normalize")
    monkeypatch.setattr("leangrid.storage.side_files._add_module", lambda *_: None)  # as results were made before
    run(source, tmp_path / "out")
    assert list_differences(tmp_path / "out") == ["2_Dense: named in modules.json, but not there"]


def test_a_download_brings_the_folders_of_the_modules_too(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[list[str]] = []

    def snapshot_download(repo: str, revision: str | None, allow_patterns: list[str]) -> str:
        asked.append(allow_patterns)
        return str(source)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    assert locate_source("org/name") == source and len(asked) == 1 and "*.spm" in asked[0]
    sentence(source, "Pooling", "Dense")
    assert locate_source("org/name") == source and "2_Dense/*.safetensors" in asked[2]
    assert not any(pattern.endswith((".bin", ".py", "/*")) for patterns in asked for pattern in patterns)
