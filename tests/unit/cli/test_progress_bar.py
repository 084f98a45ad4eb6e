"""Progress: one line a block, a bar on a terminal, and silence rather than a crash where nobody reads."""

import io
from dataclasses import replace

from leangrid.cli.progress_bar import Terminal, line
from leangrid.progress import Event

BLOCK = Event("block", 2, 30, "", 12.5, 1234.5, 5_000_000_000, 125.0)
LAYER = Event("layer", 2, 30, "model.layers.2.mlp.up_proj", 0.25, seconds_left=-1.0)


def shown(*events: Event, interactive: bool = False, quiet: bool = False) -> str:
    stream = io.StringIO()
    with Terminal(stream, quiet=quiet, interactive=interactive) as terminal:
        for event in events:
            terminal(event)
    return stream.getvalue()


def test_a_line_holds_what_is_known() -> None:
    assert line(BLOCK) == "block 3/30  loss 12.5  1,234 tokens/s  5.0 GB  2 min 05 s left"
    assert line(LAYER) == "block 3/30  model.layers.2.mlp.up_proj  loss 0.25"


def test_one_line_a_block_where_there_is_no_terminal() -> None:
    text = shown(
        Event("notice", message="scheme: NU4"), LAYER, LAYER, BLOCK, replace(LAYER, block=3), replace(BLOCK, block=3)
    )
    assert [each.split("  ")[0] for each in text.splitlines()] == ["scheme: NU4", "block 3/30", "block 4/30"]


def test_a_bar_on_a_terminal() -> None:
    text = shown(LAYER, BLOCK, Event("notice", message="[a] notice"), interactive=True)
    assert "model.layers.2.mlp.up_proj" in text and "tokens/s" in text and "[a] notice" in text and "\x1b[" in text
    assert text.count("\n") >= 1


def test_quiet_is_quiet() -> None:
    assert shown(LAYER, BLOCK, Event("notice", message="dequantized first"), quiet=True) == ""


class Broken(io.StringIO):
    def write(self, text: str) -> int:
        raise BrokenPipeError(32, "Broken pipe")


def test_a_closed_reader_ends_the_progress_and_nothing_else() -> None:
    closed = io.StringIO()
    closed.close()
    for stream in (Broken(), closed):
        for interactive in (False, True):
            with Terminal(stream, interactive=interactive) as terminal:
                terminal(BLOCK)
                terminal(replace(BLOCK, block=3))
            assert not terminal.alive


def test_an_encoding_without_the_character_does_not_fail() -> None:
    ascii_only = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    with Terminal(ascii_only, interactive=False) as terminal:
        terminal(Event("notice", message="λ"))
        terminal(BLOCK)
    ascii_only.flush()
    assert b"block 3/30" in ascii_only.buffer.getvalue()  # type: ignore[attr-defined]
