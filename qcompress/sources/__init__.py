"""Sources of models: their named tensors and, if there is one, their float program."""
