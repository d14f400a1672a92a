"""Analysis of a model: statistics of every tensor, and the bytes that it would take at each width. numpy only.

`qcompress.analyze` is the function `analyze` of this package.
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
