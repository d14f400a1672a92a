"""Sources: what a model comes in, as named tensors and, where there is one, a float program."""
