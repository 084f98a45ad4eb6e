"""What a run will take before it takes it: the resolved recipe, bytes, seconds, and where things are kept."""
