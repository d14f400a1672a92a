"""Example inputs by position."""

import pytest
import torch

from qcompress.errors import ConfigError
from qcompress.graph.example_inputs import by_position


def test_more_inputs_than_arguments_are_refused():
    message = r"^The model's forward takes 1 inputs, got 2 example inputs\.$"
    with pytest.raises(ConfigError, match=message):
        by_position(torch.nn.Linear(2, 2), (torch.zeros(1, 2), torch.zeros(1, 2)))
