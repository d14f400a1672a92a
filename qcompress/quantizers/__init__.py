"""Quantizers for training: for each method a pure function with its paper's gradients, a module and a table row."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Final, Literal, final

from qcompress.artifacts.packing import check_bits
from qcompress.errors import ConfigError, did_you_mean
from qcompress.quantizers.base import AbstractQuantizer, Role, check_role
from qcompress.quantizers.bmpq import Bmpq, bmpq
from qcompress.quantizers.dkm import Dkm, choose_form, dkm
from qcompress.quantizers.dorefa import DoReFa, dorefa_weight
from qcompress.quantizers.ewgs import Ewgs, ewgs
from qcompress.quantizers.lsq import Lsq, lsq
from qcompress.quantizers.lsq_plus import LsqPlus, lsq_plus
from qcompress.quantizers.n2uq import N2uqActivation, N2uqWeight, n2uq_activation, n2uq_weight
from qcompress.quantizers.pact import Pact, pact
from qcompress.quantizers.ternary import Ternary, ternary
from qcompress.quantizers.tqt import Tqt, tqt

__all__ = [
    "QUANTIZERS",
    "AbstractQuantizer",
    "Bmpq",
    "Dkm",
    "DoReFa",
    "Ewgs",
    "Lsq",
    "LsqPlus",
    "Method",
    "N2uqActivation",
    "N2uqWeight",
    "Pact",
    "Ternary",
    "Tqt",
    "Way",
    "bmpq",
    "choose_form",
    "dkm",
    "dorefa_weight",
    "ewgs",
    "lsq",
    "lsq_plus",
    "n2uq_activation",
    "n2uq_weight",
    "pact",
    "ternary",
    "tqt",
    "way",
]


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Way:
    """How a method quantizes weights, or how it quantizes activations.

    Args:
        make: makes the quantizer; takes `bits` and the other arguments of its class by name.
        bits: the supported widths.
        scales: for weights: whether the scale is one per tensor, one per output channel (`make` takes `axis`), or
            either (`axis` and `channels`); "palette": there are palettes in place of scales (`make` takes `axis`,
            `channels`, `rows_per_lut`, `vector_dim` and `lut_dtype`).
        without_negative: for activations: arguments of `make` where no value is negative.
        with_negative: for activations: arguments of `make` where some values are negative; None: it has no codes for
            them.
        fallback: the method that quantizes what this one cannot; None: it quantizes all, or is refused.
    """

    make: Callable[..., AbstractQuantizer]
    bits: range
    scales: Literal["tensor", "channel", "either", "palette"] = "tensor"
    without_negative: Mapping[str, Any] = field(default_factory=dict)
    with_negative: Mapping[str, Any] | None = None
    fallback: str | None = None

    @property
    def widths(self) -> str:
        """The supported widths in words."""
        return f"{self.bits[0]} to {self.bits[-1]} bits" if len(self.bits) > 1 else f"{self.bits[0]} bits"

    def obstacle(self, bits: int, has_negative: bool) -> str | None:
        """Returns why this cannot quantize an activation; None: it can.

        Args:
            bits: width of a code.
            has_negative: whether some values are negative.

        >>> QUANTIZERS["pact"].activation.obstacle(4, has_negative=True)
        'has no codes for negative values'
        """
        if bits not in self.bits:
            return f"quantizes activations at {self.widths}"
        return "has no codes for negative values" if has_negative and self.with_negative is None else None


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Method:
    """What a method can quantize.

    Args:
        weight: how it quantizes weights; None: it cannot.
        activation: how it quantizes activations; None: it cannot.
        bias: the method that quantizes biases of layers whose weights this one quantizes.
    """

    weight: Way | None = None
    activation: Way | None = None
    bias: str = "lsq"


_ALL, _SIGNED = range(1, 9), range(2, 9)

QUANTIZERS: Final[Mapping[str, Method]] = {
    "lsq": Method(
        weight=Way(make=partial(Lsq, role="weight"), bits=_SIGNED, scales="either"),
        activation=Way(make=partial(Lsq, role="activation"), bits=_ALL, with_negative={"signed": True}),
    ),
    "lsq_plus": Method(
        weight=Way(make=partial(LsqPlus, role="weight"), bits=_SIGNED, scales="either"),
        activation=Way(
            make=partial(LsqPlus, role="activation"),
            bits=_ALL,
            without_negative={"configuration": 1},
            with_negative={"configuration": 4},
        ),
    ),
    "pact": Method(activation=Way(make=Pact, bits=_ALL, fallback="lsq_plus")),
    "dorefa": Method(weight=Way(make=DoReFa, bits=_ALL)),
    "ewgs": Method(
        weight=Way(make=partial(Ewgs, role="weight"), bits=_SIGNED, scales="either"),
        activation=Way(make=partial(Ewgs, role="activation"), bits=_ALL, with_negative={"signed": True}),
    ),
    "tqt": Method(
        weight=Way(make=partial(Tqt, role="weight"), bits=_SIGNED, scales="either"),
        activation=Way(make=partial(Tqt, role="activation"), bits=_ALL, with_negative={"signed": True}),
        bias="tqt",
    ),
    "dkm": Method(weight=Way(make=Dkm, bits=_ALL, scales="palette")),
    "ternary": Method(weight=Way(make=Ternary, bits=range(2, 3))),
    "bmpq": Method(weight=Way(make=Bmpq, bits=_SIGNED)),
    "n2uq": Method(
        # Its scale, made for few levels, clips at about twice the mean of |w|: far too early for many.
        weight=Way(make=N2uqWeight, bits=range(1, 5), scales="channel", fallback="lsq"),
        activation=Way(make=N2uqActivation, bits=range(2, 5), fallback="lsq_plus"),
    ),
}

_PLURAL: Final[Mapping[Role, str]] = {"weight": "weights", "activation": "activations"}


def way(method: str, role: Role, bits: int) -> Way:
    """Returns how a method quantizes weights or activations at a width.

    Args:
        method: a key of `QUANTIZERS`.
        role: "weight" or "activation".
        bits: width of a code, 1 to 8.

    Raises:
        ConfigError: the method is unknown, or does not support the role or the width.

    >>> way("lsq", "weight", 2).make(bits=2).bits
    2
    """
    check_bits(bits)
    found = supported(method, role)
    if bits not in found.bits:
        there = [name for name, other in _ways(role).items() if bits in other.bits]
        raise ConfigError(
            f"{method} quantizes {_PLURAL[role]} at {found.widths}, got {bits}; {_listed(there)} work there."
        )
    return found


def supported(method: str, role: Role) -> Way:
    """Returns how a method quantizes weights or activations, at whichever width.

    Args:
        method: a key of `QUANTIZERS`.
        role: "weight" or "activation".

    Raises:
        ConfigError: the method is unknown, or does not support the role.
    """
    check_role("way", role)
    if method not in QUANTIZERS:
        known = ", ".join(QUANTIZERS)
        raise ConfigError(f"Unknown method {method!r}; known: {known}.{did_you_mean(method, QUANTIZERS)}")
    ways = _ways(role)
    if method not in ways:
        raise ConfigError(f"{method} does not quantize {_PLURAL[role]}; {_listed(ways)} do.")
    return ways[method]


def _ways(role: Role) -> dict[str, Way]:
    return {name: found for name, method in QUANTIZERS.items() if (found := getattr(method, role)) is not None}


def _listed(names: Iterable[str]) -> str:
    *most, last = names
    return f"{', '.join(most)} and {last}" if most else last
