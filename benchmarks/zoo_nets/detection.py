"""Nets that detect and segment, and the first convolutional nets; drawn here but for torchvision's DeepLab."""

from collections.abc import Callable
from importlib import import_module

import torch
from torch import Tensor, nn
from torch.nn import functional

from zoo_nets.blocks import Residual, conv
from zoo_nets.net import Example, Net, example, example_without_norms, images
from zoo_nets.packages import declare_torchvision_operators

DETECTION = "detection and segmentation"


def silu(inputs: int, outputs: int, kernel: int = 1, stride: int = 1) -> nn.Sequential:
    """Return YOLO's convolution."""
    return conv(inputs, outputs, kernel, stride, activation=nn.SiLU)


class C2f(nn.Module):
    """YOLOv8's block: bottlenecks on half of the channels, all their outputs concatenated."""

    def __init__(self, inputs: int, outputs: int, count: int, *, shortcut: bool = True) -> None:
        super().__init__()
        half = outputs // 2
        self.first = silu(inputs, outputs)
        bodies = [(silu(half, half, 3), silu(half, half, 3)) for _ in range(count)]
        self.blocks = nn.ModuleList(Residual(*body) if shortcut else nn.Sequential(*body) for body in bodies)
        self.last = silu((2 + count) * half, outputs)

    def forward(self, x: Tensor) -> Tensor:
        parts = list(self.first(x).chunk(2, 1))
        for block in self.blocks:
            parts.append(block(parts[-1]))
        out: Tensor = self.last(torch.cat(parts, 1))
        return out


class Sppf(nn.Module):
    """YOLOv8's pyramid of poolings."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first, self.last, self.pool = silu(width, width // 2), silu(2 * width, width), nn.MaxPool2d(5, 1, 2)

    def forward(self, x: Tensor) -> Tensor:
        parts = [self.first(x)]
        for _ in range(3):
            parts.append(self.pool(parts[-1]))
        out: Tensor = self.last(torch.cat(parts, 1))
        return out


class YoloV8n(nn.Module):
    """YOLOv8n's backbone, neck and heads; boxes and scores of all cells, not decoded."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(silu(3, 16, 3, 2), silu(16, 32, 3, 2), C2f(32, 32, 1))
        self.p3 = nn.Sequential(silu(32, 64, 3, 2), C2f(64, 64, 2))
        self.p4 = nn.Sequential(silu(64, 128, 3, 2), C2f(128, 128, 2))
        self.p5 = nn.Sequential(silu(128, 256, 3, 2), C2f(256, 256, 1), Sppf(256))
        self.up = nn.Upsample(scale_factor=2)
        self.n4, self.n3 = C2f(384, 128, 1, shortcut=False), C2f(192, 64, 1, shortcut=False)
        self.d3, self.m4 = silu(64, 64, 3, 2), C2f(192, 128, 1, shortcut=False)
        self.d4, self.m5 = silu(128, 128, 3, 2), C2f(384, 256, 1, shortcut=False)
        widths = (64, 128, 256)
        self.boxes = nn.ModuleList(self.head(w, 64, 64) for w in widths)
        self.scores = nn.ModuleList(self.head(w, 80, 80) for w in widths)

    @staticmethod
    def head(inputs: int, width: int, outputs: int) -> nn.Sequential:
        return nn.Sequential(silu(inputs, width, 3), silu(width, width, 3), nn.Conv2d(width, outputs, 1))

    def forward(self, x: Tensor) -> Tensor:
        p3 = self.p3(self.stem(x))
        p4 = self.p4(p3)
        p5 = self.p5(p4)
        n4 = self.n4(torch.cat([self.up(p5), p4], 1))
        n3 = self.n3(torch.cat([self.up(n4), p3], 1))
        m4 = self.m4(torch.cat([self.d3(n3), n4], 1))
        m5 = self.m5(torch.cat([self.d4(m4), p5], 1))
        levels = zip(self.boxes, self.scores, (n3, m4, m5), strict=True)
        return torch.cat([torch.cat([box(m), score(m)], 1).flatten(2) for box, score, m in levels], 2)


