"""Model families, their weights, caches and checkpoints."""
