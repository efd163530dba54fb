"""Training: what a run is, the loop that carries it out, its checkpoints, and many runs side by side."""
