"""What models are run on: the arguments of their forward passes."""

import torch
from torch import Tensor, nn

from leangrid.models.model_inputs import arguments_of, moved_inputs, takes_argument, takes_pictures, token_ids

IDS = torch.arange(6).view(1, 6)


class Text(nn.Module):
    def forward(self, input_ids: Tensor, use_cache: bool = True, decoder_input_ids: Tensor | None = None) -> None: ...


class Pictures(nn.Module):
    def forward(self, input_ids: Tensor, pixel_values: Tensor | None = None, **kwargs: object) -> None: ...


class Pages(nn.Module):
    def forward(self, input_ids: Tensor, bbox: Tensor | None = None) -> None: ...


def test_text_is_read_without_a_cache() -> None:
    assert arguments_of(Text(), IDS) == {"input_ids": IDS, "use_cache": False, "decoder_input_ids": IDS}
    assert arguments_of(Pages(), IDS)["bbox"].shape == (1, 6, 4) and "use_cache" not in arguments_of(Pages(), IDS)


def test_a_row_is_given_as_it_is() -> None:
    row = {"input_ids": IDS, "pixel_values": torch.ones(1, 3, 2, 2)}
    assert token_ids(row) is IDS and arguments_of(Pictures(), row) == {**row, "use_cache": False}
    moved = moved_inputs(row, "cpu", torch.bfloat16)
    assert not isinstance(moved, Tensor)
    assert moved["pixel_values"].dtype == torch.bfloat16 and moved["input_ids"].dtype == torch.int64


def test_what_a_module_takes() -> None:
    assert takes_pictures(Pictures()) and not takes_pictures(Text())
    assert takes_argument(Pictures(), "anything") and not takes_argument(Text(), "pixel_values")
