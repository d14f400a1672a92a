"""The digest that a tensor of a file carries: of its name and of what it must decode to."""

from typing import Any

import numpy as np
import numpy.typing as npt

from qcompress.artifacts import digest, short_digest


def tensor_digest(name: str, values: npt.NDArray[Any]) -> str:
    """11 characters for a decoded tensor under its name.

    >>> tensor_digest("a", np.zeros(2)) == tensor_digest("b", np.zeros(2))
    False
    """
    return short_digest(name.encode(), digest(np.asarray(values)).encode())
