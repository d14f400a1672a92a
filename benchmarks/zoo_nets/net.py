"""What a net of the zoo is, and statistics of BatchNorm for nets with random weights."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

SAMPLES = 6  # of each example: batches of 1, 2 and 3


@dataclass(frozen=True)
class Example:
    """A module in eval mode with a batch of SAMPLES inputs, by the names of forward's arguments."""

    module: nn.Module
    inputs: Mapping[str, Tensor]


@dataclass(frozen=True)
class Net:
    """A net of the zoo.

    Args:
        name: its name; a shrunken one says so.
        family: what it is for, or how it is built.
        make: returns the net with random weights; it is called with a fixed seed.
        convolutional: whether it is also exported with 8-bit weights and activations.
        package: where its code comes from; empty if it is drawn here.
        lengths: two lengths other than that of the example; empty if its inputs have no length.
        length_axes: the axis of each input that is a length.
        batch_axes: the axis of each input that counts samples, where it is not the first.
    """

    name: str
    family: str
    make: Callable[[], Example]
    convolutional: bool = False
    package: str = ""
    lengths: tuple[int, ...] = ()
    length_axes: Mapping[str, int] = field(default_factory=dict)
    batch_axes: Mapping[str, int] = field(default_factory=dict)


def images(size: int, channels: int = 3) -> Tensor:
    """Return SAMPLES smooth random images: noise at several scales."""
    parts = [
        nn.functional.interpolate(torch.randn(SAMPLES, channels, n, n), size=(size, size), mode="bilinear")
        for n in (2, 4, 8, size)
    ]
    return torch.stack(parts).sum(0) / 2


def tokens(words: int, length: int) -> Tensor:
    """Return SAMPLES random sentences."""
    return torch.randint(1, words, (SAMPLES, length))


def example(module: nn.Module, **inputs: Tensor) -> Example:
    """Return an example in eval mode, whose normalization has statistics of these inputs; see `settle`."""
    settle(module, inputs)
    return Example(module.eval(), inputs)


def settle(module: nn.Module, inputs: Mapping[str, Tensor]) -> None:
    """Give each BatchNorm a random scale and bias, and the statistics that its input then has on the inputs.

    Most biases are positive: where half of all units are off, a random net amplifies any noise from layer to layer, and
    what quantization costs says nothing.
    """
    norms = [m for m in module.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    if not norms:
        return
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = None  # the mean of all batches
        norm.reset_running_stats()
        if norm.affine:
            nn.init.uniform_(norm.weight, 0.6, 1.4)
            nn.init.normal_(norm.bias, 1, 0.3)
    module.train()
    with torch.no_grad():
        module(**inputs)
    module.eval()
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum


def example_without_norms(module: nn.Module, **inputs: Tensor) -> Example:
    """Return an example whose layers' outputs have mean 1 and deviation 1 in each channel on these inputs.

    Source: data-dependent initialization, Salimans and Kingma, arXiv:1602.07868, section 3; the mean is ours: see
    `settle`.
    """
    layers = [m for m in module.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    hooks = [layer.register_forward_hook(_standardize) for layer in layers]
    with torch.no_grad():
        module.eval()(**inputs)
    for hook in hooks:
        hook.remove()
    return Example(module, inputs)


def _standardize(layer: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
    """Scale and shift a layer's output, and its weight and bias so that they give this output."""
    assert isinstance(layer, (nn.Conv2d, nn.Linear))
    axis = 1 if isinstance(layer, nn.Conv2d) else output.ndim - 1
    others = [i for i in range(output.ndim) if i != axis]
    mean, deviation = output.mean(others), output.std(others) + 1e-3
    bias = torch.zeros_like(mean) if layer.bias is None else layer.bias.clone()
    shift = (bias - mean) / deviation + 1 if layer.bias is not None else torch.zeros_like(mean)
    layer.weight.div_(deviation.reshape(-1, *[1] * (layer.weight.ndim - 1)))
    if layer.bias is not None:
        layer.bias.copy_(shift)
    shape = [-1 if i == axis else 1 for i in range(output.ndim)]
    return (output - bias.reshape(shape)) / deviation.reshape(shape) + shift.reshape(shape)
