"""Compression that needs no training."""
