"""Nets for speech and sound, drawn here."""

from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.parametrizations import weight_norm

from zoo_nets.blocks import Residual, conv, conv1d
from zoo_nets.net import SAMPLES, Example, Net, example, images

SPEECH = "speech and sound"
FRAMES, OTHER_FRAMES = 48, (32, 80)


class KeywordGru(nn.Module):
    """Keyword spotting: two GRU layers over 40 mel bands, the last state decides."""

    def __init__(self) -> None:
        super().__init__()
        self.gru = nn.GRU(40, 128, 2, batch_first=True)
        self.last = nn.Linear(128, 12)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.last(self.gru(x)[0][:, -1])
        return out


class KeywordDsCnn(nn.Module):
    """Keyword spotting with depthwise separable convolutions."""

    def __init__(self, width: int, count: int) -> None:
        super().__init__()
        blocks = [layer for _ in range(count) for layer in (conv(width, width, groups=width), conv(width, width, 1))]
        self.body = nn.Sequential(conv(1, width, 5, 2), *blocks)
        self.last = nn.Linear(width, 12)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.last(self.body(x).mean((2, 3)))
        return out


class RnNoise(nn.Module):
    """RNNoise: gains of 22 bands from 42 features; the states of its three GRUs are inputs and outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.dense, self.vad = nn.Linear(42, 24), nn.Linear(24, 1)
        self.voice, self.noise = nn.GRU(24, 24, batch_first=True), nn.GRU(90, 48, batch_first=True)
        self.denoise, self.gains = nn.GRU(114, 96, batch_first=True), nn.Linear(96, 22)

    def forward(self, x: Tensor, voice: Tensor, noise: Tensor, denoise: Tensor) -> tuple[Tensor, ...]:
        dense = self.dense(x).tanh()
        heard, voice = self.voice(dense, voice)
        noisy, noise = self.noise(torch.cat([dense, heard, x], 2), noise)
        clean, denoise = self.denoise(torch.cat([heard, noisy, x], 2), denoise)
        return self.gains(clean).sigmoid(), self.vad(heard).sigmoid(), voice, noise, denoise


class Crnn(nn.Module):
    """Text recognition: convolutions, then a bidirectional LSTM along the line."""

    def __init__(self) -> None:
        super().__init__()
        self.convs = nn.Sequential(
            conv(1, 32), nn.MaxPool2d(2), conv(32, 64), nn.MaxPool2d(2), conv(64, 128), nn.MaxPool2d((2, 1)),
            conv(128, 128), nn.MaxPool2d((4, 1)),
        )  # fmt: skip
        self.lstm = nn.LSTM(128, 96, 2, bidirectional=True, batch_first=True)
        self.last = nn.Linear(192, 37)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.last(self.lstm(self.convs(x).squeeze(2).transpose(1, 2))[0])
        return out


class ConformerBlock(nn.Module):
    """A Conformer block: half a feed-forward, attention, a gated depthwise convolution, half a feed-forward."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.before, self.after = self.feed_forward(width), self.feed_forward(width)
        self.attention = nn.MultiheadAttention(width, 4, batch_first=True)
        self.norm, self.norm_conv, self.norm_last = nn.LayerNorm(width), nn.LayerNorm(width), nn.LayerNorm(width)
        self.expand = nn.Conv1d(width, 2 * width, 1)
        self.depthwise = nn.Conv1d(width, width, 15, padding=7, groups=width)
        self.batch_norm, self.project = nn.BatchNorm1d(width), nn.Conv1d(width, width, 1)

    @staticmethod
    def feed_forward(width: int) -> nn.Sequential:
        return nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.SiLU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.before(x) / 2
        y = self.norm(x)
        x = x + self.attention(y, y, y, need_weights=False)[0]
        y = functional.glu(self.expand(self.norm_conv(x).transpose(1, 2)), 1)
        x = x + self.project(functional.silu(self.batch_norm(self.depthwise(y)))).transpose(1, 2)
        out: Tensor = self.norm_last(x + self.after(x) / 2)
        return out


