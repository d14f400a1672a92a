"""Palettes: the few values that a weight's codes point to, and how they are found."""
