"""Tests; helpers that several of them share are in tests.helpers."""
