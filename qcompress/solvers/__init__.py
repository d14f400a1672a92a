"""Solvers: from a weight and the second moments of its inputs to codes on the levels of a palette or a grid."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, final

from qcompress.errors import ConfigError, did_you_mean
from qcompress.solvers import gptq, nearest
from qcompress.solvers.base import Levels, Problem, Solve

__all__ = ["SOLVERS", "Levels", "Problem", "Solver", "check_solver"]


@final
@dataclass(frozen=True, slots=True)
class Solver:
    """How codes are found.

    Args:
        solve: from levels to codes, and to levels that suit them better.
        is_weighted: whether levels are fitted to weights by how much each counts, E[x²] of what it is multiplied with.
    """

    solve: Solve
    is_weighted: bool = True


SOLVERS: Final[Mapping[str, Solver]] = {
    "nearest": Solver(nearest.solve, is_weighted=False),
    "weighted": Solver(nearest.solve),
    "gptq": Solver(gptq.solve),
}


def check_solver(name: str) -> None:
    """Refuse a solver that there is not.

    Raises:
        ConfigError: names those that there are.
    """
    if name not in SOLVERS:
        raise ConfigError(f"solver must be one of {', '.join(SOLVERS)}, got {name!r}.{did_you_mean(name, SOLVERS)}")
