"""Metrics of outputs, and intervals of their differences."""
