"""Small nets with unusual parts of known architectures, one part each, and the shapes of their inputs."""

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional

from tests.helpers.nets import randomized

Arrays = dict[str, npt.NDArray[Any]]


class MobileNetBlock(nn.Module):
    """A block with TensorFlow's padding: more at the end than at the start."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, stride=2, bias=False)
        self.bn = nn.BatchNorm2d(8)
        self.depthwise = nn.Conv2d(8, 8, 3, groups=8)
        self.point = nn.Conv2d(8, 6, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = functional.relu6(self.bn(self.stem(functional.pad(x, (0, 1, 0, 1)))))
        x = functional.relu6(self.depthwise(functional.pad(x, (1, 1, 1, 1))))
        return self.point(x)


class OptionA(nn.Module):
    """ResNet-20's shortcut of type A: every other pixel, with zeros for the missing channels."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 4, 3, padding=1)
        self.a = nn.Conv2d(4, 8, 3, stride=2, padding=1)
        self.b = nn.Conv2d(8, 8, 3, padding=1)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x).relu()
        y = self.b(self.a(x).relu())
        x = (y + functional.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 2, 2))).relu()
        return self.head(functional.avg_pool2d(x, 4).view(x.size(0), -1))


class Dense(nn.Module):
    """Layers whose input is the concatenation of all earlier values."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(7, 4, 3, padding=1)
        self.c = nn.Conv2d(11, 4, 1)
        self.pool, self.head = nn.AvgPool2d(2), nn.Linear(64, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([x, self.a(x).relu()], 1)
        x = torch.cat([x, self.b(x).relu()], 1)
        return self.head(self.pool(self.c(x)).flatten(1))


class SqueezeExcite(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.squeeze, self.excite = nn.Conv2d(8, 4, 1), nn.Conv2d(4, 8, 1)
        self.head = nn.Conv2d(8, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = functional.hardswish(self.conv(x))
        gate = functional.hardsigmoid(self.excite(self.squeeze(functional.adaptive_avg_pool2d(x, 1)).relu()))
        return self.head(x * gate)


class UNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.down, self.deep = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 8, 3, padding=1)
        self.up, self.out = nn.ConvTranspose2d(8, 4, 2, stride=2), nn.Conv2d(8, 2, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        skip = self.down(x).relu()
        deep = self.deep(functional.max_pool2d(skip, 2)).relu()
        return self.out(torch.cat([skip, self.up(deep)], 1))


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(12, 16), nn.Linear(16, 16), nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x).relu()
        return self.c(x + self.b(x).relu())


class TransformerBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attend = nn.MultiheadAttention(16, 2, batch_first=True)
        self.norm1, self.norm2 = nn.LayerNorm(16), nn.LayerNorm(16)
        self.wide, self.narrow = nn.Linear(16, 32), nn.Linear(32, 16)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm1(x + self.attend(x, x, x, need_weights=False)[0])
        return self.norm2(x + self.narrow(functional.gelu(self.wide(x))))


class LstmBesideLinear(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.into, self.out = nn.Linear(6, 8), nn.Linear(8, 5)
        self.recur = nn.LSTM(8, 8, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        y, _ = self.recur(self.into(x).relu())
        return self.out(y[:, -1])


class TiedEmbedding(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.mix = nn.Embedding(40, 16), nn.Linear(16, 16)
        self.head = nn.Linear(16, 40, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.mix(self.embed(ids)).relu())


class TwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Conv2d(3, 4, 3), nn.Conv2d(3, 4, 3), nn.Linear(4, 5)

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        return self.head((self.a(left) + self.b(right)).relu().mean((2, 3)))


class DictOutputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 4, 3), nn.Linear(4, 5)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        features = self.conv(x).relu()
        return {"features": features, "logits": self.head(features.mean((2, 3)))}


class FixedBatch(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fc = nn.Conv2d(3, 4, 3), nn.Linear(144, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.conv(x).relu().reshape(1, 144))


class QuantizedOutput(nn.Module):
    """A net whose outputs include layer inputs and a layer's output that is an operand of an add."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        x = self.a(x).relu()
        y = self.b(x)
        z = x + y
        return z, x, y, z.flatten(1)


