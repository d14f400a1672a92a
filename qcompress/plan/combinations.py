"""Which options can be combined: every rule of docs/combinations.md and docs/plan.md, each in one place.

The command line asks `check` before any work; Python meets the same rules where a plan is resolved (`check_weight`), a
model is compressed (`settled_compute`, `check_calibration`) and a file is written (`check_file`).
"""

from collections.abc import Callable, Mapping
from typing import Final

from qcompress.deployment import Compute
from qcompress.errors import ConfigError
from qcompress.plan.fields import ACTIVATION_BITS, BITS, ROWS_PER_LUT, SCHEME, VECTOR_DIM, PlanField
from qcompress.plan.settings import Settings
from qcompress.plan.toml import value_text

BUILT_IN: Final = "built-in default"

# Where each field of a weight was set.
Origins = Mapping[str, str]
# Returns what is wrong and how to fix it, or None.
Rule = Callable[[Settings, Origins], str | None]


def check(
    settings: Settings,
    origins: Origins | None = None,
    *,
    compute: Compute | None = None,
    format: str | None = None,
) -> Compute:
    """Check options that hold for all weights, and return what layers compute in.

    Args:
        settings: of all weights.
        origins: where each field was set; None if all are options.
        compute: what layers shall compute in; None if unset.
        format: how int8 compute is written; None if unset.

    Raises:
        ConfigError: two options cannot be combined; the message names both.

    >>> check(Settings(bits=4)), check(Settings(bits=4, activation_bits=8))
    ('float', 'int8')
    """
    given = settings.given()
    origins = {f.name: f.option for f in settings.fields} if origins is None else origins
    defaults = type(settings).defaults().given()
    check_weight(
        type(settings)(**defaults | given),
        {**dict.fromkeys(defaults, BUILT_IN), **{name: origins[name] for name in given}},
    )
    activations = set_to(ACTIVATION_BITS, settings, origins) if ACTIVATION_BITS.name in given else None
    settled = settled_compute(compute, activations)
    check_file(settled, format)
    return settled


def check_weight(settings: Settings, origins: Origins, *, name: str = "") -> None:
    """Check the settings of one weight.

    Args:
        settings: its fields, with their defaults.
        origins: where each field was set.
        name: the weight; empty for all weights.

    Raises:
        ConfigError: two fields cannot be combined; the message names both.
    """
    for rule in RULES:
        wrong = rule(settings, origins)
        if wrong is not None:
            raise ConfigError(f"{name}: {wrong}" if name else wrong)


def settled_compute(compute: Compute | None, activations: str | None) -> Compute:
    """Return what layers compute in: if unset, int8 with activation_bits, else float.

    Args:
        compute: the requested one; None if unset.
        activations: where activation_bits was set, in words; None if it is unset.

    Raises:
        ConfigError: the two cannot be combined.
    """
    if compute is None:
        return "float" if activations is None else "int8"
    if compute == "int8" and activations is None:
        raise ConfigError("compute int8 needs activation_bits for at least one layer; add --activation-bits 8.")
    if compute != "int8" and activations is not None:
        why = "finds activation scales at run time" if compute == "dynamic8" else "leaves activations in float"
        raise ConfigError(f"compute {compute} {why}, but {activations}; remove one of the two.")
    return compute


def check_calibration(compute: Compute, given: bool) -> None:
    """Check that there is calibration data where it is needed.

    Args:
        compute: what layers compute in.
        given: whether there is calibration data.

    Raises:
        ConfigError: int8 compute without calibration data.
    """
    if compute == "int8" and not given:
        raise ConfigError(
            "activation_bits needs calibration data to find the ranges of activations; add --calibration X.npz "
            "(calibration=… in Python), or use compute dynamic8, which works without."
        )


def check_file(compute: Compute, format: str | None) -> None:
    """Check how a file is to be written.

    Args:
        compute: what its layers compute in.
        format: a way of the deployment format to write int8 compute; None if unset.

    Raises:
        ConfigError: the format is unknown, or does not apply to this compute.
    """
    if format is not None and compute != "int8":
        raise ConfigError(
            f"format {format} applies to compute int8 only, but this is compute {compute}; remove format, or set "
            "activation_bits, which makes layers compute in int8."
        )


def set_to(field: PlanField, settings: Settings, origins: Origins) -> str:
    """Return a field, its value and where it was set, as messages show them.

    >>> from qcompress.plan.fields import BITS, SCHEME
    >>> set_to(BITS, Settings(bits=2), {"bits": "--bits"}), set_to(SCHEME, Settings(scheme="auto"), {"scheme": "p:2"})
    ('bits = 2 (--bits)', 'scheme = "auto" (p:2)')
    """
    return f"{field.name} = {value_text(getattr(settings, field.name))} ({origins[field.name]})"


def _applies_to_scheme(settings: Settings, origins: Origins) -> str | None:
    """Each field applies to the schemes that its row names."""
    for field in settings.fields:
        if not field.asks(getattr(settings, field.name)) or settings.scheme in field.schemes:
            continue
        remedy = f"set scheme = {_quoted(field.schemes)}, or remove {field.name}"
        if field.harmless is not None:
            remedy += f" (or set it to {value_text(field.harmless)} for weights of other schemes)"
        return (
            f"{set_to(field, settings, origins)} applies to scheme {_quoted(field.schemes)} only, but "
            f"{set_to(SCHEME, settings, origins)}; {remedy}."
        )
    return None


def _vectors_share_one_palette(settings: Settings, origins: Origins) -> str | None:
    """The codes of vectors point into a single palette."""
    if ROWS_PER_LUT.asks(settings.rows_per_lut) and VECTOR_DIM.asks(settings.vector_dim):
        return (
            f"{set_to(VECTOR_DIM, settings, origins)} needs a single palette per weight, so it cannot be combined with "
            f"{set_to(ROWS_PER_LUT, settings, origins)}; remove one of the two."
        )
    return None


def _even_grids_have_two_bits(settings: Settings, origins: Origins) -> str | None:
    """An even grid of 1 bit would be a palette of two values."""
    if settings.scheme == "uniform" and settings.bits == 1:
        return (
            f"{set_to(SCHEME, settings, origins)} needs bits in [2, 8], got {set_to(BITS, settings, origins)}; set "
            'more bits, or scheme = "palette", which stores 1 bit as two values.'
        )
    return None


RULES: Final[tuple[Rule, ...]] = (_applies_to_scheme, _vectors_share_one_palette, _even_grids_have_two_bits)


def _quoted(words: tuple[str, ...]) -> str:
    return " or ".join(f'"{word}"' for word in words)
