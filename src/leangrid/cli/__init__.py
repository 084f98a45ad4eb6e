"""The command line ``leangrid``."""
