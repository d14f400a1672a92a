"""Analysis of a model: statistics of every tensor, and its size in bytes at each width. Needs numpy only.

`qcompress.analyze` is this package's function `analyze`.
"""

from qcompress.analysis.moments import TensorStatistics, statistics
from qcompress.analysis.report import WIDTHS, AnalysisReport, TensorReport, Totals, totals_of
from qcompress.analysis.walk import analyze, report_of, walk

__all__ = [
    "WIDTHS",
    "AnalysisReport",
    "TensorReport",
    "TensorStatistics",
    "Totals",
    "analyze",
    "report_of",
    "statistics",
    "totals_of",
    "walk",
]
