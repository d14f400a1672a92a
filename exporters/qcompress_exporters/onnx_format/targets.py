"""Which runtime can read which file. Measured with each version, not read off release notes."""

import re
from dataclasses import dataclass
from typing import Final

from qcompress.errors import ConfigError

DEFAULT_TARGET: Final = "onnxruntime==1.24"

# Opset that a type needs in a file, and the onnxruntime that first has a kernel for Cast from it.
BASE_OPSET: Final = 18  # what torch.onnx writes by itself
UINT4_OPSET: Final = 21
UINT2_OPSET: Final = 25
_FIRST_MINOR_FOR_OPSET: Final = {BASE_OPSET: 16, UINT4_OPSET: 23, UINT2_OPSET: 24}
_IR_VERSION: Final = {BASE_OPSET: 8, UINT4_OPSET: 10, UINT2_OPSET: 13}


@dataclass(frozen=True, slots=True)
class Target:
    """The oldest onnxruntime that must run a file.

    >>> Target.parse("onnxruntime==1.18").opsets
    (18,)
    >>> Target.parse("onnxruntime==1.24.4").opsets
    (18, 21, 25)
    """

    text: str
    minor: int

    @classmethod
    def parse(cls, text: str) -> "Target":
        """Read `onnxruntime==1.24`.

        Raises:
            ConfigError: another runtime, or a version that was never tried.
        """
        match = re.fullmatch(r"onnxruntime==1\.(\d+)(?:\.\d+)?", text.strip())
        if not match or int(match[1]) < _FIRST_MINOR_FOR_OPSET[BASE_OPSET]:
            raise ConfigError(
                f"target must be onnxruntime==1.16 or later, written like {DEFAULT_TARGET}, got {text!r}."
            )
        return cls(f"onnxruntime==1.{match[1]}", int(match[1]))

    @property
    def opsets(self) -> tuple[int, ...]:
        """The opsets that we write for it, lowest first."""
        return tuple(o for o, minor in sorted(_FIRST_MINOR_FOR_OPSET.items()) if self.minor >= minor)


def ir_version(opset: int) -> int:
    """The IR version that goes with an opset that we write.

    >>> ir_version(25)
    13
    """
    return next(ir for o, ir in sorted(_IR_VERSION.items(), reverse=True) if opset >= o)
