"""What the core must know about a place where models run.

Instances live with the formats that write for such a place; the core sees this protocol and nothing else of them.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, Protocol, runtime_checkable

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
        """Operators, by their class in `graph.operators`, that are computed on codes together with their neighbours."""

    @property
    def largest_bias(self) -> int:
        """Largest bias of an integer layer, in steps of the scales of its input and its weight."""

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
