"""Parity: checks that a file computes the same as the compressed model."""
