"""Draws `torch.nn` nets from a seed: blocks of every kind, values with several consumers, outputs in the middle.

Hypothesis draws only the seeds and the depths. If it drew each choice, it would try many similar nets, a second each.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from tests.helpers.nets import randomized

LAYERS = (nn.Conv1d, nn.Conv2d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.Linear)
ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "relu": nn.ReLU,
    "inplace relu": lambda: nn.ReLU(inplace=True),
    "relu6": nn.ReLU6,
    "hardtanh": nn.Hardtanh,
    "leaky": nn.LeakyReLU,
    "silu": nn.SiLU,
    "hardswish": nn.Hardswish,
    "sigmoid": nn.Sigmoid,
}


@dataclass
class Step:
    """One value of a net.

    Args:
        text: a description for people.
        takes: positions of its operands; 0 is the input.
        function: computes the value; a module becomes part of the net.
    """

    text: str
    takes: tuple[int, ...]
    function: Callable[..., torch.Tensor]


class Drawn(nn.Module):
    """Runs steps; returns the last value and those at the output positions."""

    def __init__(self, steps: list[Step], outputs: list[int]) -> None:
        super().__init__()
        self.steps, self.outputs = steps, outputs
        for i, step in enumerate(steps):
            if isinstance(step.function, nn.Module):
                self.add_module(f"step{i + 1}", step.function)

    def forward(self, x: torch.Tensor) -> Any:
        values = [x]
        for step in self.steps:
            values.append(step.function(*(values[i] for i in step.takes)))
        found = tuple(values[i] for i in self.outputs)
        return found if len(found) > 1 else found[0]


@dataclass
class Net:
    """A net with its description and the shape of its input.

    Args:
        module: the net in eval mode.
        shape: shape of one sample.
        text: one line for each step.
    """

    module: nn.Module
    shape: tuple[int, ...]
    text: str

    def __repr__(self) -> str:
        return f"input {list(self.shape)}\n{self.text}"


@dataclass
class _Builder:
    random: random.Random
    shape: tuple[int, ...]
    steps: list[Step] = field(default_factory=list)
    shapes: list[tuple[int, ...]] = field(default_factory=list)
    values: list[torch.Tensor] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.values.append(torch.randn(2, *self.shape))

    @property
    def spatial(self) -> int:
        return len(self.shape) - 1

    def of(self, i: int) -> tuple[int, ...]:
        return tuple(self.values[i].shape[1:])

    def add(self, text: str, takes: tuple[int, ...], function: Callable[..., torch.Tensor]) -> int:
        with torch.no_grad():
            module = function.eval() if isinstance(function, nn.Module) else function
            value = module(*(self.values[i].clone() for i in takes))
        assert all(value.shape), text
        self.values.append(value)
        self.steps.append(Step(text, takes, function))
        return len(self.steps)

    def one(self, *values: Any) -> Any:
        return self.random.choice(values)

    def images(self) -> list[int]:
        """Return the values that still have all axes, the newest first."""
        return [i for i in reversed(range(len(self.values))) if len(self.of(i)) == len(self.shape)]

    def before(self, i: int) -> set[int]:
        """Return the positions of a value and of all values that it depends on, without the input."""
        found: set[int] = set()
        stack = [i]
        while stack:
            if (at := stack.pop()) and at not in found:
                found.add(at)
                stack += self.steps[at - 1].takes
        return found

    def any_image(self) -> int:
        images = self.images()
        return self.one(*(images[:1] * 3 + images[:4]))


def _activation(b: _Builder, x: int) -> int:
    name = b.one(None, "relu", "relu", "inplace relu", "relu6", "hardtanh", "leaky", "silu", "hardswish", "sigmoid")
    if name is None:
        return x
    if name == "inplace relu" and (x == 0 or len(b.steps) != x):  # would change the operands of other steps
        name = "relu"
    return b.add(name, (x,), ACTIVATIONS[name]())


def _norm(b: _Builder, x: int) -> int:
    if not b.one(True, False):
        return x
    channels = b.of(x)[0]
    kinds = {0: nn.BatchNorm1d, 1: nn.BatchNorm1d, 2: nn.BatchNorm2d}
    return b.add("batchnorm", (x,), kinds[b.spatial](channels, affine=b.one(True, True, False)))


def _conv(b: _Builder, x: int | None = None, *, same: bool = False, channels: int | None = None) -> int:
    x = b.any_image() if x is None else x
    inputs, *size = b.of(x)
    depthwise = b.one(False, False, True) and channels in (None, inputs)
    outputs = channels or b.one(4, 6, 8)
    groups = 1
    if depthwise:
        groups, outputs = inputs, inputs * (1 if channels else b.one(1, 2))
    elif b.one(False, False, True) and inputs % 2 == 0 and outputs % 2 == 0:
        groups = 2
    kernel, stride, padding, dilation = [], [], [], []
    for extent in size:
        k, d = b.one(1, 2, 3), b.one(1, 1, 2)
        s = b.one(1, 1, 2)
        p = b.one(0, 1, 2)
        if same:
            k, d, s, p = (3, 1, 1, 1) if b.one(True, False) else (1, 1, 1, 0)
        if extent + 2 * p < d * (k - 1) + 1:
            k, d, s, p = 1, 1, 1, 0
        for part, value in ((kernel, k), (stride, s), (padding, p), (dilation, d)):
            part.append(value)
    kind: Any = nn.Conv1d if b.spatial == 1 else nn.Conv2d
    layer = kind(
        inputs, outputs, tuple(kernel), tuple(stride), tuple(padding), tuple(dilation), groups, b.one(True, False)
    )
    x = b.add(f"{layer}", (x,), layer)
    return _activation(b, _norm(b, x))


def _conv_transpose(b: _Builder) -> int:
    x = b.any_image()
    inputs, *size = b.of(x)
    if max(size) > 10:
        return _conv(b, x)
    kind: Any = nn.ConvTranspose1d if b.spatial == 1 else nn.ConvTranspose2d
    layer = kind(inputs, b.one(4, 6), b.one(2, 3), b.one(1, 2), padding=0, bias=b.one(True, False))
    x = b.add(f"{layer}", (x,), layer)
    return _activation(b, _norm(b, x))


def _pool(b: _Builder) -> int:
    x = b.any_image()
    size = b.of(x)[1:]
    if min(size) < 3:
        return _activation(b, x)
    kernel, stride, ceil = b.one(2, 3), b.one(1, 2), b.one(False, False, True)
    padding = b.one(0, 1) if kernel > 2 else 0
    if b.one(True, False):
        kind: Any = nn.MaxPool1d if b.spatial == 1 else nn.MaxPool2d
        layer = kind(kernel, stride, padding, ceil_mode=ceil)
    else:
        kind = nn.AvgPool1d if b.spatial == 1 else nn.AvgPool2d
        layer = kind(kernel, stride, padding, ceil_mode=ceil, count_include_pad=b.one(True, False))
    return b.add(f"{layer}", (x,), layer)


def _residual(b: _Builder) -> int:
    x = b.any_image()
    y = _conv(b, x, same=True, channels=b.of(x)[0])
    if b.one(True, False):
        y = _conv(b, y, same=True, channels=b.of(x)[0])
    text, add = b.one(("x + y", lambda p, q: p + q), ("torch.add", torch.add), ("x * y", lambda p, q: p * q))
    return _activation(b, b.add(text, (x, y), add))


def _pairwise(b: _Builder) -> int:
    x = b.any_image()
    same = [i for i in b.images() if b.of(i) == b.of(x)]
    y = b.one(*same)
    if b.one(True, False):
        return _activation(b, b.add("x + y", (x, y), lambda p, q: p + q))
    return _activation(b, b.add("x * y", (y, x), lambda p, q: p * q))


def _squeeze_excite(b: _Builder) -> int:
    x = b.any_image()
    channels = b.of(x)[0]
    axes = tuple(range(2, 2 + b.spatial))
    if b.one(True, False):
        y = b.add("mean keepdim", (x,), lambda v: v.mean(axes, keepdim=True))
    else:
        kind: Any = nn.AdaptiveAvgPool1d if b.spatial == 1 else nn.AdaptiveAvgPool2d
        y = b.add("adaptive 1", (x,), kind(1))
    conv: Any = nn.Conv1d if b.spatial == 1 else nn.Conv2d
    y = b.add("squeeze", (y,), conv(channels, 8, 1))
    y = b.add("relu", (y,), nn.ReLU())
    y = b.add("excite", (y,), conv(8, channels, 1))
    y = b.add("gate", (y,), b.one(nn.Sigmoid, nn.Hardsigmoid)())
    return b.add("x * gate", (x, y), lambda p, q: p * q)


def _concat(b: _Builder) -> int:
    x = b.any_image()
    same = [i for i in b.images() if b.of(i)[1:] == b.of(x)[1:]]
    others = [b.one(*same) for _ in range(b.one(1, 2))]
    if b.one(True, False):
        others.append(_conv(b, x, same=True))
    return b.add("cat", (x, *others), lambda *v: torch.cat(v, 1))


def _slice(b: _Builder) -> int:
    x = b.any_image()
    channels, *size = b.of(x)
    if b.one(True, False) and min(size) > 3:
        if b.spatial == 1:
            return b.add("slice ::2", (x,), lambda v: v[:, :, ::2])
        return b.add("slice ::2", (x,), lambda v: v[:, :, ::2, ::2])
    if channels > 3:
        return b.add("slice channels", (x,), lambda v: v[:, 1:-1])
    return _activation(b, x)


def _chunk(b: _Builder) -> int:
    x = b.any_image()
    if b.of(x)[0] % 2:
        return _conv(b, x)
    if b.one(True, False):
        y, z = b.add("chunk 0", (x,), lambda v: v.chunk(2, 1)[0]), b.add("chunk 1", (x,), lambda v: v.chunk(2, 1)[1])
        return b.add("x + y", (y, z), lambda p, q: p + q)

    def shuffle(v: torch.Tensor) -> torch.Tensor:
        n, c, *size = v.shape
        return v.reshape(n, 2, c // 2, *size).transpose(1, 2).reshape(n, c, *size)

    return b.add("channel shuffle", (x,), shuffle)


def _pad(b: _Builder) -> int:
    x = b.any_image()
    pads = [b.one(0, 1, 2) for _ in range(2 * b.spatial)]
    mode = b.one("constant", "constant", "constant", "channels", "reflect", "one")
    if mode == "channels":
        return b.add("pad channels", (x,), lambda v: functional.pad(v, [0, 0] * (len(v.shape) - 2) + [1, 2]))
    if mode == "reflect" and min(b.of(x)[1:]) > 2:
        y = b.add(f"reflect {pads}", (x,), lambda v: functional.pad(v, pads, mode="reflect"))
    elif mode == "one":
        y = b.add(f"pad with 1 {pads}", (x,), lambda v: functional.pad(v, pads, value=1.0))
    else:
        y = b.add(f"pad {pads}", (x,), lambda v: functional.pad(v, pads))
    return _conv(b, y) if b.one(True, True, False) else y


def _resize(b: _Builder) -> int:
    x = b.any_image()
    if max(b.of(x)[1:]) > 8:
        return _conv(b, x)
    if b.spatial == 2 and b.of(x)[0] % 4 == 0 and b.one(True, False):
        return b.add("pixel shuffle", (x,), nn.PixelShuffle(2))
    return b.add("upsample", (x,), nn.Upsample(scale_factor=2, mode="nearest"))


def _odd(b: _Builder) -> int:
    x = b.any_image()
    name = b.one("* 0.5", "+ 1", "dropout", "tanh", "abs")
    functions: dict[str, Callable[..., torch.Tensor]] = {
        "* 0.5": lambda v: v * 0.5,
        "+ 1": lambda v: v + 1,
        "dropout": nn.Dropout(),
        "tanh": torch.tanh,
        "abs": torch.abs,
    }
    return b.add(name, (x,), functions[name])


_BLOCKS = (
    _conv, _conv, _conv, _conv_transpose, _pool, _residual, _residual, _pairwise, _squeeze_excite, _concat, _slice,
    _chunk, _pad, _resize, _odd,
)  # fmt: skip


def _head(b: _Builder) -> None:
    x = b.any_image()
    axes = tuple(range(2, 2 + b.spatial))
    if len(b.shape) > 1:
        kind: Any = nn.AdaptiveAvgPool1d if b.spatial == 1 else nn.AdaptiveAvgPool2d
        how = b.one("none", "mean", "adaptive", "adaptive 2", "flatten", "view", "max")
        size = b.of(x)[1:]
        if how == "none":
            return
        if how == "adaptive 2" and any(n % 2 for n in size):
            how = "adaptive"
        if how == "mean":
            x = b.add("mean", (x,), lambda v: v.mean(axes))
        elif how == "max":
            x = b.add("amax", (x,), lambda v: v.amax(axes))
        elif how.startswith("adaptive"):
            x = b.add(how, (x,), kind(2 if how == "adaptive 2" else 1))
        if len(b.of(x)) > 1:
            if how == "view":
                x = b.add("view", (x,), lambda v: v.view(v.size(0), -1))
            else:
                x = b.add("flatten", (x,), nn.Flatten())
    for _ in range(b.one(1, 2)):
        x = b.add("linear", (x,), nn.Linear(b.of(x)[0], b.one(5, 10), bias=b.one(True, True, False)))
        x = _activation(b, x)


def _mlp(b: _Builder) -> None:
    x = 0
    for _ in range(b.one(1, 2, 3, 4)):
        y = b.add("linear", (x,), nn.Linear(b.of(x)[0], b.one(8, 12), bias=b.one(True, True, False)))
        y = _activation(b, _norm(b, y))
        same = [i for i in range(len(b.values)) if b.of(i) == b.of(y)]
        if b.one(True, False):
            y = b.add("x + y", (b.one(*same), y), lambda p, q: p + q)
        if b.one(False, False, True):
            y = b.add("cat", (y, b.one(*range(len(b.values)))), lambda p, q: torch.cat((p, q), -1))
        x = y
    b.add("linear", (x,), nn.Linear(b.of(x)[0], 5))


def draw_net(seed: int, depth: int) -> Net:
    """Return the net of a seed; it computes finite values on normal random inputs.

    Args:
        seed: seed of its structure and its weights.
        depth: number of blocks after the first.
    """
    generator = random.Random(seed)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        spatial = generator.choice((2, 2, 2, 2, 1, 0))
        size = generator.choice((5, 6, 8))
        shape = (generator.choice((3, 4)), *(size,) * spatial) if spatial else (generator.choice((4, 7)),)
        builder = _Builder(generator, shape)
        if spatial:
            _conv(builder)
            for _ in range(depth):
                generator.choice(_BLOCKS)(builder)
            _head(builder)
        else:
            _mlp(builder)
        outputs = [len(builder.steps)]
        if not any(isinstance(builder.steps[i - 1].function, LAYERS) for i in builder.before(outputs[0])):
            outputs.append(1)  # a net without layers would not test anything
        if generator.random() < 0.3:
            outputs.append(generator.randrange(1, len(builder.steps) + 1))
        module = randomized(Drawn(builder.steps, list(dict.fromkeys(outputs))), seed)
    text = "\n".join(f"{i + 1}: {s.text} of {list(s.takes)}" for i, s in enumerate(builder.steps))
    return Net(module, shape, f"{text}\noutputs {outputs}")
