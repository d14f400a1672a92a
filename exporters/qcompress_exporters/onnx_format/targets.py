"""The places where ONNX files run, by name: a new one is a line here."""

import difflib
import re
from dataclasses import dataclass
from typing import Final, final

from qcompress import deployment
from qcompress.deployment import Choice, Compute, Cost
from qcompress.errors import ConfigError
from qcompress_exporters.onnx_format.opsets import BASE_OPSET, UINT2_OPSET, UINT4_OPSET
from qcompress_exporters.onnx_format.parts import FOLDED

# The onnxruntime 1.x that first runs files of an opset, whose types its Cast must know.
_FIRST_MINOR: Final = {BASE_OPSET: 16, UINT4_OPSET: 23, UINT2_OPSET: 24}
_VERSION: Final = re.compile(r"(?:onnxruntime==)?1\.(\d+)(?:\.\d+)?")


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """A place where ONNX files run; a `Deployment`.

    Args:
        name: what `--target` calls it.
        runs_on: the runtimes that run its files, in words.
        opsets: the opsets that it reads and we write, lowest first.
        folded: bytes of the largest value that it computes at load; what is larger is computed at each run.
    """

    name: str
    runs_on: str
    opsets: tuple[int, ...] = (BASE_OPSET,)
    folded: int = FOLDED

    @property
    def fused(self) -> frozenset[str]:
        """Operators that are computed on codes together with their neighbours, as measured in onnxruntime."""
        return deployment.DEFAULT.fused

    @property
    def largest_bias(self) -> int:
        """Largest bias of an integer layer; see `Deployment`."""
        return deployment.DEFAULT.largest_bias

    @property
    def largest_pair(self) -> int:
        """Largest sum of two neighbouring products; see `Deployment`."""
        return deployment.DEFAULT.largest_pair

    def integer_kinds(self, compute: Compute) -> tuple[str, ...]:
        """Return the kinds of layers that compute in integers.

        >>> PORTABLE.integer_kinds("dynamic8")
        ('linear',)
        """
        return deployment.DEFAULT.integer_kinds(compute)

    def reads(self, bits: int) -> tuple[str, ...]:
        """Return the encodings of `bits`-wide codes that this place reads, the smallest first.

        >>> PORTABLE.reads(4), find("onnxruntime==1.23").reads(4), PORTABLE.reads(3)
        (('words',), ('native', 'words'), ('planes',))
        """
        from qcompress_exporters.onnx_format.encodings.codes import ENCODINGS

        return tuple(encoding.name for encoding in ENCODINGS if encoding.opset(bits) in self.opsets)

    def cost(self, shape: tuple[int, ...], axis: int, choice: Choice) -> Cost:
        """Return the exact bytes of a weight in a file of the base opset, for float compute; see `cost.weight_cost`.

        A newer opset is only taken where it makes the file smaller.
        """
        from qcompress_exporters.onnx_format.cost import weight_cost

        return weight_cost(shape, axis, choice)


PORTABLE: Final = Target(name="portable", runs_on="onnxruntime 1.16 and later, OpenVINO, MNN, ncnn and browsers")
DEFAULT: Final = PORTABLE
OPENVINO: Final = Target(name="openvino", runs_on="OpenVINO 2026.4 and later")
WEB: Final = Target(name="web", runs_on="onnxruntime-web 1.16 and later")

# Beside these, `onnxruntime==1.24` or `1.24`: the oldest onnxruntime that must run the file.
TARGETS: Final = {target.name: target for target in (PORTABLE, OPENVINO, WEB)}


def find(text: str) -> Target:
    """Return the target that a text means.

    Args:
        text: a name in TARGETS, or the oldest onnxruntime that must run the file, `onnxruntime==1.24` or `1.24`.

    Raises:
        ConfigError: an unknown name, or an onnxruntime before 1.16.

    >>> find("portable").opsets, find("1.18").opsets, find("onnxruntime==1.24.4").opsets
    ((18,), (18,), (18, 21, 25))
    """
    name = text.strip()
    if name in TARGETS:
        return TARGETS[name]
    match = _VERSION.fullmatch(name)
    if match and int(match[1]) >= _FIRST_MINOR[BASE_OPSET]:
        return _onnxruntime(int(match[1]))
    near = difflib.get_close_matches(name.lower(), (*TARGETS, "onnxruntime"), n=1)
    hint = f" Did you mean {'onnxruntime==1.24' if near[0] == 'onnxruntime' else near[0]}?" if near else ""
    oldest = f"onnxruntime==1.{_FIRST_MINOR[BASE_OPSET]}"
    raise ConfigError(f"target must be portable, {oldest} or later, openvino or web, got {text!r}.{hint}")


def _onnxruntime(minor: int) -> Target:
    opsets = tuple(opset for opset, first in sorted(_FIRST_MINOR.items()) if minor >= first)
    return Target(name=f"onnxruntime==1.{minor}", runs_on=f"onnxruntime 1.{minor} and later", opsets=opsets)
