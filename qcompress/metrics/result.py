"""The result of a metric on two models. Does not import numpy, so that `gate` starts fast."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, final


@final
@dataclass(frozen=True, slots=True)
class MetricResult:
    """A metric on the outputs of the original and of the compressed model, for the same samples.

    Args:
        name: name of the metric.
        original: its value for the original: the mean of scores per sample, or the number over all samples.
        compressed: its value for the compressed model.
        drop: how much worse the compressed model is, in the metric's own unit; negative if it is better.
        interval: 95 % interval of the drop; None if there are too few samples to compute it.
        lower_is_better: whether a lower value is better, as for a loss.
        samples: number of samples.
    """

    name: str
    original: float
    compressed: float
    drop: float
    interval: tuple[float, float] | None
    lower_is_better: bool
    samples: int

    def undecidable(self, limit: float = 0.0) -> bool:
        """Return whether the interval contains drops on both sides of `limit`, or is unknown.

        >>> MetricResult("top1", 0.9, 0.89, 0.01, (-0.01, 0.03), False, 500).undecidable(0.02)
        True
        """
        return self.interval is None or self.interval[0] <= limit < self.interval[1]

    @classmethod
    def from_dict(cls, document: Mapping[str, Any]) -> "MetricResult":
        """Return the result from a dictionary that `dataclasses.asdict` made.

        Raises:
            KeyError, TypeError, ValueError: the document lacks a key, or a value has the wrong type.
        """
        interval = document["interval"]
        if interval is not None:
            low, high = interval
            interval = (float(low), float(high))
        return cls(
            name=str(document["name"]),
            original=float(document["original"]),
            compressed=float(document["compressed"]),
            drop=float(document["drop"]),
            interval=interval,
            lower_is_better=bool(document["lower_is_better"]),
            samples=int(document["samples"]),
        )
