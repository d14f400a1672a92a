"""Limits, and the verdicts on them."""
