"""The digests of tensors that a file carries: of a tensor's name and the values that it must decode to."""

from typing import Any

import numpy as np
import numpy.typing as npt

from qcompress.artifacts.digest import digest, short_digest


def tensor_digest(name: str, values: npt.NDArray[Any]) -> str:
    """11 characters for a decoded tensor under its name.

    >>> tensor_digest("a", np.zeros(2)) == tensor_digest("b", np.zeros(2))
    False
    """
    return short_digest(name.encode(), digest(np.asarray(values)).encode())
