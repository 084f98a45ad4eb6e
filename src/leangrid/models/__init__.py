"""Models: the table of architectures, transformers modules of which one block is in memory at a time, the walk through
a block, GGUF files as checkpoints."""
