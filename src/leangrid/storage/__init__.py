"""Everything that touches the disk: the source checkpoint, the journal of an unfinished run, the published
directory."""
