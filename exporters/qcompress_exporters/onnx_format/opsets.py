"""The opsets that we write, and what goes with each. Measured with each runtime, not read off release notes."""

from typing import Final

BASE_OPSET: Final = 18  # the one that torch.onnx writes
UINT4_OPSET: Final = 21  # the first one with UINT4 and INT4
UINT2_OPSET: Final = 25  # the first one with UINT2 and INT2
_IR_VERSION: Final = {BASE_OPSET: 8, UINT4_OPSET: 10, UINT2_OPSET: 13}


def ir_version(opset: int) -> int:
    """Return the IR version that goes with an opset that we write.

    >>> ir_version(25)
    13
    """
    return next(ir for o, ir in sorted(_IR_VERSION.items(), reverse=True) if opset >= o)
