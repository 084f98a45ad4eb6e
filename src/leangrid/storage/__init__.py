"""Everything that reads checkpoints and writes results: source files, the journal of a run, finished directories."""
