"""The training loop: steps, order of text, checkpoints, processes."""