class InputAsOutput(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.conv(x).relu(), x, x[:, :2]


class InPlace(nn.Module):
    """Changes values in place that other operations read, also through views."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3, padding=1)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.a(x))
        z = self.b(y)
        z += y
        z[:, :2] *= 0.5
        functional.relu(z[:, 1:3], inplace=True)
        return self.b(self.relu(z))


class Dropouts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 4, 3), nn.Linear(144, 5)
        self.drop2, self.drop = nn.Dropout2d(), nn.Dropout()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.drop(self.drop2(self.conv(x).relu()).flatten(1)))


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 3, 3, padding=1), nn.Linear(3, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(self.conv(x).relu()).relu()
        return self.head(x.amax((2, 3))) - self.head(x.mean((2, 3)))


class PoolFlatten(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 4, 3), nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(functional.adaptive_avg_pool2d(self.conv(x).relu(), 1).flatten(1))


class MeanKeepdim(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.head(self.conv(x).relu().mean(dim=(2, 3), keepdim=True))
        return x.view(x.size(0), -1)


class ChannelShuffle(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, groups=2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x).relu()
        n, c, h, w = x.shape
        return self.b(x.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)).relu()


class PixelShuffle(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3), nn.Conv2d(2, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(functional.pixel_shuffle(self.a(x).relu(), 2))


class Upsample(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(functional.interpolate(self.a(x).relu(), scale_factor=2, mode="nearest"))


class Chunks(nn.Module):
    """Takes the same values by chunk, split and index."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 8, 3), nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x).relu()
        left, right = x.chunk(2, 1)
        first, second, third = x.split([2, 2, 4], 1)
        return self.b(left) + self.c(right) + self.c(torch.cat([second, first], 1)) + self.b(third)


class PreActivation(nn.Module):
    """Uses values both before and after a clamp as operands of layers and sums."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3, padding=1)
        self.c, self.d = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        x = x + self.b(x.relu())
        y = self.c(functional.relu6(x))
        return self.d(y.relu()) + self.c(y.clamp(-0.25, 0.5)) + self.c(x)


class Unused(nn.Module):
    """Computes unused values, one changed in place and one through a dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.drop = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3), nn.Dropout()

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        self.drop(x.abs())
        functional.relu(self.b(x), inplace=True).flip(1)
        return self.b(x.relu())


class Strange(nn.Module):
    """Float operations between integer layers: bilinear upsampling, instance norm, a product of activations."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3)
        self.norm = nn.InstanceNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        x = functional.interpolate(self.norm(self.a(x)), scale_factor=2, mode="bilinear")
        y = self.b(x).flatten(2)
        return y @ y.transpose(1, 2)


class MaskedPool(nn.Module):
    """Data movement before layers: stack, expand, roll, flip, repeat, gather, where, clamp, masked fill."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x).clamp(-0.5, 0.75)
        x = torch.stack([x, x.flip(3)], 1).amax(1)
        x = torch.where(x > 0, x, x.roll(1, 2))
        return self.b(x.masked_fill(x > 0.7, 0.0))


def _image(size: int = 8) -> dict[str, tuple[int, ...]]:
    return {"x": (3, size, size)}


# Name -> (net, shapes of its inputs by name).
ODD: dict[str, tuple[type[nn.Module], dict[str, tuple[int, ...]]]] = {
    "asymmetric pads": (MobileNetBlock, _image()),
    "option A": (OptionA, _image()),
    "dense": (Dense, _image()),
    "squeeze-excite": (SqueezeExcite, _image()),
    "u-net": (UNet, _image()),
    "mlp": (Mlp, {"x": (12,)}),
    "transformer": (TransformerBlock, {"x": (5, 16)}),
    "lstm": (LstmBesideLinear, {"x": (5, 6)}),
    "tied embedding": (TiedEmbedding, {"ids": (5,)}),
    "two inputs": (TwoInputs, {"left": (3, 8, 8), "right": (3, 8, 8)}),
    "dict outputs": (DictOutputs, _image()),
    "fixed batch": (FixedBatch, _image()),
    "quantized output": (QuantizedOutput, _image()),
    "input as output": (InputAsOutput, _image()),
    "in place": (InPlace, _image()),
    "dropout": (Dropouts, _image()),
    "twice": (Twice, _image()),
    "pool and flatten": (PoolFlatten, _image()),
    "mean keepdim": (MeanKeepdim, _image()),
    "channel shuffle": (ChannelShuffle, _image()),
    "pixel shuffle": (PixelShuffle, _image(6)),
    "upsample": (Upsample, _image(6)),
    "chunks": (Chunks, _image()),
    "pre-activation": (PreActivation, _image()),
    "unused": (Unused, _image()),
    "strange": (Strange, _image(6)),
    "moves": (MaskedPool, _image()),
}


def odd_net(name: str) -> nn.Module:
    """Return a net in eval mode, with the same weights each time."""
    with torch.random.fork_rng():
        torch.manual_seed(sum(name.encode()))
        return randomized(ODD[name][0]())


def odd_inputs(name: str, samples: int, seed: int = 0) -> Arrays:
    """Return random inputs: normally distributed floats, and ids below 40."""
    random = np.random.default_rng(seed)
    return {
        key: random.integers(0, 40, (samples, *shape))
        if key == "ids"
        else random.standard_normal((samples, *shape)).astype(np.float32)
        for key, shape in ODD[name][1].items()
    }
