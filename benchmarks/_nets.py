"""The two real nets of the benchmarks, with their images."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from qcompress.data import Dataset, load_data
from qcompress.program import FloatProgram
from qcompress.sources import ProgramOptions, SourceOptions, load_source


@dataclass(frozen=True)
class Net:
    """A net of the benchmarks.

    Args:
        weights: file of its weights.
        arch: its architecture, in a file that also holds `preprocess`.
        images: images with labels that it is tested on.
        calibration: images that it is calibrated on, none of them tested on.
        calibration_samples: how many of those.
        shape: of one input.
    """

    weights: str
    arch: str
    images: str
    calibration: str
    calibration_samples: int
    shape: tuple[int, ...]

    def program(self, folder: Path) -> FloatProgram:
        """The net as it came, BatchNorm not folded."""
        source = load_source(folder / self.weights, options=SourceOptions(arch=f"{folder}/{self.arch}"))
        example = np.random.default_rng(0).standard_normal(self.shape).astype(np.float32)
        return source.program(ProgramOptions(inputs={"x": example}))

    def test_data(self, folder: Path) -> Dataset:
        """What accuracy is measured on."""
        return self._data(folder, self.images)

    def calibration_data(self, folder: Path) -> Dataset:
        """What activations are calibrated on."""
        return self._data(folder, self.calibration).head(self.calibration_samples)

    def _data(self, folder: Path, spec: str) -> Dataset:
        module = self.arch.partition(":")[0]
        return load_data(f"{folder}/{spec}", transform=f"{folder}/{module}:preprocess")


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
