"""Solvers: codes on the levels of a palette or an even grid, from a weight and the second moments of its inputs."""

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
    """One way to find codes.

    Args:
        solve: finds codes for levels, and levels that suit the codes better.
        is_weighted: whether levels are first fitted with each weight's importance, the E[x²] of its inputs.
    """

    solve: Solve
    is_weighted: bool = True


SOLVERS: Final[Mapping[str, Solver]] = {
    "nearest": Solver(nearest.solve, is_weighted=False),
    "weighted": Solver(nearest.solve),
    "gptq": Solver(gptq.solve),
}


def check_solver(name: str) -> None:
    """Refuse an unknown solver.

    Raises:
        ConfigError: names the known ones.
    """
    if name not in SOLVERS:
        raise ConfigError(f"solver must be one of {', '.join(SOLVERS)}, got {name!r}.{did_you_mean(name, SOLVERS)}")
