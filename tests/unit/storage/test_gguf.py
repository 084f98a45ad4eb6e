"""storage/gguf.py: gguf-py reads what it writes."""

from pathlib import Path

import gguf
import numpy as np
import pytest
import torch

from leangrid.errors import FormatError
from leangrid.storage.gguf import Field, TensorEntry, save

FIELDS = {
    "general.architecture": Field("string", "llama"),
    "a.text": Field("string", "Grüße, 世界 \U0001f600"),
    "a.count": Field("uint32", 2**32 - 1),
    "a.negative": Field("int8", -128),
    "a.large": Field("uint64", 2**63),
    "a.float": Field("float32", 0.1),
    "a.double": Field("float64", 0.1),
    "a.yes": Field("bool", True),
    "a.words": Field("string", ["", "b", "\u2581c"]),
    "a.numbers": Field("int32", [1, -2, 3]),
}


def entry(tensor: torch.Tensor, number: int) -> TensorEntry:
    return TensorEntry(tuple(tensor.shape), number, tensor.numel() * tensor.element_size(), lambda: tensor)


def test_the_reference_reader_finds_every_field_and_tensor(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    vector, matrix = torch.randn(7, generator=generator), torch.randn(3, 5, generator=generator).half()
    blocks = torch.randint(0, 256, (2, 36), generator=generator, dtype=torch.uint8)  # Q4_0: 64 columns a row
    entries = {
        "a": entry(vector, 0),
        "b.weight": entry(matrix, 1),
        "c": TensorEntry((2, 64), 2, 72, lambda: [blocks.numpy().tobytes()]),
    }
    save(tmp_path / "x.gguf", FIELDS, entries)
    reader = gguf.GGUFReader(str(tmp_path / "x.gguf"))
    for key, field in FIELDS.items():
        found = reader.fields[key]
        assert found.types[-1].name.lower() == field.kind
        assert (list(found.contents()) if isinstance(field.value, list) else found.contents()) == (
            pytest.approx(field.value, rel=1e-7) if field.kind == "float32" and field.value else field.value
        )
    read = {tensor.name: tensor for tensor in reader.tensors}
    assert list(read) == list(entries)
    assert np.array_equal(read["a"].data, vector.numpy()) and np.array_equal(read["b.weight"].data, matrix.numpy())
    assert np.array_equal(read["c"].data, blocks.numpy()) and list(read["c"].shape) == [64, 2]
    assert all(tensor.data_offset % 32 == 0 for tensor in reader.tensors)


@pytest.mark.parametrize(
    ("fields", "name", "words"),
    [
        ({"k": Field("uint32", -1)}, "a", "GGUF field k"),
        ({"k": Field("uint8", "x")}, "a", "GGUF field k"),
        ({}, "a" * 64, "63 bytes"),
    ],
)
def test_what_the_format_cannot_hold_is_refused(fields: dict, name: str, words: str, tmp_path: Path) -> None:
    with pytest.raises(FormatError, match=words):
        save(tmp_path / "x.gguf", fields, {name: entry(torch.zeros(1), 0)})
    assert list(tmp_path.iterdir()) == []


def test_a_tensor_of_another_size_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="4 bytes were made of a tensor of 8"):
        save(tmp_path / "x.gguf", {}, {"a": TensorEntry((2,), 0, 8, lambda: torch.zeros(1))})
    assert list(tmp_path.iterdir()) == []
