"""The interface of a quantizer: a function with parameters for training, and the artifact that is stored afterwards."""

import abc
import math
from collections.abc import Hashable, Sequence
from typing import Final, Literal, Self, get_args

import torch
from torch import Tensor, nn

from qcompress.artifacts import Artifact, SiteGrid
from qcompress.artifacts.integer_range import IntegerRange
from qcompress.errors import ConfigError
from qcompress.quantizers.positive import LearnedValues
from qcompress.quantizers.rows import Rows, alike

Role = Literal["weight", "activation"]

# The key of an activation site, as `ActivationGrid.site`: a qualified name and an argument index.
SiteKey = tuple[str, int]

_MOST: Final = 1 << 18


class AbstractQuantizer(nn.Module, abc.ABC):
    """A fake quantizer: a parametrization of a weight, or a module that an activation passes through.

    Parameters exist from construction; `initialise` sets their values.
    """

    bits: int
    _rows: Rows | None = None

    @abc.abstractmethod
    def forward(self, x: Tensor) -> Tensor:
        """Returns the fake-quantized tensor, in the shape of x, which is not modified."""

    @abc.abstractmethod
    def initialise(self, values: Tensor | Sequence[Tensor]) -> None:
        """Sets the parameters.

        Args:
            values: the weight, or a few batches of the activation.
        """

    @classmethod
    def together(cls, quantizers: Sequence[Self], weights: Sequence[Tensor]) -> list[Tensor]:
        """Returns the quantized weights of several quantizers of this class, computed together where that is faster.

        Args:
            quantizers: one for each weight.
            weights: the weights.
        """
        found: dict[int, Tensor] = {}
        for group in alike([quantizer.shared() for quantizer in quantizers], weights):
            own, given = [quantizers[i] for i in group], [weights[i] for i in group]
            if len(group) == 1:
                found[group[0]] = own[0](given[0])
                continue
            axes = [quantizer.row_axis for quantizer in own]
            rows = own[0]._rows_of(given, axes)
            out_N = cls.quantize_rows(own, rows.flat(given, axes), rows)
            found.update(zip(group, rows.parts(out_N, given, axes), strict=True))
        return [found[i] for i in range(len(weights))]

    def shared(self) -> Hashable:
        """Returns what quantizers of weights have in common if `quantize_rows` can take them together; None: nothing.

        It is called in each step of training.
        """
        return None

    @property
    def row_axis(self) -> int | None:
        """The weight's axis that counts rows, each of which has its own scale; None: the weight is one row."""
        return None

    @classmethod
    def quantize_rows(cls, quantizers: Sequence[Self], x_N: Tensor, rows: Rows) -> Tensor:
        """Returns the quantized elements of several weights, [N].

        Args:
            quantizers: at least two, for which `shared` is equal and not None.
            x_N: their weights.
            rows: how the weights lie in x_N.
        """
        raise TypeError(f"{cls.__name__}.shared must return None, because the class has no quantize_rows.")

    def _rows_of(self, weights: Sequence[Tensor], axes: Sequence[int | None]) -> Rows:
        """Returns the rows of weights, the first of which is this quantizer's; they are kept for the next step."""
        counts = [1 if axis is None else w.shape[axis] for w, axis in zip(weights, axes, strict=True)]
        shapes = tuple((count, w.numel() // count) for w, count in zip(weights, counts, strict=True))
        if self._rows is None or self._rows.shapes != shapes or self._rows.device != weights[0].device:
            self._rows = Rows(shapes, weights[0].device)
        return self._rows

    def advance(self, done: float) -> None:
        """Prepares the next step of training; does nothing unless the quantizer has a schedule.

        Args:
            done: share of all steps that are done, in [0, 1].
        """

    def penalty(self) -> Tensor | None:
        """Returns a term that this quantizer adds to the task loss, 0-d; None: it adds nothing."""
        return None

    def drop(self, weight: Tensor) -> float:
        """Returns by how much the stored weight differs from the one of the last step, relative to its size.

        Args:
            weight: the weight, on the parameters' device.
        """
        return 0.0

    def remark(self, artifact: Artifact) -> str | None:
        """Returns what the user should know about the stored weight; None: nothing.

        Args:
            artifact: result of `weight_artifact`.
        """
        return None

    def weight_artifact(self, weight: Tensor) -> Artifact:
        """Returns the stored form of a weight: `dequantize()` equals `forward(weight)` in float32, bit for bit.

        Args:
            weight: float32, on the parameters' device.

        Raises:
            ConfigError: this quantizer is for activations.
        """
        raise ConfigError(f"{type(self).__name__} quantizes an activation here and has no weight artifact.")

    def activation_grid(self, site: SiteKey) -> SiteGrid:
        """Returns the stored form of an activation's grid.

        `dequantize(quantize(x))` equals `forward(x)` in float32, bit for bit.

        Args:
            site: as in `ActivationGrid`.

        Raises:
            ConfigError: this quantizer is for weights.
        """
        raise ConfigError(f"{type(self).__name__} quantizes a weight here and has no activation grid.")

    def weight_scale(self, weight: Tensor) -> Tensor:
        """Returns the scale of `weight_artifact(weight).integers()`, float32, 0-d or [O], on the weight's device.

        Args:
            weight: one whose artifact has integers.
        """
        integers = self.weight_artifact(weight.detach().float()).integers()
        assert integers is not None
        return torch.from_numpy(integers.scale).to(weight.device)

    def activation_scale(self) -> Tensor:
        """Returns the scale of `activation_grid`, float32, 0-d, on the parameters' device."""
        device = next((p.device for p in self.parameters()), None)
        return torch.tensor(float(self.activation_grid(("", 0)).scale), device=device)

    def snap_offset(self) -> None:
        """Keeps the offset, if there is one, at a multiple of the scale from now on, so that a zero point can store it.

        Quantizers without an offset do nothing.
        """

    def step_size(self, weight: Tensor) -> Tensor | None:
        """Returns the learned scale in a shape that broadcasts against a weight; None: codes are not multiples of one.

        Args:
            weight: the weight, of which only the shape is used.
        """
        return None

    def is_collapsed(self) -> Tensor | None:
        """Returns whether most values of a parameter that must stay positive have reached their floor, bool, 0-d.

        None: there is no such parameter. The result stays on the device.
        """
        found = [module.is_collapsed() for module in self.modules() if isinstance(module, LearnedValues)]
        return torch.stack(found).any() if found else None

    @property
    def collapsed(self) -> bool:
        """Whether `is_collapsed` is true; reads it from the device."""
        found = self.is_collapsed()
        return found is not None and bool(found)


def uniform_range(who: str, bits: int, signed: bool) -> IntegerRange:
    """Returns the codes of a uniform grid.

    Args:
        who: the caller's name, for the message.
        bits: width of a code, 1 to 8.
        signed: whether there are negative codes.

    Raises:
        ConfigError: the grid would have no positive code.

    >>> uniform_range("Lsq", 2, signed=True).p
    1
    """
    limits = IntegerRange(bits, signed)
    if limits.p == 0:
        raise ConfigError(
            f"{who}: a signed grid of 1 bit has no positive code; use 2 to 8 bits, or dorefa, dkm or n2uq for weights."
        )
    return limits


def check_role(who: str, role: str) -> None:
    """Checks a role.

    Args:
        who: the caller's name, for the message.
        role: "weight" or "activation".

    Raises:
        ConfigError: the role is unknown.
    """
    if role not in get_args(Role):
        raise ConfigError(f"{who}.role must be 'weight' or 'activation', got {role!r}.")


def check_init(who: str, init: str, known: Sequence[str]) -> None:
    """Checks the name of an initialisation.

    Args:
        who: the caller's name, for the message.
        init: the name.
        known: the valid names.

    Raises:
        ConfigError: the name is unknown.
    """
    if init not in known:
        raise ConfigError(f"{who}.init must be one of {', '.join(known)}, got {init!r}.")


def gradient_factor(elements: int, p: int) -> float:
    """Returns LSQ's g = 1 / sqrt(N·p), by which the gradient of a scale is multiplied.

    Args:
        elements: N, the number of weights that share the scale, or of features in one sample.
        p: the largest code.

    >>> gradient_factor(8, 2)
    0.25
    """
    return 1 / math.sqrt(max(1, elements) * p)


def elements_per_scale(x: Tensor, role: Role, scales: int) -> int:
    """Returns N of LSQ's g: the number of weights that share a scale, or of features in one sample.

    Args:
        x: a weight, or an activation whose first axis is the batch.
        role: which of the two it is.
        scales: how many scales the weight has.

    >>> elements_per_scale(torch.zeros(4, 3, 2), "weight", 4), elements_per_scale(torch.zeros(4, 3, 2), "activation", 1)
    (6, 6)
    """
    return x.numel() // (scales if role == "weight" else max(1, len(x) if x.ndim else 1))


def one_tensor(values: Tensor | Sequence[Tensor]) -> Tensor:
    """Returns the values to initialise from, detached: a tensor as it is, batches as one flat tensor.

    Batches are thinned evenly to about a quarter of a million values in total.

    Args:
        values: a weight, or batches of an activation.

    Raises:
        ConfigError: there are no values.

    >>> one_tensor([torch.ones(2, 2), torch.zeros(1)]).tolist()
    [1.0, 1.0, 1.0, 1.0, 0.0]
    """
    if isinstance(values, Tensor):
        found = values.detach()
    else:
        step = max(1, sum(v.numel() for v in values) // _MOST)
        found = torch.cat([v.detach().reshape(-1)[::step] for v in values]) if len(values) else torch.empty(0)
    if not found.numel():
        raise ConfigError("A quantizer needs at least one value to be initialised from, got an empty tensor or list.")
    return found
