"""The command line: parse, one call, one exit code."""
