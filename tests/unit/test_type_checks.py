"""The checks of types and shapes are on while tests run."""

from collections.abc import Callable
from contextlib import suppress

import pytest
import torch
import type_checks
from beartype.roar import BeartypeCallHintViolation
from jaxtyping import TypeCheckError

from leangrid.errors import LeangridError
from leangrid.formats.bit_stream import pack, packed_width
from leangrid.grids import fit_nonuniform


def until_checked(call: Callable[[], object]) -> None:
    """Call as often as it takes for one call to be checked, whatever was called before in this process."""
    for _ in range(type_checks.THEN):
        with suppress(LeangridError, RuntimeError, ValueError):
            call()


def test_a_wrong_type_is_noticed() -> None:
    with pytest.raises(BeartypeCallHintViolation):
        packed_width("8", 4)  # pyright: ignore[reportArgumentType]
    with pytest.raises(TypeCheckError):
        until_checked(lambda: pack(torch.zeros(2, 8), 4))  # codes are uint8


def test_two_shapes_that_do_not_agree_are_noticed() -> None:
    with pytest.raises(TypeCheckError, match="cols"):
        until_checked(lambda: fit_nonuniform(torch.randn(2, 8), torch.ones(7, dtype=torch.float64), 4))


def test_the_first_calls_are_checked_and_then_one_in_some() -> None:
    seen: list[str] = []
    call = type_checks._sometimes(lambda: seen.append("plain"), lambda: seen.append("checked"))
    for _ in range(type_checks.ALWAYS + 2 * type_checks.THEN):
        call()
    assert seen[: type_checks.ALWAYS] == ["checked"] * type_checks.ALWAYS
    assert seen[type_checks.ALWAYS :] == (["plain"] * (type_checks.THEN - 1) + ["checked"]) * 2
