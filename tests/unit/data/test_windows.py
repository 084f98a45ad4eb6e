"""Rows with pictures as windows: split, stored, hashed."""

import torch

from leangrid.data.calibration import hash_windows
from leangrid.data.windows import PictureRows


def rows(count: int = 5) -> PictureRows:
    made = []
    for number in range(count):
        ids = torch.arange(3 + number)[None]
        made.append({"input_ids": ids, "pixel_values": torch.full((2, 3), float(number)).bfloat16()})
    return PictureRows(made)


def test_sizes_and_parts() -> None:
    whole = rows()
    assert whole.shape == (5, 7) and whole.numel() == 3 + 4 + 5 + 6 + 7
    assert whole.split(4) == list(whole)  # a batch is one row
    parts = whole.tensor_split(2)
    assert [len(part) for part in parts] == [3, 2] and [*parts[0], *parts[1]] == list(whole)
    assert len(whole[:2]) == 2 and whole[1]["input_ids"].shape == (1, 4)


def test_what_is_stored_is_what_was_there() -> None:
    stored = rows(12).to_tensors() | rows(2).to_tensors("unseen") | {"account": torch.zeros(1)}
    again = PictureRows.from_tensors(stored)
    assert len(again) == 12 and again.sha256() == rows(12).sha256() == hash_windows(again)
    assert len(PictureRows.from_tensors(stored, "unseen")) == 2 and not len(PictureRows.from_tensors({}))


def test_every_tensor_is_in_the_hash() -> None:
    first, changed = rows(2), [dict(row) for row in rows(2)]
    changed[1]["pixel_values"] = changed[1]["pixel_values"] + 1
    hashes = {first.sha256(), rows(3).sha256(), PictureRows(changed).sha256(), PictureRows(list(first)[::-1]).sha256()}
    assert len(hashes) == 4
