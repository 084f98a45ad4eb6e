"""What several benchmarks share: the workload, the process that quantizes, the result lines and where they come from."""
