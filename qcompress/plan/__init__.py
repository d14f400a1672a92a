"""The plan: which settings each weight gets."""
