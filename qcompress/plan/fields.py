"""The fields of a plan, a row each: legal values, meaning, default, and the weights that a field applies to.

`Settings`, the options of `export`, the accessors of `TensorPlan`, the rules of `combinations` and docs/plan.md are all
made from these rows. A new field is a row here, plus the code that acts on it.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final, Literal, final, get_args

from qcompress.errors import ConfigError, did_you_mean
from qcompress.plan.values import Integer, OneOf, Values

Scheme = Literal["palette", "uniform", "auto"]
LutDtype = Literal["float32", "float16", "int8"]

FLOAT16: Final = "float16"

_SHOWN: Final = 100  # characters of a value in a message


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class PlanField:
    """One field of a plan.

    Args:
        name: its key in TOML and Python; the option is `--name` with dashes.
        values: the legal values.
        meaning: what it says, in a sentence.
        unset: what holds where it is unset, for `--help` and docs/plan.md; empty where it must be set.
        has_option: whether `export` has an option for it.
        default: the value of weights for which no table sets it; None leaves it unset.
        reads_as: what code gets in place of a value; None stands for unset.
        harmless: a value that is legal where the field does not apply, since it asks for nothing.
        schemes: the schemes that it applies to.
        kinds: the kinds of weights that it applies to; empty for all. Such a field, set in [default], is ignored for
            other weights; it is an error only where it applies to no weight.
        trains: whether `prepare` supports it; "palette": with methods that train palettes.
        synonyms: words that users may type for a legal word, for messages.
    """

    name: str
    values: Values
    meaning: str
    unset: str = ""
    has_option: bool = True
    default: Any = None
    reads_as: Mapping[Any, Any] = field(default_factory=dict)
    harmless: Any = None
    schemes: tuple[str, ...] = get_args(Scheme)
    kinds: tuple[str, ...] = ()
    trains: bool | Literal["palette"] = True
    synonyms: Mapping[str, str] = field(default_factory=dict)

    @property
    def option(self) -> str:
        """The option of the command line: `--rows-per-lut`."""
        return "--" + self.name.replace("_", "-")

    def wrong(self, value: Any) -> str:
        """Return what is wrong with a value that is not legal, for a message that begins with the field's name.

        >>> BITS.wrong(9)
        'must be an integer in [1, 8], got 9.'
        """
        shown = repr(value)
        return (
            f"must be {self.values}, got {shown if len(shown) <= _SHOWN else shown[:_SHOWN] + '…'}.{self._near(value)}"
        )

    def _near(self, value: Any) -> str:
        """Return a sentence that names the word that was meant, or an empty text."""
        words = [word for word in getattr(self.values, "values", ()) if isinstance(word, str)]
        if not isinstance(value, str) or not words:
            return ""
        meant = self.synonyms.get(value.lower())
        return f" Did you mean {meant}?" if meant else did_you_mean(value.lower(), words)

    def checked(self, value: Any) -> Any:
        """Return a legal value as it is.

        Raises:
            ConfigError: the value is not legal.
        """
        if value not in self.values:
            raise ConfigError(self.wrong(value))
        return value

    def asks(self, value: Any) -> bool:
        """Whether a value asks for anything: it is neither unset nor harmless."""
        return value is not None and value != self.harmless

    def read(self, value: Any) -> Any:
        """Return what code gets for the value of a table.

        >>> VECTOR_DIM.read(None), VECTOR_DIM.read(4), ROWS_PER_LUT.read("auto")
        (1, 4, None)
        """
        return self.reads_as.get(value, value)


BITS: Final = PlanField(
    name="bits",
    values=Integer(1, 8),
    meaning="Bits per code of a weight.",
)
ACTIVATION_BITS: Final = PlanField(
    name="activation_bits",
    values=Integer(1, 8),
    meaning="Bits per code of the activations of a layer, which then computes in int8. Needs calibration data.",
    unset="floats",
)
SCHEME: Final = PlanField(
    name="scheme",
    values=OneOf(get_args(Scheme)),
    meaning="What the codes of a weight stand for: entries of a palette, steps of an even grid (uniform), or, weight "
    "by weight, whichever takes fewer bytes at the same error (auto).",
    unset="palette",
    default="palette",
)
ROWS_PER_LUT: Final = PlanField(
    name="rows_per_lut",
    values=Integer(1, word="auto"),
    meaning="Output channels that share a palette.",
    unset="auto, all of them",
    default="auto",
    reads_as={"auto": None},
    harmless="auto",
    schemes=("palette", "auto"),
    trains="palette",
)
VECTOR_DIM: Final = PlanField(
    name="vector_dim",
    values=OneOf((1, 2, 4, 8)),
    meaning="Consecutive weights that share a code of a palette: bits per weight are bits / vector_dim. Such layers "
    "compute in float.",
    unset="1",
    reads_as={None: 1},
    harmless=1,
    schemes=("palette",),
    trains="palette",
)
LUT_DTYPE: Final = PlanField(
    name="lut_dtype",
    values=OneOf(get_args(LutDtype)),
    meaning="Type of palette entries; int8 entries are multiplied by a float32 scale. Layers whose palettes are set to "
    "float32 or float16 compute in float.",
    unset="float32, or int8 where the layer computes in int8",
    harmless="float32",
    schemes=("palette", "auto"),
    trains="palette",
)
BLOCK_SIZE: Final = PlanField(
    name="block_size",
    values=Integer(2),
    meaning="Consecutive inputs that share a scale of an even grid. Such layers compute in float.",
    unset="all inputs of an output channel",
    schemes=("uniform", "auto"),
    kinds=("linear", "embedding"),
    trains=False,
)
SKIP: Final = PlanField(
    name="skip",
    values=OneOf((True, False, FLOAT16)),
    meaning='Whether the weight is left in float; "float16" stores it as float16, and its layer computes in float32.',
    unset="false",
    has_option=False,
    default=False,
)

Fields = tuple[PlanField, ...]

FIELDS: Final[Fields] = (
    BITS,
    ACTIVATION_BITS,
    SCHEME,
    ROWS_PER_LUT,
    VECTOR_DIM,
    LUT_DTYPE,
    BLOCK_SIZE,
    SKIP,
)
