"""Options of writing and of measuring a file, whatever its format."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, final

from qcompress.errors import ConfigError
from qcompress.progress import Track, untracked

if TYPE_CHECKING:
    from qcompress.metrics.metric import Metric

Leftovers = Literal["float32", "float16"]


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class BuildOptions:
    """How a file is written.

    Args:
        way: how int8 compute is written, one of `Format.ways`; None: the first of them.
        float_leftovers: type on disk of tensors that are left in float.

    Raises:
        ConfigError: an unknown type.
    """

    way: str | None = None
    float_leftovers: Leftovers = "float32"

    def __post_init__(self) -> None:
        if self.float_leftovers not in ("float32", "float16"):
            raise ConfigError(f"float_leftovers must be float32 or float16, got {self.float_leftovers!r}.")


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Measuring:
    """How a file is measured.

    Args:
        metric: computed where there are labels.
        source_digest: short digest of the original's file; empty if unknown.
        seed: of the bootstrap.
        device: where the original runs.
        timing: seconds spent on latency, besides two loads; 0: latency and loading are not measured.
        track: wraps the iterator over batches: a progress bar.
    """

    metric: "Metric | None" = None
    source_digest: str = ""
    seed: int = 0
    device: str = "cpu"
    timing: float = 0.0
    track: Track = untracked
