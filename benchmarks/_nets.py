"""The nets of the benchmarks with their images: two real ones and the one of samples/digits."""

import contextlib
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from qcompress.data.dataset import Dataset, load_data
from qcompress.graph.options import ProgramOptions
from qcompress.graph.program import FloatProgram
from qcompress.openers import load_source
from qcompress.sources.arch import module_of_state_dict
from qcompress.sources.base import SourceOptions

SAMPLE = Path(__file__).parents[1] / "samples" / "digits"


@dataclass(frozen=True)
class Net:
    """A net with its test and calibration images.

    Args:
        weights: name of the file with its weights.
        arch: its architecture.
        images: labelled test images.
        calibration: calibration images; they do not overlap the test images.
        calibration_samples: number of calibration images to use.
        shape: shape of one input.
        transform: function in the architecture's file that converts images to inputs; None if images are inputs.
    """

    weights: str
    arch: str
    images: str
    calibration: str
    calibration_samples: int
    shape: tuple[int, ...]
    transform: str | None = "preprocess"

    def program(self, folder: Path) -> FloatProgram:
        """Return the original net, BatchNorm not folded."""
        source = load_source(folder / self.weights, options=self._options(folder))
        example = np.random.default_rng(0).standard_normal(self.shape).astype(np.float32)
        return source.program(ProgramOptions(inputs={"x": example}))

    def module(self, folder: Path) -> torch.nn.Module:
        """Return the same net as its author's module."""
        options = self._options(folder)
        source = load_source(folder / self.weights, options=options)
        return module_of_state_dict(source.tensors(), options, self.weights).eval()

    def test_data(self, folder: Path) -> Dataset:
        """Return the data that accuracy is measured on."""
        return self._data(folder, self.images)

    def calibration_data(self, folder: Path) -> Dataset:
        """Return the data that activations are calibrated on."""
        return self._data(folder, self.calibration).head(self.calibration_samples)

    def _options(self, folder: Path) -> SourceOptions:
        return SourceOptions(arch=f"{folder}/{self.arch}")

    def _data(self, folder: Path, spec: str) -> Dataset:
        module = self.arch.partition(":")[0]
        transform = None if self.transform is None else f"{folder}/{module}:{self.transform}"
        return load_data(f"{folder}/{spec}", transform=transform)


NETS = {
    "resnet20": Net(
        "resnet20_cifar10jpeg_ft.safetensors",
        "resnet_cifar.py:ResNetCifar",
        images="cifar10jpeg_small.npz:test_x,test_y",
        calibration="cifar10jpeg_small.npz:train_x",
        calibration_samples=512,
        shape=(1, 3, 32, 32),
    ),
    "mobilenet": Net(
        "mobilenet_v1_075_imagenet.safetensors",
        "mobilenet_v1.py:MobileNetV1",
        images="imagenet1k_sample_part1.npz:x,y",
        calibration="imagenet1k_sample_part0.npz:x",
        calibration_samples=250,
        shape=(1, 3, 224, 224),
    ),
}

DIGITS = Net(
    "state.pt",
    "net.py:DigitsNet",
    images="test.npz:image=x,y=y",
    calibration="calibration.npz:image=x",
    calibration_samples=256,
    shape=(1, 1, 8, 8),
    transform=None,
)


@contextlib.contextmanager
def trained_digits() -> Iterator[Path]:
    """Train the digits sample from its fixed seed, which takes some seconds, and yield its folder."""
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([sys.executable, SAMPLE / "train.py", "--out", folder], check=True, stdout=subprocess.DEVNULL)
        shutil.copy(SAMPLE / "net.py", folder)
        yield Path(folder)
