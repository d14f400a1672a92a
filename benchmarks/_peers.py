"""Compression without training by other tools, configured as their documentation recommends.

All tools get the net with BatchNorm folded, which favours them: with coremltools' 4-bit palettes, ResNet-20 has 85.2 %
accuracy after folding and 84.0 % before.
"""

import copy
import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import _baselines
import torch
from onnxruntime.quantization import QuantType
from torch import nn
from torch.nn import functional

from qcompress.data.dataset import Dataset
from qcompress.graph.program import FloatProgram

INSTALL = "pip install --no-deps -r benchmarks/requirements.txt attrs cattrs pyaml pyyaml tqdm"


@dataclass(frozen=True)
class Subject:
    """A net to compress.

    Args:
        file: the float file.
        module: the same net; tools must not modify it.
        calibration: unlabelled inputs.
    """

    file: bytes
    module: nn.Module
    calibration: Dataset


@dataclass(frozen=True)
class Palettized:
    """A palettized net that exists only in torch.

    Args:
        module: the net.
        nbytes: smallest possible file: packed codes, float32 tables and scales, everything else in float32.
    """

    module: nn.Module
    nbytes: int


@dataclass(frozen=True)
class Peer:
    """Another compression tool.

    Args:
        needs: the Python module that it needs.
        make: compresses a net to a number of bits per weight; returns a file, or a Palettized if it writes no file.
        bits: the only width that it supports; None for 1 to 8.
    """

    needs: str
    make: Callable[[Subject, int], bytes | Palettized]
    bits: int | None = None

    @property
    def is_installed(self) -> bool:
        """Return whether the tool can be imported."""
        return importlib.util.find_spec(self.needs.partition(".")[0]) is not None


def folded_module(module: nn.Module, folded: FloatProgram) -> nn.Module:
    """Return the author's module with the weights and biases of the folded program and without BatchNorms."""
    module, state = copy.deepcopy(module), folded.state()
    assert not any(name.endswith("running_mean") for name in state), "a BatchNorm was not folded"
    for name, child in list(module.named_modules()):
        if isinstance(child, nn.BatchNorm2d):
            parent, _, last = name.rpartition(".")
            setattr(module.get_submodule(parent), last, nn.Identity())
        elif isinstance(child, nn.Conv2d | nn.Linear):
            child.weight = nn.Parameter(state[f"{name}.weight"].detach().clone())
            child.bias = nn.Parameter(state[f"{name}.bias"].detach().clone())
    return module


def post_training(**options: Any) -> Callable[[Subject, int], Palettized]:
    """Return coremltools' PostTrainingPalettizer: k-means on each weight."""

    def make(subject: Subject, bits: int) -> Palettized:
        from coremltools.optimize.torch.palettization import PostTrainingPalettizer, PostTrainingPalettizerConfig

        config = PostTrainingPalettizerConfig.from_dict({"global_config": {"n_bits": bits, **options}})
        return _counted(PostTrainingPalettizer(subject.module, config).compress(), bits)

    return make


def sensitive(**options: Any) -> Callable[[Subject, int], Palettized]:
    """Return coremltools' SKMPalettizer: k-means weighted by squared gradients of a loss on the net's outputs."""

    def make(subject: Subject, bits: int) -> Palettized:
        from coremltools.optimize.torch.palettization import SKMPalettizer, SKMPalettizerConfig

        def loss(module: nn.Module, inputs: torch.Tensor) -> torch.Tensor:
            logits = module(inputs)
            return functional.cross_entropy(logits, logits.argmax(1))

        samples = [
            torch.from_numpy(value) for batch in subject.calibration.batches(1) for value in batch.inputs.values()
        ]
        config = SKMPalettizerConfig.from_dict(
            {"global_config": {"n_bits": bits, **options}, "calibration_nsamples": len(samples)}
        )
        return _counted(SKMPalettizer(subject.module, config).compress(dataloader=samples, loss_fn=loss), bits)

    return make


def kmeans(subject: Subject, bits: int) -> Palettized:
    """Run scikit-learn's KMeans on each weight, with one initialisation."""
    from sklearn.cluster import KMeans

    module, tables = copy.deepcopy(subject.module), {}
    for name, child in module.named_modules():
        if isinstance(child, nn.Conv2d | nn.Linear):
            weight = child.weight.detach().numpy()
            found = KMeans(min(1 << bits, weight.size), n_init=1, random_state=0).fit(weight.reshape(-1, 1))
            child.weight.data = torch.from_numpy(found.cluster_centers_[found.labels_].reshape(weight.shape))
            tables[f"{name}.weight"] = found.n_clusters
    return Palettized(module, ideal_nbytes(module, bits, tables))


def static(weight_type: QuantType) -> Callable[[Subject, int], bytes]:
    """Return onnxruntime's quantize_static with MinMax calibration and uint8 activations."""

    def make(subject: Subject, bits: int) -> bytes:
        return _baselines.static(subject.file, subject.calibration, "MinMax", batch=32, weight_type=weight_type)

    return make


# MatMulNBitsQuantizer is missing because it quantizes MatMul only, and these nets do not contain any.
COREML = "coremltools.optimize.torch.palettization"
GROUPS = {"granularity": "per_grouped_channel", "group_size": 8, "enable_per_channel_scale": True}
PEERS: Mapping[str, Peer] = {
    "PTP": Peer(COREML, post_training()),
    "PTP groups": Peer(COREML, post_training(**GROUPS)),
    "SKM groups": Peer(COREML, sensitive(**GROUPS)),
    "KMeans": Peer("sklearn.cluster", kmeans),
    "W4A8 static": Peer("onnxruntime.quantization", static(QuantType.QInt4), bits=4),
    "W8A8 static": Peer("onnxruntime.quantization", static(QuantType.QInt8), bits=8),
}


def ideal_nbytes(module: nn.Module, bits: int, tables: Mapping[str, int]) -> int:
    """Return the smallest possible file size of a net.

    Args:
        module: the net.
        bits: bits per code.
        tables: by palettized weight, the number of float32 values in its table and scales.
    """
    sizes = {name: parameter.numel() for name, parameter in module.named_parameters()}
    codes = sum(-(-sizes.pop(name) * bits // 8) for name in tables)
    return codes + 4 * (sum(tables.values()) + sum(sizes.values()))


def _counted(module: nn.Module, bits: int) -> Palettized:
    """Return a module palettized by coremltools with its size.

    Tables and scales are buffers. A weight whose shape does not fit the groups stays float.
    """
    numbers = {name: value.numel() for name, value in module.state_dict().items()}
    tables = {
        f"{name}.weight": numbers[lut] + numbers.get(f"{name}._COREML_/weight/palettization_scale", 0)
        for name, _ in module.named_modules()
        if (lut := f"{name}._COREML_/weight/lut") in numbers
    }
    return Palettized(module, ideal_nbytes(module, bits, tables))
