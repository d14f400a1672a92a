"""Penalties on weights: pure functions of one weight, and modules over a whole model for use in any training loop."""

from qcompress.regularizers.bins import BinRegularizer, bin_regularization
from qcompress.regularizers.distance import DistanceRegularizer, kl, l2
from qcompress.regularizers.kurtosis import KurtosisRegularizer, kurtosis
from qcompress.regularizers.range import RangeRegularizer, linf, margin, soft_min_max

__all__ = [
    "BinRegularizer",
    "DistanceRegularizer",
    "KurtosisRegularizer",
    "RangeRegularizer",
    "bin_regularization",
    "kl",
    "kurtosis",
    "l2",
    "linf",
    "margin",
    "soft_min_max",
]
