"""Nets that generate or restore images, drawn here."""

from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.parametrizations import spectral_norm

from zoo_nets.blocks import Residual, conv
from zoo_nets.net import SAMPLES, Example, Net, example, example_without_norms, images

GENERATIVE = "generative"


class ModulatedConv(nn.Module):
    """StyleGAN2's convolution: a weight per sample, scaled by its style and normalized."""

    def __init__(self, inputs: int, outputs: int, style: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(outputs, inputs, 3, 3) / (9 * inputs) ** 0.5)
        self.style = nn.Linear(style, inputs)

    def forward(self, x: Tensor, w: Tensor) -> Tensor:
        scale = self.style(w) + 1
        demodulation = torch.rsqrt((scale**2) @ (self.weight**2).sum((2, 3)).t() + 1e-8)
        return functional.conv2d(x * scale[:, :, None, None], self.weight, padding=1) * demodulation[:, :, None, None]


class StyleGan(nn.Module):
    """StyleGAN2's generator: a mapping of equalized layers, a learned constant, modulated convolutions."""

    def __init__(self, style: int = 64, width: int = 64, levels: int = 3) -> None:
        super().__init__()
        self.mapping = nn.ParameterList(nn.Parameter(torch.randn(style, style)) for _ in range(4))
        self.constant = nn.Parameter(torch.randn(1, width, 4, 4))
        self.convs = nn.ModuleList(ModulatedConv(width, width, style) for _ in range(2 * levels))
        self.to_rgb = nn.ModuleList(nn.Conv2d(width, 3, 1) for _ in range(levels))

    def forward(self, z: Tensor) -> Tensor:
        w = functional.normalize(z, dim=1)
        for weight in self.mapping:
            w = functional.leaky_relu(functional.linear(w, weight / weight.shape[1] ** 0.5), 0.2)
        x = self.constant.expand(z.shape[0], -1, -1, -1)
        image = torch.zeros_like(x[:, :3])
        for level, to_rgb in enumerate(self.to_rgb):
            x = functional.interpolate(x, scale_factor=2.0)
            image = functional.interpolate(image, scale_factor=2.0)
            for layer in self.convs[2 * level : 2 * level + 2]:
                x = functional.leaky_relu(layer(x, w), 0.2)
            image = image + to_rgb(x)
        return image


class Dcgan(nn.Module):
    """DCGAN's generator: transposed convolutions with BatchNorm."""

    def __init__(self, noise: int = 100, width: int = 64) -> None:
        super().__init__()
        widths = [8 * width, 4 * width, 2 * width, width]
        layers: list[nn.Module] = [nn.ConvTranspose2d(noise, widths[0], 4, bias=False)]
        for i, o in pairwise(widths):
            layers += [nn.BatchNorm2d(i), nn.ReLU(), nn.ConvTranspose2d(i, o, 4, 2, 1, bias=False)]
        layers += [nn.BatchNorm2d(width), nn.ReLU(), nn.ConvTranspose2d(width, 3, 4, 2, 1), nn.Tanh()]
        self.layers = nn.Sequential(*layers)

    def forward(self, z: Tensor) -> Tensor:
        out: Tensor = self.layers(z[:, :, None, None])
        return out


