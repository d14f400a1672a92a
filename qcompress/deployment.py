"""What the core must know about a place where models run.

Instances live with the formats that write for such a place; the core sees this protocol and nothing else of them.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final, Literal, Protocol, final, runtime_checkable

import numpy as np

from qcompress.artifacts import PalettizedWeight
from qcompress.artifacts.granularity import lut_groups
from qcompress.artifacts.packing import packed_nbytes

# What layers compute in: floats; int8 with the model's activation grids; int8 with activation scales found at run time.
Compute = Literal["float", "int8", "dynamic8"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """One way to compress a weight, as far as its bytes depend on it.

    Args:
        artifact: kind of artifact: a key of `artifacts.ARTIFACTS`.
        bits: bits per code, or of the float type.
        rows_per_lut: output channels that share a palette; None: all of them.
        vector_dim: weights per code.
        lut_dtype: type of palette entries.
        block_size: consecutive inputs that share a scale; None: all of an output channel.
        scales: whether each output channel has a scale.
    """

    artifact: str
    bits: int
    rows_per_lut: int | None = None
    vector_dim: int = 1
    lut_dtype: str = "float32"
    block_size: int | None = None
    scales: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """The bytes that a choice adds to a file.

    Args:
        nbytes: bytes of the weight itself, container included.
        charges: bytes that are paid once however many weights use them, by name: a decode table, a newer opset.
    """

    nbytes: int
    charges: Mapping[str, int] = field(default_factory=dict)


@runtime_checkable
class Deployment(Protocol):
    """A place where models run."""

    @property
    def name(self) -> str:
        """The name that `--target` picks it by."""

    def integer_kinds(self, compute: Compute) -> tuple[str, ...]:
        """Return the kinds of layers that compute in integers."""

    @property
    def fused(self) -> frozenset[str]:
        """Operators between layers that are computed on codes, so that their operands and outputs are quantized too.

        Properties of the rows in `graph.operators`: `clamps`, `bends`, `sums`, `pools`, `averages`, `joins`.
        """

    @property
    def largest_bias(self) -> int:
        """Largest bias that an integer layer is left with, in steps of the scales of its input and its weight.

        It leaves room for what the export folds into biases: free offsets of the layers' inputs.
        """

    @property
    def largest_pair(self) -> int:
        """Largest sum of two neighbouring products of 8-bit codes that no CPU of this place saturates."""

    def reads(self, bits: int) -> tuple[str, ...]:
        """Return the encodings of `bits`-wide codes that this place reads, the preferred one first."""

    def cost(self, shape: tuple[int, ...], axis: int, choice: Choice) -> Cost:
        """Return the exact bytes of a weight in the file.

        Args:
            shape: of the weight.
            axis: the axis that counts output channels.
            choice: how the weight is compressed.
        """


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Generic:
    """What all places have in common: compression takes it where no deployment is given.

    Integer kernels everywhere multiply 8-bit codes, add the products in 32 bits, and add an int32 bias.

    >>> DEFAULT.integer_kinds("int8"), DEFAULT.cost((8, 4), 0, Choice(artifact="palette", bits=2)).nbytes
    (('conv', 'depthwise', 'linear'), 24)
    """

    name: str = "generic"
    fused: frozenset[str] = frozenset({"clamps", "bends", "sums", "pools", "averages", "joins"})
    largest_bias: int = 1 << 30  # half of what int32 holds
    largest_pair: int = (1 << 15) - 1  # CPUs without VNNI add pairs of products in 16 bits

    def integer_kinds(self, compute: Compute) -> tuple[str, ...]:
        """Return the kinds of layers that compute in integers."""
        kinds: Mapping[Compute, tuple[str, ...]] = {
            "float": (),
            "int8": ("conv", "depthwise", "linear"),
            "dynamic8": ("linear",),
        }
        return kinds[compute]

    def reads(self, bits: int) -> tuple[str, ...]:
        """Return no encoding: that depends on the file's format."""
        return ()

    def cost(self, shape: tuple[int, ...], axis: int, choice: Choice) -> Cost:
        """Return the bytes of packed codes, tables and scales, without any container."""
        count, channels = math.prod(shape), shape[axis] if shape else 1
        codes = -(-count // choice.vector_dim)
        scales = channels if choice.scales else 0
        if choice.block_size is not None:
            scales = channels * -(-count // max(1, channels) // choice.block_size)
        table = 0
        if choice.artifact == PalettizedWeight.kind:
            groups = lut_groups(channels, choice.rows_per_lut)
            entries = min(1 << choice.bits, -(-codes // groups))
            table = groups * entries * choice.vector_dim * np.dtype(choice.lut_dtype).itemsize
        return Cost(nbytes=packed_nbytes(codes, choice.bits) + table + 4 * scales)


DEFAULT: Final = Generic()
