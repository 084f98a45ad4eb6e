"""A non-uniform result in transformers, after ``import leangrid``. On a job of benchmarks/interop.py."""

from run_transformers import main

import leangrid  # noqa: F401 - registers the format; the rest is the same

main()