class SnGan(nn.Module):
    """SN-GAN's discriminator: every layer with spectral_norm, none with another."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for i, o, stride in ((3, 1, 1), (1, 1, 2), (1, 2, 1), (2, 2, 2), (2, 4, 1), (4, 4, 2)):
            inputs = i if i == 3 else i * width
            layers += [
                spectral_norm(nn.Conv2d(inputs, o * width, 2 + stride, stride, 1)), nn.LeakyReLU(0.1),
            ]  # fmt: skip
        self.convs, self.last = nn.Sequential(*layers), spectral_norm(nn.Linear(4 * width, 1))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.last(self.convs(x).mean((2, 3)))
        return out


class Vae(nn.Module):
    """A variational autoencoder, which returns its reconstruction from the mean, the mean and the log variance."""

    def __init__(self, latent: int = 32) -> None:
        super().__init__()
        self.encoder = nn.Sequential(conv(1, 32, 3, 2), conv(32, 64, 3, 2), nn.Flatten())
        self.mean, self.log_variance = nn.Linear(64 * 49, latent), nn.Linear(64 * 49, latent)
        self.decoder = nn.Sequential(
            nn.Linear(latent, 64 * 49), nn.ReLU(), nn.Unflatten(1, (64, 7, 7)), nn.ConvTranspose2d(64, 32, 4, 2, 1),
            nn.BatchNorm2d(32), nn.ReLU(), nn.ConvTranspose2d(32, 1, 4, 2, 1),
        )  # fmt: skip

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        hidden = self.encoder(x)
        mean = self.mean(hidden)
        return self.decoder(mean), mean, self.log_variance(hidden)


class TimeBlock(nn.Module):
    """A residual block with GroupNorm, to which the embedding of the time is added."""

    def __init__(self, inputs: int, outputs: int, time: int) -> None:
        super().__init__()
        self.one = nn.Sequential(nn.GroupNorm(8, inputs), nn.SiLU(), nn.Conv2d(inputs, outputs, 3, padding=1))
        self.two = nn.Sequential(nn.GroupNorm(8, outputs), nn.SiLU(), nn.Conv2d(outputs, outputs, 3, padding=1))
        self.time, self.skip = nn.Linear(time, outputs), nn.Conv2d(inputs, outputs, 1)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        out: Tensor = self.skip(x) + self.two(self.one(x) + self.time(t)[:, :, None, None])
        return out


class DiffusionUNet(nn.Module):
    """The U-Net of a diffusion model: the noise in an image at a time, with attention at the bottom."""

    frequencies: Tensor

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.register_buffer("frequencies", torch.exp(-torch.arange(16) * 0.5))
        self.time = nn.Sequential(nn.Linear(32, 64), nn.SiLU(), nn.Linear(64, 64))
        self.first, self.last = nn.Conv2d(3, width, 3, padding=1), nn.Conv2d(width, 3, 3, padding=1)
        self.down, self.floor = TimeBlock(width, 2 * width, 64), TimeBlock(2 * width, 2 * width, 64)
        self.attention = nn.MultiheadAttention(2 * width, 4, batch_first=True)
        self.up, self.pool = TimeBlock(4 * width, width, 64), nn.AvgPool2d(2)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        angles = t[:, None] * self.frequencies
        time = self.time(torch.cat([angles.sin(), angles.cos()], 1))
        high = self.down(self.first(x), time)
        low = self.floor(self.pool(high), time)
        n, c, h, w = low.shape
        flat = low.flatten(2).transpose(1, 2)
        flat = flat + self.attention(flat, flat, flat, need_weights=False)[0]
        low = flat.transpose(1, 2).reshape(n, c, h, w)
        out: Tensor = self.last(self.up(torch.cat([functional.interpolate(low, scale_factor=2.0), high], 1), time))
        return out


def _style_transfer() -> nn.Module:
    def layer(i: int, o: int, kernel: int, stride: int = 1) -> list[nn.Module]:
        norm = nn.InstanceNorm2d(o, affine=True)
        return [nn.ReflectionPad2d(kernel // 2), nn.Conv2d(i, o, kernel, stride), norm, nn.ReLU()]

    up = nn.Upsample(scale_factor=2)
    return nn.Sequential(
        *layer(3, 16, 9), *layer(16, 32, 3, 2), *layer(32, 64, 3, 2),
        Residual(*layer(64, 64, 3), *layer(64, 64, 3)[:-1]), Residual(*layer(64, 64, 3), *layer(64, 64, 3)[:-1]),
        up, *layer(64, 32, 3), up, *layer(32, 16, 3), nn.ReflectionPad2d(4), nn.Conv2d(16, 3, 9),
    )  # fmt: skip


def _espcn() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 64, 5, padding=2), nn.Tanh(), nn.Conv2d(64, 32, 3, padding=1), nn.Tanh(),
        nn.Conv2d(32, 9, 3, padding=1), nn.PixelShuffle(3),
    )  # fmt: skip


def _autoencoder() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 32, 3, 2, 1), nn.ReLU(), nn.Conv2d(32, 64, 3, 2, 1), nn.ReLU(), nn.Conv2d(64, 16, 3, 2, 1),
        nn.Upsample(scale_factor=2), nn.Conv2d(16, 64, 3, padding=1), nn.ReLU(), nn.Upsample(scale_factor=2),
        nn.Conv2d(64, 32, 3, padding=1), nn.ReLU(), nn.Upsample(scale_factor=2), nn.Conv2d(32, 3, 3, padding=1),
    )  # fmt: skip


def _net(name: str, make: Callable[[], Example], *, convolutional: bool = False) -> Net:
    return Net(name, GENERATIVE, make, convolutional=convolutional)


NETS = (
    _net("StyleGAN2 generator (3 levels)", lambda: example(StyleGan(), z=torch.randn(SAMPLES, 64))),
    _net("DCGAN generator", lambda: example(Dcgan(), z=torch.randn(SAMPLES, 100))),  # transposed convolutions alone
    _net("SN-GAN discriminator", lambda: example(SnGan(), x=images(32)), convolutional=True),
    _net("VAE", lambda: example(Vae(), x=images(28, 1)), convolutional=True),
    _net("Diffusion U-Net (2 levels)", lambda: example(DiffusionUNet(), x=images(16), t=torch.rand(SAMPLES) * 1000)),
    _net("Style transfer (InstanceNorm)", lambda: example(_style_transfer(), input=images(64)), convolutional=True),
    _net("ESPCN super-resolution", lambda: example_without_norms(_espcn(), input=images(32, 1)), convolutional=True),
    _net("Convolutional autoencoder", lambda: example_without_norms(_autoencoder(), input=images(32)),
         convolutional=True),
)  # fmt: skip
