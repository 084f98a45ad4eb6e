"""``python -m leangrid`` is ``leangrid``."""

from leangrid.cli.app import main

main()
