"""Metrics of model outputs, and confidence intervals of their differences."""