class UNet(nn.Module):
    """U-Net with three levels, transposed convolutions and skip connections."""

    def __init__(self, width: int = 16, classes: int = 2) -> None:
        super().__init__()
        widths = [width, 2 * width, 4 * width]
        ins = [3, *widths[:-1]]
        self.down = nn.ModuleList(nn.Sequential(conv(i, o), conv(o, o)) for i, o in zip(ins, widths, strict=True))
        self.floor = nn.Sequential(conv(widths[-1], 2 * widths[-1]), conv(2 * widths[-1], 2 * widths[-1]))
        self.up = nn.ModuleList(nn.ConvTranspose2d(2 * o, o, 2, 2) for o in reversed(widths))
        self.merge = nn.ModuleList(nn.Sequential(conv(2 * o, o), conv(o, o)) for o in reversed(widths))
        self.last = nn.Conv2d(width, classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        skips = []
        for block in self.down:
            skips.append(block(x))
            x = functional.max_pool2d(skips[-1], 2)
        x = self.floor(x)
        for up, merge, skip in zip(self.up, self.merge, reversed(skips), strict=True):
            x = merge(torch.cat([up(x), skip], 1))
        out: Tensor = self.last(x)
        return out


class SsdLite(nn.Module):
    """An SSD with depthwise blocks: boxes and scores of two levels."""

    def __init__(self, classes: int = 10, anchors: int = 3) -> None:
        super().__init__()
        self.first = nn.Sequential(conv(3, 32, 3, 2), *self.block(32, 64, 2), *self.block(64, 128, 2))
        self.second = nn.Sequential(*self.block(128, 256, 2))
        self.boxes = nn.ModuleList(nn.Conv2d(w, 4 * anchors, 3, padding=1) for w in (128, 256))
        self.scores = nn.ModuleList(nn.Conv2d(w, classes * anchors, 3, padding=1) for w in (128, 256))
        self.classes = classes

    @staticmethod
    def block(inputs: int, outputs: int, stride: int) -> tuple[nn.Module, nn.Module]:
        depthwise = conv(inputs, inputs, 3, stride, groups=inputs, activation=nn.ReLU6)
        return depthwise, conv(inputs, outputs, 1, activation=nn.ReLU6)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        levels = [self.first(x)]
        levels.append(self.second(levels[0]))
        boxes = [h(m).permute(0, 2, 3, 1).flatten(1) for h, m in zip(self.boxes, levels, strict=True)]
        scores = [h(m).permute(0, 2, 3, 1).flatten(1) for h, m in zip(self.scores, levels, strict=True)]
        n = x.shape[0]
        return torch.cat(boxes, 1).reshape(n, -1, 4), torch.cat(scores, 1).reshape(n, -1, self.classes).softmax(2)


def _deeplab() -> Example:
    declare_torchvision_operators()
    segmentation = import_module("torchvision.models.segmentation")
    make = segmentation.deeplabv3_mobilenet_v3_large
    return example(make(weights=None, weights_backbone=None, num_classes=21), x=images(96))


def _lenet() -> Example:
    return example_without_norms(
        nn.Sequential(
            nn.Conv2d(1, 6, 5, padding=2), nn.Tanh(), nn.AvgPool2d(2), nn.Conv2d(6, 16, 5), nn.Tanh(), nn.AvgPool2d(2),
            nn.Flatten(), nn.Linear(400, 120), nn.Tanh(), nn.Linear(120, 84), nn.Tanh(), nn.Linear(84, 10),
        ),
        input=images(28, 1),
    )  # fmt: skip


def _net(name: str, make: Callable[[], Example], family: str = DETECTION, package: str = "") -> Net:
    return Net(name, family, make, convolutional=True, package=package)


NETS = (
    _net("YOLOv8n", lambda: example(YoloV8n(), x=images(128))),
    _net("SSDLite (4 blocks)", lambda: example(SsdLite(), x=images(96))),
    _net("U-Net (3 levels)", lambda: example(UNet(), x=images(64))),
    _net("DeepLabV3, MobileNetV3", _deeplab, package="torchvision"),
    _net("LeNet-5", _lenet, "image classification"),
)
