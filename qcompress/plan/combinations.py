"""Which words go together: the rules behind docs/combinations.md, each in one place.

Every refusal says which word to change. The command line asks `check` before any work; Python meets the same rules
where a plan is resolved (`check_weight`), a model compressed (`settled_compute`) and a file written (`check_file`).
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Final

from qcompress.errors import ConfigError

if TYPE_CHECKING:
    from qcompress.deployment import Compute

MEMORIES: Final = ("unpacked", "packed")

_FLAGS: Final = {
    name: f"--{name.replace('_', '-')}"
    for name in ("bits", "activation_bits", "scheme", "rows_per_lut", "vector_dim", "lut_dtype", "block_size")
}


def check(
    *,
    compute: "Compute | None" = None,
    format: str | None = None,
    memory: str = "unpacked",
    scheme: str | None = None,
    bits: int | None = None,
    activation_bits: int | None = None,
    rows_per_lut: int | None = None,
    vector_dim: int = 1,
    block_size: int | None = None,
    lut_dtype: str | None = None,
    origins: Mapping[str, str] = _FLAGS,
) -> "Compute":
    """Refuse words that do not go together.

    Args:
        compute: None: said nowhere; so, too, of all others.
        format: how int8 compute is written.
        memory: how weights lie in memory at run time.
        scheme: of weights.
        bits: of weights.
        activation_bits: of what layers take.
        rows_per_lut: output channels that share a palette.
        vector_dim: weights that share a code.
        block_size: inputs that share a scale.
        lut_dtype: type of palettes' entries.
        origins: where each of what is about weights was said, and activation_bits.

    Returns:
        What layers compute in.

    Raises:
        ConfigError: names the words, and what to do.

    >>> check(bits=4), check(bits=4, activation_bits=8), check(bits=4, compute="dynamic8")
    ('float', 'int8', 'dynamic8')
    """
    if scheme is not None:
        check_weight(
            scheme, bits, rows_per_lut, origins, vector_dim=vector_dim, block_size=block_size, lut_dtype=lut_dtype
        )
    said = None if activation_bits is None else f"activation_bits = {activation_bits} ({origins['activation_bits']})"
    settled = settled_compute(compute, said)
    check_file(settled, format, memory)
    return settled


def check_weight(
    scheme: str,
    bits: int | None,
    rows_per_lut: int | None,
    origins: Mapping[str, str],
    *,
    name: str = "",
    vector_dim: int = 1,
    block_size: int | None = None,
    lut_dtype: str | None = None,
) -> None:
    """A uniform grid has no palette to share, none of 1 bit and none of vectors; vectors have one palette for all.

    A palette has no scales for blocks.

    Args:
        scheme: `palette`, `uniform` or `auto`.
        bits: None: not said yet.
        rows_per_lut: None: all of them.
        origins: where each was said.
        name: of the tensor; empty for all.
        vector_dim: weights that share a code.
        block_size: inputs that share a scale.
        lut_dtype: type of palettes' entries.

    Raises:
        ConfigError: names the words, and what to do.
    """
    who = f"{name}: " if name else ""
    if vector_dim > 1 and (scheme != "palette" or rows_per_lut is not None):
        other = "scheme" if scheme != "palette" else "rows_per_lut"
        value = f'"{scheme}"' if other == "scheme" else rows_per_lut
        raise ConfigError(
            f"{who}vector_dim = {vector_dim} ({origins['vector_dim']}) is about one palette for a whole weight, and "
            f"{other} = {value} ({origins[other]}) asks for something else: leave one of them out."
        )
    if block_size is not None and scheme == "palette":
        raise ConfigError(
            f"{who}block_size = {block_size} ({origins['block_size']}) is about scales of even grids, and scheme = "
            f'"palette" ({origins["scheme"]}) has none for blocks: say scheme = "uniform" or "auto", or leave it out.'
        )
    if scheme != "uniform":
        return
    what = f'scheme = "uniform" ({origins["scheme"]})'
    if rows_per_lut is not None:
        raise ConfigError(
            f"{who}rows_per_lut = {rows_per_lut} ({origins['rows_per_lut']}) is about palettes, and {what} has none: "
            'leave one of them out, or say rows_per_lut = "auto" where the scheme is uniform.'
        )
    if lut_dtype not in (None, "float32"):
        raise ConfigError(
            f'{who}lut_dtype = "{lut_dtype}" ({origins["lut_dtype"]}) is about palettes, and {what} has none: leave '
            'one of them out, or say lut_dtype = "float32" where the scheme is uniform.'
        )
    if bits == 1:
        raise ConfigError(
            f"{who}{what} must have bits in [2, 8], got bits = 1 ({origins['bits']}): give more bits, or "
            'scheme = "palette", which writes 1 bit as two values.'
        )


def settled_compute(compute: "Compute | None", said: str | None) -> "Compute":
    """What layers compute in, where nothing else is said: int8 with activation_bits, else float.

    Args:
        compute: what was asked for.
        said: activation_bits in words, and where they were said; None: nowhere.

    Raises:
        ConfigError: they do not go together.
    """
    if compute is None:
        return "float" if said is None else "int8"
    if compute == "int8" and said is None:
        raise ConfigError("compute int8 must have activation_bits for some layer: give --activation-bits 8.")
    if compute != "int8" and said is not None:
        why = "finds the activations' scales at run time" if compute == "dynamic8" else "leaves activations in float"
        raise ConfigError(f"compute {compute} {why}, but {said}: leave one of them out.")
    return compute


def check_calibration(compute: "Compute", given: bool) -> None:
    """int8 compute needs data to find grids on.

    Args:
        compute: what layers compute in.
        given: whether there is calibration data.

    Raises:
        ConfigError: there is none.
    """
    if compute == "int8" and not given:
        raise ConfigError(
            "activation_bits must have calibration data to find the activations' grids: give --calibration X.npz "
            "(calibration=… in Python), or use compute dynamic8, which needs none."
        )


def check_file(compute: "Compute", format: str | None, memory: str = "unpacked") -> None:
    """What a file can be written as.

    Args:
        compute: what its layers compute in.
        format: a way of the deployment format to write int8 compute; None if unset.
        memory: how weights lie in memory at run time.

    Raises:
        ConfigError: names the words, and what to do.
    """
    if memory == "packed":
        raise ConfigError(
            "memory packed, weights that stay packed at run time, comes later: say memory unpacked, or leave it out."
        )
    if memory not in MEMORIES:
        raise ConfigError(f"memory must be one of {', '.join(MEMORIES)}, got {memory!r}.")
    if format is not None and compute != "int8":
        raise ConfigError(
            f"format {format} is a way to write compute int8, and this is compute {compute}: leave format out, or give "
            "activation_bits, which make it compute int8."
        )
