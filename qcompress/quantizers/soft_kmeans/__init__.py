"""Soft k-means with gradients: exact, in chunks, or by a table; what DKM is computed with."""
