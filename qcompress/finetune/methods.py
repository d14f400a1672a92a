"""The choice of quantizers for a model in training."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any, Final, final

from qcompress.errors import ConfigError, did_you_mean
from qcompress.plan.combinations import set_to
from qcompress.plan.resolve import TensorPlan
from qcompress.quantizers import QUANTIZERS, AbstractQuantizer, Way, supported, way

_NAMED: Final = 3  # sites that a note names when there are many
# Scales that `per_channel` does not change.
_OF_CHANNELS: Final[Mapping[str, str]] = {"channel": "a scale for each output channel", "palette": "palettes"}


@final
@dataclass(frozen=True, slots=True)
class ObservedSite:
    """An activation site and what was observed there.

    Args:
        name: of the site.
        bits: width of its codes.
        has_negative: whether some values were negative.
    """

    name: str
    bits: int
    has_negative: bool


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Methods:
    """The methods that quantize weights and activations.

    Args:
        weights: a key of `quantizers.QUANTIZERS`.
        activations: the same. Sites that the method cannot quantize, because they have negative values or another
            width (operands of sums have 8 bits), are quantized by the fallback that its row in the table names; the
            notes of the model list them.
        weight_options: further arguments of the weights' quantizer, such as {"init": "min_max"}.
        activation_options: the same for activations; the fallback does not take them.
        site_options: further `activation_options` for some sites, by pattern of the site's name, such as
            {"layer1.*": {"configuration": 4}}; a later pattern outdoes an earlier one. A site is named after the value
            in the graph, or after the weight whose layer takes it: `Prepared.quantizers` lists the names.
        per_channel: whether each output channel has its own scale, if the method supports both.
        bias_bits: width of the biases of quantized layers, on a grid with one learned scale; None: biases stay in
            float. Layers followed by a BatchNorm usually have a bias only after it is folded.
    """

    weights: str = "lsq"
    activations: str = "lsq_plus"
    weight_options: Mapping[str, Any] = field(default_factory=dict)
    activation_options: Mapping[str, Any] = field(default_factory=dict)
    site_options: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    per_channel: bool = True
    bias_bits: int | None = None

    def weight(self, tensor: TensorPlan, axis: int, channels: int) -> AbstractQuantizer:
        """Returns the quantizer of a weight.

        Args:
            tensor: its plan.
            axis: its axis that counts output channels.
            channels: their number.

        Raises:
            ConfigError: the method does not support a field of the plan.
        """
        found, options = supported(self.weights, "weight"), self.weight_options
        if tensor.bits not in found.bits:
            found, options = way(found.fallback or self.weights, "weight", tensor.bits), {}
        self._check_supports(found, tensor)
        axes: dict[str, Any] = {}
        if found.scales == "channel":
            axes = {"axis": axis}
        elif found.scales == "palette" or (found.scales == "either" and self.per_channel):
            axes = {"axis": axis, "channels": channels}
        if found.scales == "palette":
            integers = tensor.activation_bits is not None and tensor.vector_dim == 1
            lut_dtype = tensor.lut_dtype or ("int8" if integers else "float32")
            axes |= {"rows_per_lut": tensor.rows_per_lut, "vector_dim": tensor.vector_dim, "lut_dtype": lut_dtype}
        return found.make(bits=tensor.bits, **axes, **options)

    def _check_supports(self, found: Way, tensor: TensorPlan) -> None:
        assert tensor.settings is not None
        for row in tensor.settings.fields:
            trains = row.trains is True or (row.trains == "palette" and found.scales == "palette")
            if trains or not row.asks(getattr(tensor.settings, row.name)):
                continue
            does = [n for n, m in QUANTIZERS.items() if m.weight is not None and m.weight.scales == row.trains]
            where = f"post-hoc compression and the method {', '.join(does)}" if does else "post-hoc compression"
            raise ConfigError(
                f"{tensor.name}: {set_to(row, tensor.settings, tensor.origins)} is supported by {where} only; remove "
                "it from plans passed to prepare()."
            )

    def bias(self) -> AbstractQuantizer:
        """Returns the quantizer of a layer's bias."""
        assert self.bias_bits is not None
        return way(QUANTIZERS[self.weights].bias, "weight", self.bias_bits).make(bits=self.bias_bits)

    def activation(self, site: ObservedSite) -> AbstractQuantizer:
        """Returns the quantizer of a site."""
        found = supported(self.activations, "activation")
        options = {**self.activation_options, **self._options_at(site.name)}
        if found.fallback is not None and found.obstacle(site.bits, site.has_negative) is not None:
            found, options = way(found.fallback, "activation", site.bits), {}
        by_sign = found.with_negative if site.has_negative else found.without_negative
        return found.make(bits=site.bits, **{**(by_sign or {}), **options})

    def check_sites(self, names: Sequence[str]) -> None:
        """Checks that each pattern of `site_options` matches a site.

        Args:
            names: the names of all sites.

        Raises:
            ConfigError: a pattern matches no site.
        """
        for pattern in self.site_options:
            if not any(fnmatchcase(name, pattern) for name in names):
                near = did_you_mean(pattern, names) or (f" Legal names are {_listed([*names])}." if names else "")
                raise ConfigError(f"Methods.site_options: {pattern!r} matches no activation that is quantized.{near}")

    def _options_at(self, name: str) -> dict[str, Any]:
        """Returns the site options of a site."""
        matching = (options for pattern, options in self.site_options.items() if fnmatchcase(name, pattern))
        return {key: value for options in matching for key, value in options.items()}

    def notes(self, sites: Iterable[ObservedSite]) -> tuple[str, ...]:
        """Returns what the user should know: sites that the fallback quantizes, settings that have no effect.

        Args:
            sites: all activations that are quantized.

        >>> Methods(activations="pact").notes([ObservedSite("x", 4, True), ObservedSite("relu", 4, False)])
        ('lsq_plus quantizes the activations at x, because pact has no codes for negative values.',)
        """
        found, observed = supported(self.activations, "activation"), list(sites)
        scales = supported(self.weights, "weight").scales
        ignored = []
        if not self.per_channel and scales in _OF_CHANNELS:
            ignored.append(f"per_channel = False had no effect: {self.weights} has {_OF_CHANNELS[scales]}.")
        if self.activation_options and not observed:
            given = ", ".join(self.activation_options)
            ignored.append(f"activation_options ({given}) had no effect: no activation is quantized.")
        replaced: dict[str, list[str]] = {}
        for site in observed:
            if (obstacle := found.obstacle(site.bits, site.has_negative)) is not None:
                replaced.setdefault(obstacle, []).append(site.name)
        return *ignored, *(
            f"{found.fallback} quantizes the activations at {_listed(names)}, because {self.activations} {obstacle}"
            f"{self._unused_at(names)}."
            for obstacle, names in replaced.items()
        )

    def weight_notes(self, bits: Mapping[str, int]) -> tuple[str, ...]:
        """Returns what the user should know about weights that the fallback quantizes.

        Args:
            bits: width of each weight that is quantized, by name.

        Raises:
            ConfigError: the method supports none of the widths.

        >>> Methods(weights="n2uq").weight_notes({"conv.weight": 2, "fc.weight": 8})
        ('lsq quantizes the weights fc.weight, because n2uq quantizes weights at 1 to 4 bits.',)
        """
        found = supported(self.weights, "weight")
        replaced = [name for name, width in bits.items() if width not in found.bits]
        if not replaced:
            return ()
        if found.fallback is None or len(replaced) == len(bits):
            way(self.weights, "weight", bits[replaced[0]])
        named = _listed(replaced, "weights")
        return (
            f"{found.fallback} quantizes the weights {named}, because {self.weights} quantizes weights at "
            f"{found.widths}.",
        )

    def bias_notes(self, missing: Sequence[str]) -> tuple[str, ...]:
        """Returns what the user should know about the quantizers of biases.

        Args:
            missing: weights of quantized layers that have no bias to quantize.

        >>> Methods(weights="dkm", bias_bits=8).bias_notes(["conv.weight"])  # doctest: +NORMALIZE_WHITESPACE
        ('lsq quantizes the biases of layers whose weights dkm quantizes.',
         'bias_bits = 8 had no effect at conv.weight, whose layer has no bias in training.')
        """
        if self.bias_bits is None:
            return ()
        method, notes = QUANTIZERS[self.weights].bias, []
        if method != self.weights:
            notes.append(f"{method} quantizes the biases of layers whose weights {self.weights} quantizes.")
        if missing:
            whose = "whose layer has no bias" if len(missing) == 1 else "whose layers have no bias"
            named = _listed([*missing], "weights")
            notes.append(f"bias_bits = {self.bias_bits} had no effect at {named}, {whose} in training.")
        return tuple(notes)

    def _unused_at(self, names: Iterable[str]) -> str:
        """Returns the part of a note that names the options of sites that a fallback quantizes."""
        here = {key: value for name in names for key, value in self._options_at(name).items()}
        given = {"activation_options": self.activation_options, "site_options": here}
        named = [f"{word} ({', '.join(options)})" for word, options in given.items() if options]
        return f"; {' and '.join(named)} had no effect there" if named else ""


def _listed(names: list[str], what: str = "sites") -> str:
    """Lists names; of many, the number and the first ones.

    >>> _listed(["a", "b"]), _listed([*"abcdefgh"])
    ('a, b', '8 sites (a, b, c, …)')
    """
    few = len(names) <= 2 * _NAMED
    return ", ".join(names) if few else f"{len(names)} {what} ({', '.join(names[:_NAMED])}, …)"
