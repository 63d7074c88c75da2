"""Training layer by layer, on a teacher's own values."""
