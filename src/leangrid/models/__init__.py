"""The model: which linears a block holds, one block in memory at a time, and the walk through it."""
