"""One small model with weights as after training, and its files, made once per run because tracing takes seconds."""

import functools
import io

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from qcompress.compressed.model import CompressedModel
from qcompress.graph.options import ProgramOptions
from qcompress.graph.program import FloatProgram
from qcompress.graph.tracing import from_exported
from qcompress.plan.plan import Plan
from qcompress.plan.settings import Settings
from qcompress.posthoc.compress import compress_program
from qcompress.posthoc.settings import PosthocSettings
from qcompress_exporters import build
from qcompress_exporters.onnx_format.trace import Trace, trace
from qcompress_exporters.report import Built
from tests.helpers import quick_torch
from tests.helpers.nets import randomized

quick_torch.look_up_once()

LAYERS = ("stem", "left", "right", "head")


class Net(nn.Module):
    """A stem, two convolutions of the same shape, BatchNorm and a linear head."""

    def __init__(self, classes: int = 5) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, bias=False)
        self.bn = nn.BatchNorm2d(8)
        self.left = nn.Conv2d(8, 8, 3)
        self.right = nn.Conv2d(8, 8, 3)
        self.head = nn.Linear(8, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.bn(self.stem(x)).relu()
        return self.head((self.left(x).relu() + self.right(x)).mean((2, 3)))


def net(seed: int = 0) -> nn.Module:
    """Return the net of a seed in eval mode."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return randomized(Net(), seed)


def images(samples: int = 60, seed: int = 0) -> npt.NDArray[np.float32]:
    """Return inputs of `Net`."""
    return np.random.default_rng(seed).standard_normal((samples, 3, 8, 8)).astype(np.float32)


@functools.cache
def exported(seed: int = 0) -> torch.export.ExportedProgram:
    """Export `net(seed)` with a dynamic batch size."""
    batch = ({0: torch.export.Dim("batch")},)
    return torch.export.export(net(seed), (torch.from_numpy(images(2)),), dynamic_shapes=batch)


@functools.cache
def pt2(seed: int = 0) -> bytes:
    """Return the exported `net(seed)` as the bytes of a .pt2 file."""
    buffer = io.BytesIO()
    torch.export.save(exported(seed), buffer)
    return buffer.getvalue()


@functools.cache
def npz() -> bytes:
    """Return an .npz file with images `x` and labels `y`, most of which are predictions of `net()`."""
    x = images()
    with torch.no_grad():
        y = net()(torch.from_numpy(x)).numpy().argmax(1)
    y[::7] = 0
    buffer = io.BytesIO()
    np.savez(buffer, x=x, y=y)
    return buffer.getvalue()


@functools.cache
def program(seed: int = 0) -> FloatProgram:
    """Return `net(seed)` as a float program."""
    return from_exported(exported(seed), ProgramOptions())


@functools.cache
def compressed(seed: int = 0) -> CompressedModel:
    """Compress `net(seed)` to 4 bits with one palette; `left` and `right` to 2 bits with four palettes each."""
    plan = Plan(default=Settings(bits=4), name={"[lr]*t.weight": Settings(bits=2, rows_per_lut=2)})
    return compress_program(program(seed), plan, PosthocSettings(effort="fast"), source_digest="0123456789a")


@functools.cache
def built(seed: int = 0) -> Built:
    """Return the ONNX file of `compressed(seed)`, in memory."""
    return build(compressed(seed))


def trace_once(program: FloatProgram) -> Trace:
    """Return a cached `trace`; it does not depend on the values of weights, so the graph and the shapes are the key."""
    shapes = {name: tuple(value.shape) for name, value in program.state().items()}
    key = repr((str(program.exported.graph), shapes, program.input_names, program.output_names, program.dynamic))
    if key not in _TRACES:
        _TRACES[key] = trace(program)
    return _TRACES[key]


_TRACES: dict[str, Trace] = {}
