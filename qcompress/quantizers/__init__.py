"""Quantizers for training: pure functions with the papers' gradients, a module each, and the table of them."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Final, Literal, final

from qcompress.artifacts.packing import check_bits
from qcompress.errors import ConfigError, did_you_mean
from qcompress.quantizers.base import AbstractQuantizer, Role, check_role
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
@dataclass(frozen=True, slots=True)
class Way:
    """How a method quantizes weights, or activations.

    Args:
        make: the quantizer; takes `bits` and what else its class takes, by name.
        bits: the legal widths.
        scales: of a weight: whether there is one for a tensor, one for a channel (`axis` alone), or either (`axis` and
            `channels`).
        for_sign: of an activation: what else `make` takes, by whether there are negative values; None: it has no codes
            for these.
    """

    make: Callable[..., AbstractQuantizer]
    bits: range
    scales: Literal["tensor", "channel", "either"] = "tensor"
    for_sign: Callable[[bool], Mapping[str, Any]] | None = None


@final
@dataclass(frozen=True, slots=True)
class Method:
    """What a method does.

    Args:
        weight: with weights; None: nothing.
        activation: with activations; None: nothing.
    """

    weight: Way | None
    activation: Way | None


_ALL, _SIGNED = range(1, 9), range(2, 9)


def _signed(has_negative: bool) -> Mapping[str, Any]:
    return {"signed": has_negative}


def _configuration(has_negative: bool) -> Mapping[str, Any]:
    return {"configuration": 4 if has_negative else 1}


QUANTIZERS: Final[Mapping[str, Method]] = {
    "lsq": Method(
        weight=Way(partial(Lsq, role="weight"), _SIGNED, "either"),
        activation=Way(partial(Lsq, role="activation"), _ALL, for_sign=_signed),
    ),
    "lsq_plus": Method(
        weight=Way(partial(LsqPlus, role="weight"), _SIGNED, "either"),
        activation=Way(partial(LsqPlus, role="activation"), _ALL, for_sign=_configuration),
    ),
    "pact": Method(weight=None, activation=Way(Pact, _ALL)),
    "dorefa": Method(weight=Way(DoReFa, _ALL), activation=None),
    "ewgs": Method(
        weight=Way(partial(Ewgs, role="weight"), _SIGNED, "either"),
        activation=Way(partial(Ewgs, role="activation"), _ALL, for_sign=_signed),
    ),
    "tqt": Method(
        weight=Way(partial(Tqt, role="weight"), _SIGNED, "either"),
        activation=Way(partial(Tqt, role="activation"), _ALL, for_sign=_signed),
    ),
    "ternary": Method(weight=Way(Ternary, range(2, 3)), activation=None),
    "n2uq": Method(weight=Way(N2uqWeight, _ALL, "channel"), activation=Way(N2uqActivation, range(2, 5))),
}


def way(method: str, role: Role, bits: int) -> Way:
    """How a method quantizes weights or activations at a width.

    Args:
        method: a key of `QUANTIZERS`.
        role: what is quantized.
        bits: width of a code, 1 to 8.

    Raises:
        ConfigError: there is no such method, it is not for that, or not at that width.

    >>> way("lsq", "weight", 2).make(bits=2).bits
    2
    """
    check_role("way", role)
    check_bits(bits)
    if method not in QUANTIZERS:
        known = ", ".join(QUANTIZERS)
        raise ConfigError(f"Unknown method {method!r}; known: {known}.{did_you_mean(method, QUANTIZERS)}")
    ways: dict[str, Way] = {name: found for name, m in QUANTIZERS.items() if (found := getattr(m, role)) is not None}
    if method not in ways:
        raise ConfigError(f"{method} does not quantize {_PLURAL[role]}; {_listed(ways)} do.")
    if bits not in ways[method].bits:
        there = [name for name, found in ways.items() if bits in found.bits]
        widths = ways[method].bits
        legal = f"{widths[0]} to {widths[-1]} bits" if len(widths) > 1 else f"{widths[0]} bits"
        raise ConfigError(f"{method} quantizes {_PLURAL[role]} at {legal}, got {bits}; {_listed(there)} work there.")
    return ways[method]


_PLURAL: Final[Mapping[Role, str]] = {"weight": "weights", "activation": "activations"}


def _listed(names: Iterable[str]) -> str:
    *most, last = names
    return f"{', '.join(most)} and {last}" if most else last
