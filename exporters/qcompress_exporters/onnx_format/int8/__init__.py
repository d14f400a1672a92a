"""Layers that compute in integers."""
