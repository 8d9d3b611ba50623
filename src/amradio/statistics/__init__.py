"""Mathematics of features as distributions. Knows tensors; runs no model and reads no file."""
