"""The table of ways to write codes."""

from typing import Final

from qcompress_exporters.onnx_format.encodings.base import Encoding
from qcompress_exporters.onnx_format.encodings.native import Native
from qcompress_exporters.onnx_format.encodings.planes import Planes
from qcompress_exporters.onnx_format.encodings.words import Words

# In order of preference; a new encoding is a file and a line here. `words` and `planes` write any width at any opset.
ENCODINGS: Final[tuple[Encoding, ...]] = (Native(), Words(), Planes())


def choose(bits: int, opset: int) -> Encoding:
    """Return the first encoding that can write `bits` at `opset`.

    >>> choose(4, 21).name, choose(4, 18).name, choose(3, 18).name, choose(7, 25).name
    ('native', 'words', 'planes', 'planes')
    """
    return next(e for e in ENCODINGS if (needs := e.opset(bits)) is not None and needs <= opset)
