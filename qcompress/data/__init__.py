"""Data files, samples and arrays."""
