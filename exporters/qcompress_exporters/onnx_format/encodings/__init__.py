"""The ways to write a weight: one file each."""
