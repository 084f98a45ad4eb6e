"""The same codes in another engine's container or file."""
