"""Example inputs by name, from example inputs by position."""

import inspect

import torch

from qcompress.errors import ConfigError


def by_position(model: torch.nn.Module, example_inputs: tuple[torch.Tensor, ...]) -> dict[str, torch.Tensor]:
    """Return example inputs by the names of the arguments of the model's forward.

    Args:
        model: the module.
        example_inputs: tensors in the order of forward's arguments; later arguments may be left out.

    Raises:
        ConfigError: there are more tensors than arguments.

    >>> list(by_position(torch.nn.Linear(2, 2), (torch.zeros(1, 2),)))
    ['input']
    """
    names = list(inspect.signature(model.forward).parameters)
    if len(example_inputs) > len(names):
        raise ConfigError(f"The model's forward takes {len(names)} inputs, got {len(example_inputs)} example inputs.")
    return dict(zip(names, example_inputs, strict=False))
