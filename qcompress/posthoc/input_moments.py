"""Second moments of a layer's inputs: all that a solver needs of the calibration data.

Shape suffixes: G = groups of channels, P = places (samples times output positions), K = inputs of one output value,
R = output channels of a group.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch.fx import Node
from torch.nn import functional

from qcompress.graph.layers import Layer
from qcompress.graph.nodes import arguments

PRODUCTS: Final = ("linear", "recurrent")  # kinds of layers whose last axis counts inputs and outputs


@dataclass(frozen=True, slots=True, kw_only=True)
class Moments:
    """Moments of a layer's inputs: x in the compressed program, y in the float program.

    Args:
        count: the number of places that were summed over.
        second: float64 [G, K, K], E[x xᵀ]; minus E[x] E[x]ᵀ if `centred`.
        cross: float64 [G, K, K], E[y xᵀ]; minus E[y] E[x]ᵀ if `centred`. It is `second` itself if x is y.
        centred: whether the means are subtracted, because a bias makes up for them.
    """

    count: int
    second: torch.Tensor
    cross: torch.Tensor
    centred: bool

    @classmethod
    def gather(
        cls,
        layer: Layer,
        weight_shape: Sequence[int],
        inputs: Sequence[torch.Tensor],
        float_inputs: Sequence[torch.Tensor],
        *,
        centred: bool,
    ) -> "Moments":
        """Return the moments over all batches.

        Args:
            layer: a layer for which `has_moments` is true.
            weight_shape: shape of its weight.
            inputs: x by batch.
            float_inputs: y by batch; the same objects if the programs do not differ in front of the layer.
            centred: as in the class.
        """
        second = cross = mean = float_mean = None
        about_GK = None  # near the mean, so that little precision is lost when the means are subtracted
        count, differs = 0, any(x is not y for x, y in zip(inputs, float_inputs, strict=True))
        for x, y in zip(inputs, float_inputs, strict=True):
            x_GPK = places(layer, weight_shape, x)
            if centred and about_GK is None:
                about_GK = x_GPK.mean(1, keepdim=True)
            x_GPK = x_GPK if about_GK is None else x_GPK - about_GK
            y_GPK = places(layer, weight_shape, y) if differs else x_GPK
            if differs and about_GK is not None:
                y_GPK = y_GPK - about_GK
            sums = [(x_GPK.mT @ x_GPK).double(), x_GPK.sum(1, dtype=torch.float64)]
            second = sums[0] if second is None else second + sums[0]
            mean = sums[1] if mean is None else mean + sums[1]
            if differs:
                sums = [(y_GPK.mT @ x_GPK).double(), y_GPK.sum(1, dtype=torch.float64)]
                cross = sums[0] if cross is None else cross + sums[0]
                float_mean = sums[1] if float_mean is None else float_mean + sums[1]
            count += x_GPK.shape[1]
        assert second is not None
        assert mean is not None
        second, mean = (second / count).cpu(), (mean / count).cpu()
        less = mean[:, None, :] if centred else torch.zeros(())
        about = second - mean[:, :, None] * less
        if cross is None or float_mean is None:
            return cls(count=count, second=about, cross=about, centred=centred)
        cross = (cross / count).cpu() - (float_mean / count).cpu()[:, :, None] * less
        return cls(count=count, second=about, cross=cross, centred=centred)


def has_moments(layer: Layer) -> bool:
    """Return whether `places` can arrange a layer's inputs."""
    return layer.kind in ("conv", "depthwise", *PRODUCTS)


def places(layer: Layer, weight_shape: Sequence[int], x: torch.Tensor) -> torch.Tensor:
    """Return the inputs of each output value of a layer, [G, P, K], with K in the order of a row of the weight.

    Args:
        layer: a convolution that is not transposed, or a matrix product.
        weight_shape: shape of its weight.
        x: the layer's input.
    """
    if layer.kind in PRODUCTS:
        return x.reshape(1, -1, weight_shape[1 - layer.axis])
    kernel = weight_shape[2:]
    stride, padding, dilation, groups = _geometry(layer.node, len(kernel), kernel)
    x = functional.pad(x, [n for ends in reversed(padding) for n in ends])
    for i, (size, step, gap) in enumerate(zip(kernel, stride, dilation, strict=True)):
        x = x.unfold(2 + i, gap * (size - 1) + 1, step)[..., ::gap]
    # [N, C, *positions, *kernel] -> [G, N * positions, C / G * kernel]
    n, c, positions = x.shape[0], x.shape[1], x.shape[2 : 2 + len(kernel)]
    x = x.reshape(n, groups, c // groups, *positions, *kernel)
    order = [1, 0, *range(3, 3 + len(kernel)), 2, *range(3 + len(kernel), 3 + 2 * len(kernel))]
    return x.permute(order).reshape(groups, n * positions.numel(), -1)


def _geometry(node: Node, dims: int, kernel: Sequence[int]) -> tuple[list[int], list[tuple[int, int]], list[int], int]:
    """Return stride, padding at both ends, dilation and groups of a convolution."""
    given = arguments(node)

    def numbers(name: str, default: int) -> list[int]:
        value: Any = given.get(name, default)
        values = list(value) if isinstance(value, list | tuple) else [value]
        return values * dims if len(values) == 1 else values

    stride, dilation, padding = numbers("stride", 1), numbers("dilation", 1), given.get("padding", 0)
    if padding == "valid":
        ends = [(0, 0)] * dims
    elif padding == "same":  # an odd total puts one more at the end
        total = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
        ends = [(t // 2, t - t // 2) for t in total]
    else:
        ends = [(p, p) for p in numbers("padding", 0)]
    groups = given.get("groups", 1)
    assert isinstance(groups, int)
    return stride, ends, dilation, groups