class Conformer(nn.Module):
    """A Conformer encoder with a CTC head, behind a convolution that halves the frames."""

    def __init__(self, width: int = 96) -> None:
        super().__init__()
        self.first = nn.Conv1d(80, width, 3, 2, 1)
        self.blocks = nn.Sequential(*(ConformerBlock(width) for _ in range(2)))
        self.last = nn.Linear(width, 40)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.last(self.blocks(self.first(x).transpose(1, 2)))
        return out


class QuartzNet(nn.Module):
    """QuartzNet: residual stacks of separable convolutions over time, with a CTC head."""

    def __init__(self, width: int = 128) -> None:
        super().__init__()
        self.first = conv1d(64, width, 33, 2)
        self.blocks = nn.Sequential(*(Residual(*self.separable(width, k), *self.separable(width, k)) for k in (33, 39)))
        self.last = nn.Conv1d(width, 29, 1)

    @staticmethod
    def separable(width: int, kernel: int) -> tuple[nn.Module, nn.Module]:
        return nn.Conv1d(width, width, kernel, padding=kernel // 2, groups=width), conv1d(width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.last(self.blocks(self.first(x)))
        return out


class CausalBlock(nn.Module):
    """Two dilated causal convolutions with weight_norm, and a residual."""

    def __init__(self, inputs: int, outputs: int, dilation: int) -> None:
        super().__init__()
        self.pad = 2 * dilation
        self.one = weight_norm(nn.Conv1d(inputs, outputs, 3, dilation=dilation))
        self.two = weight_norm(nn.Conv1d(outputs, outputs, 3, dilation=dilation))
        self.skip = nn.Conv1d(inputs, outputs, 1) if inputs != outputs else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y = functional.relu(self.one(functional.pad(x, (self.pad, 0))))
        y = functional.relu(self.two(functional.pad(y, (self.pad, 0))))
        return functional.relu(y + self.skip(x))


class WaveNet(nn.Module):
    """WaveNet: gated dilated convolutions, their skips summed; scores of 256 levels."""

    def __init__(self, width: int = 48, layers: int = 8) -> None:
        super().__init__()
        self.first = nn.Conv1d(1, width, 1)
        self.gates = nn.ModuleList(nn.Conv1d(width, 2 * width, 2, dilation=2**i) for i in range(layers))
        self.residuals = nn.ModuleList(nn.Conv1d(width, width, 1) for _ in range(layers))
        self.skips = nn.ModuleList(nn.Conv1d(width, 128, 1) for _ in range(layers))
        self.last = nn.Sequential(nn.ReLU(), nn.Conv1d(128, 128, 1), nn.ReLU(), nn.Conv1d(128, 256, 1))

    def forward(self, x: Tensor) -> Tensor:
        x, total = self.first(x), None
        for i, (gate, residual, skip) in enumerate(zip(self.gates, self.residuals, self.skips, strict=True)):
            a, b = gate(functional.pad(x, (2**i, 0))).chunk(2, 1)
            y = a.tanh() * b.sigmoid()
            x, total = x + residual(y), skip(y) if total is None else total + skip(y)
        out: Tensor = self.last(total)
        return out


class HifiGan(nn.Module):
    """HiFi-GAN's generator with weight_norm: upsampling, each time with blocks of several kernels."""

    def __init__(self, width: int = 128) -> None:
        super().__init__()
        self.first = weight_norm(nn.Conv1d(80, width, 7, padding=3))
        widths = [width // 2**i for i in range(4)]
        self.ups = nn.ModuleList(weight_norm(nn.ConvTranspose1d(i, o, 8, 4, 2)) for i, o in pairwise(widths))
        self.blocks = nn.ModuleList(nn.ModuleList(self.block(w, k) for k in (3, 7)) for w in widths[1:])
        self.last = weight_norm(nn.Conv1d(widths[-1], 1, 7, padding=3))

    @staticmethod
    def block(width: int, kernel: int) -> nn.Module:
        layers: list[nn.Module] = []
        for dilation in (1, 3):
            padding = dilation * (kernel // 2)
            layers += [
                nn.LeakyReLU(0.1), weight_norm(nn.Conv1d(width, width, kernel, dilation=dilation, padding=padding)),
            ]  # fmt: skip
        return Residual(*layers)

    def forward(self, mel: Tensor) -> Tensor:
        x = self.first(mel)
        for up, blocks in zip(self.ups, self.blocks, strict=True):
            x = up(functional.leaky_relu(x, 0.1))
            x = (blocks[0](x) + blocks[1](x)) / 2  # type: ignore[index]
        out: Tensor = self.last(functional.leaky_relu(x)).tanh()
        return out


class Tacotron(nn.Module):
    """Tacotron 2 without its loop: encoder, location-free attention by teacher forcing, and postnet."""

    def __init__(self, width: int = 96) -> None:
        super().__init__()
        self.embedding = nn.Embedding(60, width)
        self.convs = nn.Sequential(conv1d(width, width, 5), conv1d(width, width, 5))
        self.encoder = nn.LSTM(width, width // 2, bidirectional=True, batch_first=True)
        self.prenet = nn.Sequential(nn.Linear(80, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU())
        self.decoder = nn.LSTM(width, width, batch_first=True)
        self.attention = nn.MultiheadAttention(width, 1, batch_first=True)
        self.mel = nn.Linear(2 * width, 80)
        self.postnet = nn.Sequential(conv1d(80, width, 5), nn.Conv1d(width, 80, 5, padding=2))

    def forward(self, text: Tensor, mel: Tensor) -> Tensor:
        memory, _ = self.encoder(self.convs(self.embedding(text).transpose(1, 2)).transpose(1, 2))
        query, _ = self.decoder(self.prenet(mel))
        context, _ = self.attention(query, memory, memory, need_weights=False)
        coarse = self.mel(torch.cat([query, context], 2)).transpose(1, 2)
        out: Tensor = coarse + self.postnet(coarse)
        return out


def _frames(bands: int) -> Tensor:
    """Return sound as [samples, bands, frames]."""
    return torch.randn(SAMPLES, bands, FRAMES)


def _timed(name: str, make: Callable[[], Example], axis: int = 2, *, convolutional: bool = False) -> Net:
    return Net(name, SPEECH, make, convolutional, lengths=OTHER_FRAMES, length_axes={"x": axis})


NETS = (
    _timed("GRU keyword spotting", lambda: example(KeywordGru(), x=_frames(40).transpose(1, 2)), axis=1),
    Net("DS-CNN-S keyword spotting", SPEECH, lambda: example(KeywordDsCnn(64, 4), x=images(40, 1)),
        convolutional=True),
    Net("DS-CNN-L keyword spotting", SPEECH, lambda: example(KeywordDsCnn(276, 5), x=images(40, 1)),
        convolutional=True),
    Net(
        "RNNoise with states", SPEECH,
        lambda: example(
            RnNoise(), x=torch.randn(SAMPLES, 10, 42), voice=torch.randn(1, SAMPLES, 24),
            noise=torch.randn(1, SAMPLES, 48), denoise=torch.randn(1, SAMPLES, 96),
        ),
        lengths=(7, 16), length_axes={"x": 1}, batch_axes={"voice": 1, "noise": 1, "denoise": 1},
    ),
    Net("CRNN", "detection and segmentation",
        lambda: example(Crnn(), x=torch.randn(SAMPLES, 1, 32, 64)), lengths=(48, 96), length_axes={"x": 3}),
    _timed("Conformer (2 blocks)", lambda: example(Conformer(), x=_frames(80))),
    _timed("QuartzNet (2 blocks)", lambda: example(QuartzNet(), x=_frames(64)), convolutional=True),
    Net("TCN with weight_norm", SPEECH,
        lambda: example(nn.Sequential(*(CausalBlock(i, 48, d) for i, d in ((16, 1), (48, 2), (48, 4)))),
                        input=_frames(16)),
        convolutional=True, lengths=OTHER_FRAMES, length_axes={"input": 2}),
    _timed("WaveNet (8 layers)", lambda: example(WaveNet(), x=_frames(1)), convolutional=True),
    Net("HiFi-GAN generator with weight_norm (small)", SPEECH, lambda: example(HifiGan(), mel=_frames(80)),
        convolutional=True, lengths=OTHER_FRAMES, length_axes={"mel": 2}),
    Net("Tacotron 2 (teacher-forced)", SPEECH,
        lambda: example(Tacotron(), text=torch.randint(0, 60, (SAMPLES, 20)), mel=_frames(80).transpose(1, 2)),
        lengths=(12, 31), length_axes={"text": 1, "mel": 1}),
)  # fmt: skip
