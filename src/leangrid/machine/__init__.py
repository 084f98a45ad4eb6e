"""What this machine has: memory, devices, arithmetic, and where time and operations went."""
