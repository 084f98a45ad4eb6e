"""A non-uniform result in transformers, after ``import leangrid``. On a job of benchmarks/interop.py."""

import run_transformers  # noqa: F401 - the same in every other respect

import leangrid  # noqa: F401 - registers the format
