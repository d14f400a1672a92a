"""The options for getting a float program from a source."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy.typing as npt


@dataclass(frozen=True, slots=True, kw_only=True)
class ProgramOptions:
    """The options for getting a float program from a source.

    Args:
        inputs: example inputs by name, in order; for those without names see `unnamed`. The first axis is the batch.
        dynamic: names of dynamic axes beside the batch, {(input name, axis): axis name}; None: the lengths of token
            sequences, where the model allows other ones.
        fixed_batch: the program's only batch size, `example` for that of the inputs; nothing is dynamic then. None:
            the batch is dynamic, where the model allows it.
        input_names: names for the graph's inputs; None: forward's argument names.
        output_names: names for the graph's outputs; None: `output`, `output_1`, or the keys of a dict.
        computes: whether weights that are computed from other tensors of the model are computed once, and stored.
        shares: whether the program may share the model's tensors, because nothing else will change them.
    """

    inputs: Mapping[str, npt.NDArray[Any]] | None = None
    dynamic: Mapping[tuple[str, int], str] | None = None
    fixed_batch: int | Literal["example"] | None = None
    input_names: tuple[str, ...] | None = None
    output_names: tuple[str, ...] | None = None
    computes: bool = True
    shares: bool = False


def unnamed(count: int) -> tuple[str, ...]:
    """Return the names of inputs that are told apart by their positions only.

    >>> unnamed(1), unnamed(2)
    (('x',), ('x0', 'x1'))
    """
    return ("x",) if count == 1 else tuple(f"x{position}" for position in range(count))
