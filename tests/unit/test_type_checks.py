"""The checks of types and shapes are on while tests run."""

import pytest
import torch
from beartype.roar import BeartypeCallHintViolation
from jaxtyping import TypeCheckError

from leangrid.formats.bit_stream import pack, packed_width
from leangrid.grids import fit_nonuniform


def test_a_wrong_type_is_noticed() -> None:
    with pytest.raises(BeartypeCallHintViolation):
        packed_width("8", 4)  # pyright: ignore[reportArgumentType]
    with pytest.raises(TypeCheckError):
        pack(torch.zeros(2, 8), 4)  # codes are uint8


def test_two_shapes_that_do_not_agree_are_noticed() -> None:
    with pytest.raises(TypeCheckError, match="cols"):
        fit_nonuniform(torch.randn(2, 8), torch.ones(7, dtype=torch.float64), 4)
