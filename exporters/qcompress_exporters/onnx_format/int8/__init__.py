"""Compute in integers: activations, layers and tensors each have an object of their own; three ways to write layers."""
