"""Compression without training by other tools, set up as their documentation says.

All get the net with BatchNorm folded, which is to their advantage: coremltools' palettes of 4 bits keep ResNet-20 at
85.2 % after folding, at 84.0 % before.
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
    """What a tool compresses.

    Args:
        file: the float file.
        module: the same net; changed by nobody.
        calibration: unlabelled inputs.
    """

    file: bytes
    module: nn.Module
    calibration: Dataset


@dataclass(frozen=True)
class Palettized:
    """A net with palettes in torch alone.

    Args:
        module: the net.
        nbytes: what a file would hold at least: packed codes, float32 tables and scales, all else in float32.
    """

    module: nn.Module
    nbytes: int


@dataclass(frozen=True)
class Peer:
    """A tool.

    Args:
        needs: the module that it is in.
        make: from a net and the bits of its weights to a file, or to what there is in place of one.
        bits: the only width that it has; None: 1 to 8.
    """

    needs: str
    make: Callable[[Subject, int], bytes | Palettized]
    bits: int | None = None

    @property
    def is_installed(self) -> bool:
        """Whether it can be imported."""
        return importlib.util.find_spec(self.needs.partition(".")[0]) is not None


def folded_module(module: nn.Module, folded: FloatProgram) -> nn.Module:
    """An author's module with the weights and biases of the folded program, and nothing in place of BatchNorm."""
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
    """coremltools' PostTrainingPalettizer: k-means on each weight."""

    def make(subject: Subject, bits: int) -> Palettized:
        from coremltools.optimize.torch.palettization import PostTrainingPalettizer, PostTrainingPalettizerConfig

        config = PostTrainingPalettizerConfig.from_dict({"global_config": {"n_bits": bits, **options}})
        return _counted(PostTrainingPalettizer(subject.module, config).compress(), bits)

    return make


def sensitive(**options: Any) -> Callable[[Subject, int], Palettized]:
    """coremltools' SKMPalettizer: k-means weighted by squared gradients of the loss against the net's own answers."""

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
    """scikit-learn's KMeans with one start on each weight."""
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
    """onnxruntime's quantize_static, MinMax, uint8 activations."""

    def make(subject: Subject, bits: int) -> bytes:
        return _baselines.static(subject.file, subject.calibration, "MinMax", batch=32, weight_type=weight_type)

    return make


# MatMulNBitsQuantizer has no row: it only touches MatMul, and no net here has one.
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
    """Bytes of a net.

    Args:
        module: the net.
        bits: of a code.
        tables: how many float32 values the table and scales of each weight on a palette take.
    """
    sizes = {name: parameter.numel() for name, parameter in module.named_parameters()}
    codes = sum(-(-sizes.pop(name) * bits // 8) for name in tables)
    return codes + 4 * (sum(tables.values()) + sum(sizes.values()))


def _counted(module: nn.Module, bits: int) -> Palettized:
    """What coremltools made: tables and scales are buffers, a weight that its groups do not fit stays float."""
    numbers = {name: value.numel() for name, value in module.state_dict().items()}
    tables = {
        f"{name}.weight": numbers[lut] + numbers.get(f"{name}._COREML_/weight/palettization_scale", 0)
        for name, _ in module.named_modules()
        if (lut := f"{name}._COREML_/weight/lut") in numbers
    }
    return Palettized(module, ideal_nbytes(module, bits, tables))
