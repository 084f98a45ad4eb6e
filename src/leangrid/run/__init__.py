"""One run from a checkpoint to a finished result."""
