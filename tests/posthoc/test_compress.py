"""What `compress` asks for."""

import inspect

import pytest
import torch

import qcompress as qc
from qcompress.errors import ConfigError
from qcompress.posthoc.settings import DEFAULTS


def test_the_model_needs_a_batch_to_be_traced_with():
    message = r"^compress needs example_inputs=\(x,\) or calibration data: one batch to trace the model with\.$"
    with pytest.raises(ConfigError, match=message):
        qc.compress(torch.nn.Linear(8, 4).eval(), qc.Plan.from_flags(bits=2))


def test_its_arguments_are_the_settings_with_their_defaults():
    arguments = inspect.signature(qc.compress).parameters
    assert {name: arguments[name].default for name in DEFAULTS.__slots__} == {
        name: getattr(DEFAULTS, name) for name in DEFAULTS.__slots__
    }
