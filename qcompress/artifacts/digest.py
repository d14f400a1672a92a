"""Short digests of tensors and texts."""

import base64
import hashlib
from typing import Any

import numpy as np
import numpy.typing as npt


def digest(values: npt.NDArray[Any]) -> str:
    """Return a short digest of a decoded tensor: 11 characters, 66 bits of SHA-256 over dtype, shape and bytes.

    >>> digest(np.zeros(3, np.float32)), digest(np.zeros(4, np.float32))
    ('hl831PiDsz5', 'J6L4CB6Zs0X')
    """
    values = np.asarray(values, order="C")
    head = f"{values.dtype.str}{list(values.shape)}".encode()
    return short_digest(head, values.reshape(-1).view(np.uint8).data)  # no copy


def short_digest(*parts: bytes | memoryview) -> str:
    """Return 11 characters (66 bits) of the SHA-256 over `parts`, URL-safe.

    >>> short_digest(b"abc") == short_digest(b"a", b"bc")
    True
    """
    state = hashlib.sha256()
    for part in parts:
        state.update(part)
    return base64.urlsafe_b64encode(state.digest()).decode()[:11]
