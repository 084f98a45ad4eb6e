"""The machine a run uses: its memory, its devices, its arithmetic, and the time and operations a run takes."""
