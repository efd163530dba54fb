"""One run carried out by several processes: who they are, how the model lies among them, and their checkpoints."""
