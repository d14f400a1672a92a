"""Solvers: from a weight and the second moments of its inputs to codes on the levels of a palette or a grid."""

from qcompress.solvers.base import Levels, Problem
from qcompress.solvers.gptq import solve as gptq

__all__ = ["Levels", "Problem", "gptq"]
