"""The report on an exported file, which is the same for every deployment format."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import final

from qcompress.artifacts import FloatWeight
from qcompress.artifacts.size import SizeReport
from qcompress.files import check_writable, write_whole


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class TensorReport:
    """The report on one tensor in the file.

    Args:
        name: qualified name.
        shape: its shape.
        artifact: kind of artifact.
        bits: bits per code, or bits of the float type.
        bits_per_weight: bits on disk per weight, tables included.
        nbytes: its bytes on disk, without the file's own structure.
        float_nbytes: its bytes in the float file.
        encoding: name of the encoding (`native`, `words`, `planes`), or the float type.
        why: why it has this encoding, or why it is left in float.
    """

    name: str
    shape: tuple[int, ...]
    artifact: str
    bits: int
    bits_per_weight: float
    nbytes: int
    float_nbytes: int
    encoding: str
    why: str


@final
@dataclass(frozen=True, slots=True)
class LayerReport:
    """The report on one layer's computation.

    Args:
        weight: qualified name of its weight.
        compute: `int8`, `dynamic8` or `float`.
        why: why it computes in float; empty if it does not.
        offset: where its input's offset is: in the `zero point`; `folded` into the bias, or `added` to the float
            activation, both of which are exact; empty if the activation is float.
        saturation: share of the pairs of its weights that can saturate on CPUs without VNNI.
        activation_bits: bits at which it takes its activations; None: it takes floats.
    """

    weight: str
    compute: str
    why: str = ""
    offset: str = ""
    saturation: float = 0.0
    activation_bits: int | None = None


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class ExportReport:
    """The report on an exported file, with exact sizes in bytes.

    Args:
        path: the file; None if nothing was written.
        target: name of the target.
        runs_on: the runtimes that run the file, in words.
        opset: opset of an ONNX file; None in other formats.
        size: ideal, payload, file and original bytes.
        tensors: every tensor of the graph.
        notes: notes for the user.
        compute: `float`, `int8` or `dynamic8`.
        layers: how each layer is computed; empty if all compute in float.
        float_operators: at int8 compute, how often each operator occurs between integer layers that computes in
            floats; layers do not count.
        saturation: share of the calibration data that each activation's grid clips.
    """

    path: Path | None
    target: str
    runs_on: str
    opset: int | None
    size: SizeReport
    tensors: tuple[TensorReport, ...]
    notes: tuple[str, ...]
    compute: str = "float"
    layers: tuple[LayerReport, ...] = ()
    float_operators: Mapping[str, int] = field(default_factory=dict)
    saturation: Mapping[str, float] = field(default_factory=dict)

    @property
    def shrank(self) -> bool:
        """Whether any tensor got smaller."""
        return any(t.nbytes < t.float_nbytes for t in self.tensors)

    @property
    def left_in_float(self) -> tuple[TensorReport, ...]:
        """The tensors without codes."""
        return tuple(t for t in self.tensors if t.artifact == FloatWeight.kind)


@final
@dataclass(frozen=True, slots=True)
class Built:
    """A file in memory.

    Args:
        data: its bytes.
        report: the report on it, without a path.
    """

    data: bytes
    report: ExportReport

    def write(self, path: Path, *, force: bool = False, inputs: Sequence[Path] = ()) -> ExportReport:
        """Write the file, whole or not at all; see `files.check_writable`."""
        check_writable(path, force=force, inputs=inputs)
        write_whole(path, self.data)
        return replace(self.report, path=path)
