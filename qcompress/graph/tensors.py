"""The tensors of a program: their names and kinds for a plan, and checks of their values."""

from typing import Final

import numpy as np
import torch

from qcompress.errors import SourceError
from qcompress.graph.layers import weight_layers
from qcompress.graph.program import FloatProgram
from qcompress.kinds import kind_without_layer
from qcompress.plan.resolve import Named

_FOLDING_TOLERANCE: Final = 1e-2  # of an output's largest value


def program_tensors(program: FloatProgram) -> list[Named]:
    """Return the tensors of a program for its plan: weights in the order in which they run, then all others."""
    layers, state, aliases = weight_layers(program), program.state(), program.aliases()
    rest = {
        name: kind_without_layer(tuple(value.shape)) if value.is_floating_point() else "other"
        for name, value in state.items()
        if name not in layers
    }
    kinds = {name: layer.kind for name, layer in layers.items()} | rest
    return [Named(name, kind, aliases.get(name, ())) for name, kind in kinds.items() if name in state]


def check_finite(program: FloatProgram) -> None:
    """Refuse NaN and Inf in any floating tensor of a program.

    Raises:
        SourceError: names the first such tensor and how many of its values are affected.
    """
    for name, value in program.state().items():
        if value.is_floating_point():
            count = int((~torch.isfinite(value)).sum())
            if count:
                raise SourceError(
                    f"{name} must be finite, but {count} of its {value.numel()} values are NaN or Inf: "
                    "`qcompress analyze MODEL` counts them for each tensor; repair or retrain the model."
                )


def check_same_function(program: FloatProgram, folded: FloatProgram) -> None:
    """Assert that folding BatchNorm changed no output on random inputs: nothing later compares with the original.

    Args:
        program: the program before folding.
        folded: the program after it.
    """
    inputs = program.random_inputs()
    try:
        wanted = program.run(inputs)
    except Exception:  # random values are invalid for some inputs
        return
    for name, values in folded.run(inputs).items():
        if values.dtype.kind == "f" and np.isfinite(wanted[name]).all():
            off = float(np.abs(values - wanted[name]).max(initial=0.0))
            size = float(np.abs(wanted[name]).max(initial=0.0))
            assert off <= _FOLDING_TOLERANCE * max(size, 1.0), f"folding BatchNorm changed output {name} by {off}"
