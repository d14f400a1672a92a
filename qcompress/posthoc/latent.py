"""Artifacts as gradients see them: latent values behind codes, with levels, scales and biases that move.

Each class starts from an artifact, computes its weight so that gradients reach what it tunes, and returns the artifact
that the tuned values make. A weight is the level nearest to its latent value and passes its gradient straight on to it.

Shape suffixes: O = output channels, K = weights of one output channel, T = tables, L = levels.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Final, Protocol, final

import numpy as np
import torch

from qcompress.artifacts import Artifact, FloatWeight, IntegerWeight, PalettizedWeight, granularity
from qcompress.graph.conversion import to_numpy, to_torch
from qcompress.palettes.int8_palette import LARGEST

_LEAST: Final = 1e-12  # of what is divided by


class Latent(Protocol):
    """An artifact that is being tuned."""

    def latents(self) -> Sequence[torch.Tensor]:
        """Return the latent values, in steps between levels."""

    def others(self) -> Sequence[torch.Tensor]:
        """Return what else is tuned, as changes in parts of its size."""

    def value(self) -> torch.Tensor:
        """Return the dequantized weight; gradients reach all that is tuned."""

    def artifact(self) -> Artifact:
        """Return the artifact of the values as they are now."""


def latent_of(artifact: Artifact, value: torch.Tensor, device: str) -> Latent | None:
    """Return an artifact to be tuned; None if nothing of it can be: palettes of vectors, grids with zero points.

    Args:
        artifact: of one tensor.
        value: the tensor in the float program; of those that stay in float, only vectors of parameters are tuned.
        device: where it is computed.
    """
    make = _LATENTS.get(artifact.kind)
    return None if make is None else make(artifact, value, device)


@final
class _Vector:
    """A vector of floats, a bias for one."""

    def __init__(self, artifact: FloatWeight, device: str) -> None:
        self._made = artifact
        self._start = to_torch(artifact.values).to(device)
        self._moved = torch.zeros_like(self._start).requires_grad_()
        self._size = self._start.abs().mean().clamp_min(1e-3)

    def latents(self) -> list[torch.Tensor]:
        return []

    def others(self) -> list[torch.Tensor]:
        return [self._moved]

    def value(self) -> torch.Tensor:
        return self._start + self._size * self._moved

    def artifact(self) -> Artifact:
        return replace(self._made, values=to_numpy(self.value()))


@final
class _Codes:
    """The codes of a weight as latent values.

    Args:
        codes_OK: what they start from.
        lut_TL: the levels that the codes start from, ascending.
        tables_O: the table of levels of each output channel.
    """

    def __init__(self, codes_OK: torch.Tensor, lut_TL: torch.Tensor, tables_O: torch.Tensor) -> None:
        self._tables_O = tables_O
        gaps = lut_TL.diff(dim=1)
        size = lut_TL.abs().mean().clamp_min(_LEAST)
        self._gap = gaps[gaps > 0].mean() if bool((gaps > 0).any()) else size
        self.latent_OK = (lut_TL[tables_O[:, None], codes_OK] / self._gap).requires_grad_()

    def nearest(self, lut_TL: torch.Tensor) -> torch.Tensor:
        """Return the codes of the levels nearest to the latent values."""
        levels_OL = lut_TL.detach()[self._tables_O]
        middles = ((levels_OL[:, 1:] + levels_OL[:, :-1]) / 2).contiguous()
        return torch.searchsorted(middles, (self.latent_OK.detach() * self._gap).contiguous())

    def values(self, lut_TL: torch.Tensor) -> torch.Tensor:
        """Return those levels, [O, K]; gradients pass straight on to the latent values, and to the levels."""
        hard_OK, soft_OK = lut_TL[self._tables_O[:, None], self.nearest(lut_TL)], self.latent_OK * self._gap
        return hard_OK + (soft_OK - soft_OK.detach())


@final
class _Palette:
    """Codes into tables of levels, which move; a scale, if there is one, moves too."""

    def __init__(self, artifact: PalettizedWeight, device: str) -> None:
        self._made, self._axis = artifact, artifact.axis or 0
        tables = granularity.group_of_row(artifact.shape[self._axis], artifact.rows_per_lut)
        self._lut_TL = to_torch(np.array(artifact.lut, np.float32)).to(device)
        self._size = self._lut_TL.abs().mean().clamp_min(_LEAST)
        self._moved = torch.zeros_like(self._lut_TL).requires_grad_()
        self._codes = _Codes(
            to_torch(granularity.rows(artifact.codes, self._axis).astype(np.int64)).to(device),
            self._lut_TL,
            to_torch(tables).to(device),
        )
        scale: Any = 1.0 if artifact.scale is None else artifact.scale
        self._scale = to_torch(np.atleast_1d(np.array(scale, np.float32))[:, None]).to(device)
        self._grown = torch.zeros_like(self._scale).requires_grad_(artifact.scale is not None)

    def latents(self) -> list[torch.Tensor]:
        return [self._codes.latent_OK]

    def others(self) -> list[torch.Tensor]:
        return [self._moved] if self._made.scale is None else [self._moved, self._grown]

    def value(self) -> torch.Tensor:
        values_OK = self._codes.values(self._levels()) * (self._scale * (1 + self._grown))
        return granularity.from_rows(values_OK, self._made.shape, self._axis)

    def artifact(self) -> Artifact:
        lut_TL = self._levels().detach()
        lut: Any = to_numpy(self._stored(lut_TL)).astype(self._made.lut.dtype)
        scale = self._made.scale
        if scale is not None:
            scale = to_numpy(self._scale * (1 + self._grown)).reshape(scale.shape)
        codes: Any = _from_rows(self._codes.nearest(lut_TL), self._made.shape, self._axis).astype(np.uint8)
        return replace(self._made, codes=codes, lut=lut, scale=scale)

    def _levels(self) -> torch.Tensor:
        lut_TL = (self._lut_TL + self._size * self._moved).sort(dim=1).values
        return lut_TL + (self._stored(lut_TL) - lut_TL).detach()

    def _stored(self, lut_TL: torch.Tensor) -> torch.Tensor:
        """Return the levels rounded to the type that the table is stored in."""
        if self._made.lut.dtype == np.float32:
            return lut_TL
        return lut_TL.half().float() if self._made.lut.dtype == np.float16 else lut_TL.round().clamp(-LARGEST, LARGEST)


@final
class _EvenGrid:
    """Codes on an even grid without a zero point: its levels are integers and stay, its scales move."""

    def __init__(self, artifact: IntegerWeight, device: str) -> None:
        self._made, self._axis, self._low = artifact, artifact.axis or 0, -(1 << (artifact.bits - 1))
        scale: Any = np.atleast_1d(artifact.scale)
        if artifact.block_size is None:
            scale = scale[:, None]
        else:
            assert artifact.axis is not None
            self._axis = granularity.input_axis(len(artifact.shape), artifact.axis)  # blocks lie along the other axis
            scale = granularity.rows(scale, self._axis)
        codes_OK = granularity.rows(artifact.codes, self._axis).astype(np.int64) - self._low
        self._lut_TL = torch.arange(self._low, -self._low, dtype=torch.float32, device=device)[None]
        tables_O = torch.zeros(len(codes_OK), dtype=torch.int64, device=device)
        self._codes = _Codes(to_torch(codes_OK).to(device), self._lut_TL, tables_O)
        self._scale = to_torch(np.array(scale, np.float32)).to(device)
        self._grown = torch.zeros_like(self._scale).requires_grad_()

    def latents(self) -> list[torch.Tensor]:
        return [self._codes.latent_OK]

    def others(self) -> list[torch.Tensor]:
        return [self._grown]

    def value(self) -> torch.Tensor:
        values_OK, scale = self._codes.values(self._lut_TL), self._scale * (1 + self._grown)
        if self._made.block_size:
            count = values_OK.shape[1]
            scale = scale.repeat_interleave(min(self._made.block_size, count), dim=1)[:, :count]
        return granularity.from_rows(values_OK * scale, self._made.shape, self._axis)

    def artifact(self) -> Artifact:
        codes: Any = _from_rows(self._codes.nearest(self._lut_TL), self._made.shape, self._axis) + self._low
        grown, shape = self._scale * (1 + self._grown), self._made.scale.shape
        scale = _from_rows(grown, shape, self._axis) if self._made.block_size else to_numpy(grown)
        return replace(self._made, codes=codes.astype(np.int8), scale=scale.reshape(shape))


def _from_rows(values_OK: torch.Tensor, shape: tuple[int, ...], axis: int) -> Any:
    """Return rows as an array of a shape, in memory of its own."""
    return np.array(granularity.from_rows(to_numpy(values_OK), shape, axis), order="C")


def _vector(artifact: FloatWeight, value: torch.Tensor, device: str) -> Latent | None:
    is_vector = value.ndim == 1 and value.dtype == torch.float32 and isinstance(value, torch.nn.Parameter)
    return _Vector(artifact, device) if is_vector and artifact.values.dtype == np.float32 else None


def _palette(artifact: PalettizedWeight, value: torch.Tensor, device: str) -> Latent | None:
    is_plain = artifact.vector_dim == 1 and artifact.lut.shape[1] > 1
    return _Palette(artifact, device) if is_plain and artifact.shape else None


def _even_grid(artifact: IntegerWeight, value: torch.Tensor, device: str) -> Latent | None:
    is_plain = artifact.zero_point is None and artifact.codes.dtype == np.int8
    is_plain &= artifact.block_size is None or len(artifact.shape) == 2
    return _EvenGrid(artifact, device) if is_plain and artifact.shape else None


# What tunes each kind of artifact.
_LATENTS: Final[Mapping[str, Callable[[Any, torch.Tensor, str], Latent | None]]] = {
    FloatWeight.kind: _vector,
    PalettizedWeight.kind: _palette,
    IntegerWeight.kind: _even_grid,
}
