"""Functions that torch.compile compiles, and that run as they are where that is not possible."""

import warnings
from collections.abc import Callable, Mapping
from typing import Any, Final, final

import torch
from torch import _inductor

# Divides as torch does without a compiler: values between two codes are then rounded as in evaluation.
_EXACT: Final = "eager_numerics.division_rounding"


@final
class Compiler:
    """Runs functions compiled.

    Args:
        options: as in torch.compile.

    Attributes:
        failure: why nothing is compiled any more; None: all is well.

    >>> Compiler({}).failure is None
    True
    """

    def __init__(self, options: Mapping[str, Any]) -> None:
        exact = {_EXACT: True} if _EXACT in _inductor.list_options() else {}
        self._options = {**exact, **options}
        self._compiled: dict[Callable[..., Any], Callable[..., Any]] = {}
        self.failure: str | None = None

    def __deepcopy__(self, memo: object) -> "Compiler":
        """Returns itself: it has no state but what is compiled."""
        return self

    def run(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Returns a function's result; after the first failure of the compiler, without it.

        Args:
            function: without a state of its own.
            arguments: its arguments.
        """
        if self.failure is None:
            try:
                return self._made(function)(*arguments)
            except torch._dynamo.exc.TorchDynamoException as e:
                self.failure = str(e).strip().partition("\n")[0]
        return function(*arguments)

    def _made(self, function: Callable[..., Any]) -> Callable[..., Any]:
        if function not in self._compiled:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", DeprecationWarning)  # of what the compiler imports
                self._compiled[function] = torch.compile(function, options=self._options)
        return self._compiled[function]
