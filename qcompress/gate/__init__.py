"""Limits for files, and verdicts on whether they are kept."""
