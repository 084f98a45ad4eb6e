"""What another library says, in one line that still names the cause."""

import pytest

from leangrid.errors import first_line


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (ValueError("one\ntwo"), "one"),
        (
            ValueError("wrong field 'rope_parameters':\n    TypeError: a string"),
            "wrong field 'rope_parameters': TypeError: a string",
        ),
        (KeyError("swish_foo"), "it does not know 'swish_foo'"),
        (ValueError(""), "ValueError"),
        (ValueError("ends with a colon:"), "ends with a colon:"),
    ],
)
def test_the_cause_is_in_the_line(error: Exception, said: str) -> None:
    assert first_line(error) == said


def test_it_stays_short() -> None:
    assert len(first_line(ValueError("x" * 1000))) == 200
