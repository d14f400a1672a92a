"""A function that torch.compile compiles, and that runs as it is where that is not possible."""

import warnings
from collections.abc import Callable, Mapping
from typing import Any, Final, final

import torch
from torch import _inductor

# Divides as torch does without a compiler: values between two codes are then rounded as in evaluation.
_EXACT: Final = "eager_numerics.division_rounding"


@final
class CompiledFunction:
    """Runs a function compiled.

    Args:
        function: without a state of its own.
        options: as in torch.compile.

    >>> double = CompiledFunction(lambda x: x + x, {})
    >>> double.failure is None
    True
    """

    def __init__(self, function: Callable[..., Any], options: Mapping[str, Any]) -> None:
        self._function, self._options = function, options
        exact = {_EXACT: True} if _EXACT in _inductor.list_options() else {}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # of what the compiler imports
            self._compiled: Callable[..., Any] = torch.compile(function, options={**exact, **options})
        self.failure: str | None = None
        self._next: CompiledFunction | None = None

    def __deepcopy__(self, memo: object) -> "CompiledFunction":
        """Returns itself: it has no state but what is compiled."""
        return self

    def of(self, function: Callable[..., Any]) -> "CompiledFunction":
        """Returns this one, or a compiled one with the same options if the function is another."""
        if function is self._function:
            return self
        if self._next is None or self._next._function is not function:
            self._next = CompiledFunction(function, self._options)
        return self._next

    def __call__(self, *arguments: Any) -> Any:
        """Returns the function's result; after the first failure of the compiler, without it."""
        if self.failure is None:
            try:
                return self._compiled(*arguments)
            except torch._dynamo.exc.TorchDynamoException as e:
                self.failure = str(e).strip().partition("\n")[0]
        return self._function(*arguments)
