"""Whether Triton can compile and launch on this machine."""

from triton.runtime import driver


def check() -> None:
    """Raises what Triton raises where it cannot: no driver, no C compiler for its launcher, a GPU it does not know."""
    driver.active.get_current_target()
