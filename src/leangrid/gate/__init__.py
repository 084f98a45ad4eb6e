"""The finished files opened again and held against the original, before the result gets its name."""
