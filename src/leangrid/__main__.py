"""``python -m leangrid`` is ``leangrid``."""

from leangrid.cli import main

main()
