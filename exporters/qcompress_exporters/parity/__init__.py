"""The proof that a file computes what the compressed model says."""
