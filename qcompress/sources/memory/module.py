"""A torch.nn.Module in memory, and the kinds that its layers give to their weights."""

import hashlib
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, final

import numpy as np
import numpy.typing as npt

from qcompress.errors import SourceError
from qcompress.graph.options import ProgramOptions
from qcompress.graph.tensors import has_array, numpy_dtype, to_numpy
from qcompress.sources.base import LazyArray, SourceTensor

if TYPE_CHECKING:
    import torch

    from qcompress.graph.program import FloatProgram

# Fields that tell a layer apart where its class is not at hand (a stand-in) or not torch's own.
_CONV: Final = ("in_channels", "out_channels", "groups", "kernel_size", "transposed")
_LINEAR: Final = ("in_features", "out_features")
_EMBEDDING: Final = ("num_embeddings", "embedding_dim")
_ATTENTION: Final = ("embed_dim", "num_heads")
_RECURRENT: Final = ("input_size", "hidden_size")


def layer_kind(fields: Mapping[str, Any], parameter: str, ndim: int) -> str:
    """Kind of a layer's parameter, from the public fields that torch's layers, and those derived from them, carry.

    Args:
        fields: the layer's attributes.
        parameter: the parameter's own name in it.
        ndim: its number of axes.

    >>> conv = dict(in_channels=8, out_channels=8, groups=8, kernel_size=(3, 3), transposed=False)
    >>> layer_kind(conv, "weight", 4), layer_kind(conv, "bias", 1)
    ('depthwise', 'other')
    """
    if ndim < 2:
        return "other"
    if parameter.startswith("weight_") and all(name in fields for name in _RECURRENT):
        return "recurrent"
    projections = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")
    if parameter in projections and all(name in fields for name in _ATTENTION):
        return "linear"
    if parameter != "weight":
        return "other"
    if all(name in fields for name in _CONV):
        return _conv_kind(fields)
    if all(name in fields for name in _EMBEDDING):
        return "embedding"
    # nn.Bilinear has in1_features: not a linear layer for us
    return "linear" if all(name in fields for name in _LINEAR) and ndim == 2 else "other"


def _conv_kind(fields: Mapping[str, Any]) -> str:
    if fields["transposed"] is True:
        return "conv_transpose"
    groups, channels = fields["groups"], fields["in_channels"]
    whole = isinstance(groups, int) and isinstance(channels, int)  # a hostile file may put anything here
    return "depthwise" if whole and groups == channels > 1 else "conv"


def kinds_of(module: "torch.nn.Module") -> dict[str, str]:
    """Kind of every parameter and buffer by its qualified name, every name of a tied one included.

    >>> import torch
    >>> kinds_of(torch.nn.Sequential(torch.nn.Conv2d(4, 4, 3, groups=4), torch.nn.Linear(4, 2)))["0.weight"]
    'depthwise'
    """
    kinds: dict[str, str] = {}
    for prefix, layer in module.named_modules(remove_duplicate=False):
        for name, parameter in layer.named_parameters(recurse=False, remove_duplicate=False):
            kinds[f"{prefix}.{name}" if prefix else name] = layer_kind(vars(layer), name, parameter.dim())
        for name, _ in layer.named_buffers(recurse=False, remove_duplicate=False):
            kinds[f"{prefix}.{name}" if prefix else name] = "other"
    return kinds


@final
class ModuleSource:
    """A module in memory.

    Args:
        module: is read, never changed.
    """

    path: Path | None = None

    def __init__(self, module: "torch.nn.Module") -> None:
        self._module = module
        if not any(True for _ in self.tensors()):
            raise SourceError(f"no tensor found in {self.label}: a module with parameters or buffers is needed.")

    @property
    def label(self) -> str:
        """The module's class."""
        return type(self._module).__name__

    @property
    def original_bytes(self) -> int:
        """Bytes of its parameters and buffers, tied ones once."""
        return sum(math.prod(t.array.shape) * np.dtype(t.array.dtype).itemsize for t in self.tensors())

    @property
    def sha256(self) -> str:
        """SHA-256 over names, dtypes, shapes and bytes."""
        return digest_of(self.tensors())

    def tensors(self) -> Iterator[SourceTensor]:
        """Every parameter, then every buffer, in the module's order; tied ones once, under their first name."""
        kinds = kinds_of(self._module)
        names: dict[int, list[str]] = {}
        tensors: dict[int, torch.Tensor] = {}
        for listing in (self._module.named_parameters, self._module.named_buffers):
            for name, tensor in listing(remove_duplicate=False):
                names.setdefault(id(tensor), []).append(name)
                tensors[id(tensor)] = tensor
        for key, (first, *rest) in names.items():
            yield SourceTensor(first, kinds[first], lazy_tensor(tensors[key], first), tuple(rest))

    def program(self, options: ProgramOptions) -> "FloatProgram":
        """The module, traced."""
        from qcompress.graph.tracing import from_module

        return from_module(self._module, options)


def lazy_tensor(tensor: "torch.Tensor", name: str) -> LazyArray:
    """A torch tensor as an array that is copied to the CPU when it is read.

    Raises:
        SourceError: its dtype has no array, a quantized one for example.

    >>> import torch
    >>> lazy_tensor(torch.zeros(2, dtype=torch.bfloat16), "w").dtype
    'bfloat16'
    """
    if not has_array(tensor):
        raise SourceError(
            f"tensor {name!r} is {tensor.dtype}, {tensor.layout}, on {tensor.device}: it has no values to read."
        )

    def read() -> npt.NDArray[Any]:
        return np.asarray(to_numpy(tensor), order="C")

    return LazyArray(tuple(tensor.shape), str(numpy_dtype(tensor.dtype)), read)


def digest_of(tensors: Iterator[SourceTensor]) -> str:
    """SHA-256 over the names, dtypes, shapes and bytes of tensors."""
    state = hashlib.sha256()
    for tensor in tensors:
        state.update(f"{tensor.name}\0{tensor.array.dtype}\0{list(tensor.array.shape)}\0".encode())
        state.update(np.ascontiguousarray(tensor.array).reshape(-1).view(np.uint8).tobytes())
    return state.hexdigest()
