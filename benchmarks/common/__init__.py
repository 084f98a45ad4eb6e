"""What several benchmarks share: the workload, the process that quantizes, result lines and where they come from."""
