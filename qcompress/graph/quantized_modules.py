"""Recognizes models that another tool has quantized: their weights are codes of its own, which cannot be read here."""

from collections.abc import Iterator
from typing import Final

from torch import nn

from qcompress.errors import SourceError

# Packages whose layers and tensors hold codes. Those that train with quantized weights hold floats, and are not here.
_MODULES: Final = ("torch.ao.nn.quantized", "torch.ao.nn.intrinsic.quantized", "torch.nn.quantized", "bitsandbytes")
_TENSORS: Final = ("torchao", "bitsandbytes", "optimum.quanto")


def check_not_quantized(module: nn.Module) -> None:
    """Refuse a model that is quantized already.

    Raises:
        SourceError: the model is; names its first quantized part.
    """
    for name, kind in _quantized(module):
        raise SourceError(
            f"The model is quantized already: {name or 'it'} is a {kind}. Compress the float model that it was made "
            "from, or give its weights as floats."
        )


def _quantized(module: nn.Module) -> Iterator[tuple[str, str]]:
    """Yield the quantized parts of a model: name, and what it is."""
    for name, part in module.named_modules():
        kind = type(part)
        if _is_of(kind, _MODULES):
            yield name, f"{kind.__module__}.{kind.__qualname__}"
    for name, tensor in (*module.named_parameters(), *module.named_buffers()):
        if tensor.is_quantized:
            yield name, f"tensor of {tensor.dtype}"
        for kind in (type(tensor), type(tensor.data)):
            if _is_of(kind, _TENSORS):
                yield name, f"tensor of {kind.__module__}"


def _is_of(kind: type, packages: tuple[str, ...]) -> bool:
    return any(f"{kind.__module__}.".startswith(f"{package}.") for package in packages)
