"""What `finetune` does by default, for each method and width, and how a plan's [training] table becomes settings."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from functools import partial
from typing import Any, Final, final

from torch import nn

from qcompress.errors import ConfigError
from qcompress.finetune.config import LoopConfig
from qcompress.finetune.methods import Methods
from qcompress.plan.training import TUNED, Training
from qcompress.quantizers import QUANTIZERS
from qcompress.regularizers import BinRegularizer, DistanceRegularizer, KurtosisRegularizer, RangeRegularizer

Regularizer = Callable[[nn.Module], nn.Module]

_FEW: Final = 3  # bits up to which weights move far


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """What a method's name stands for, and its defaults.

    Args:
        weights: the quantizer of weights.
        activations: that of activations.
        activation_options: further arguments of the activations' quantizer.
        few: settings up to 3 bits per weight that differ from those of all methods.
        many: settings above.
    """

    weights: str
    activations: str
    activation_options: Mapping[str, Any] = field(default_factory=dict)
    few: Mapping[str, Any] = field(default_factory=lambda: {"rate": 2e-3})
    many: Mapping[str, Any] = field(default_factory=lambda: {"rate": 5e-4})


RECIPES: Final[Mapping[str, Recipe]] = {
    "lsq": Recipe(weights="lsq", activations="lsq", activation_options={"init": "lsq_plus"}),
    "lsq_plus": Recipe(weights="lsq_plus", activations="lsq_plus"),
    "pact": Recipe(weights="dorefa", activations="pact"),
    "dorefa": Recipe(weights="dorefa", activations="lsq_plus"),
    "ewgs": Recipe(weights="ewgs", activations="ewgs"),
    "tqt": Recipe(weights="tqt", activations="tqt"),
    "ternary": Recipe(weights="ternary", activations="pact"),
    "bmpq": Recipe(weights="bmpq", activations="pact"),
    "n2uq": Recipe(
        weights="n2uq", activations="n2uq",
        few={"rate": 2e-3, "quantizer_rate": 0.1}, many={"rate": 5e-4, "quantizer_rate": 0.1},
    ),
    "dkm": Recipe(weights="dkm", activations="lsq_plus"),
}  # fmt: skip
_FLOAT: Final = {"rate": 1e-3, "stage": "S1", "teacher": "none"}  # the method none


def complete(training: Training, bits: int | None, *, has_labels: bool) -> Training:
    """Returns the settings with the defaults of their method and width where they are unset.

    Args:
        training: what the user set.
        bits: of most weights.
        has_labels: whether the data has labels; without them the loss is the distance from the teacher.

    >>> settings = complete(Training(method="n2uq"), 2, has_labels=True)
    >>> settings.rate, settings.quantizer_rate, settings.epochs
    (0.002, 0.1, 6)
    """
    method = training.method or "lsq"
    recipe = RECIPES.get(method)
    if recipe is None:
        own: Mapping[str, Any] = _FLOAT
    else:
        own = recipe.few if bits is not None and bits <= _FEW else recipe.many
    scratch = {"teacher": "none"} if training.from_scratch else {}
    found = Training(**{**Training.defaults().given(), "method": method, **own, **scratch, **training.given()})
    if found.from_scratch and found.teacher == "self":
        raise ConfigError("--from-scratch has no trained model to learn from; use --teacher none, or a file.")
    if found.nesterov and found.optimizer != "sgd":
        raise ConfigError(
            f"--nesterov applies to the optimizer sgd only, but this is {found.optimizer}; add --optimizer sgd, or "
            "remove --nesterov."
        )
    if not has_labels and found.teacher == "none":
        raise ConfigError(
            "Training needs labels or a teacher, but the data has no labels; add them as y, or use --teacher self or "
            "FILE."
        )
    return found


def is_tuned(training: Training, bits: int | None) -> bool:
    """Returns whether a method's defaults were chosen by measuring at a width; those of `none` are the usual ones."""
    return training.method == "none" or bits in TUNED.get(training.method or "lsq", ())


def loop_config(training: Training) -> LoopConfig:
    """Returns the loop's settings of complete training settings."""
    return LoopConfig(**{f.name: getattr(training, f.name) for f in fields(LoopConfig)})


def methods(training: Training, *, has_activations: bool = True) -> Methods:
    """Returns the quantizers of complete training settings; those of `none` quantize nothing.

    Args:
        training: the settings.
        has_activations: whether activations are quantized; otherwise they have no options.

    >>> methods(Training(method="lsq")).activation_options
    {'init': 'lsq_plus'}
    """
    recipe = RECIPES.get(training.method)
    if recipe is None:
        return Methods()
    options = {**recipe.activation_options} if has_activations else {}
    options |= {"learn_offset": False} if training.fixed_offset else {}
    if training.fixed_offset and recipe.activations != "lsq_plus":
        raise ConfigError(
            f"--fixed-offset applies to activations that LSQ+ quantizes, but {training.method} quantizes them with "
            f"{recipe.activations}; remove it, or use the method lsq_plus or dkm."
        )
    way = QUANTIZERS[recipe.weights].weight
    if training.per_tensor and way is not None and way.scales not in ("either", "tensor"):
        raise ConfigError(f"--per-tensor does not apply to {training.method}, whose scales are per {way.scales}.")
    return Methods(
        weights=recipe.weights,
        activations=recipe.activations,
        activation_options=options,
        per_channel=not training.per_tensor,
    )


def regularizers(training: Training) -> list[Regularizer]:
    """Returns what makes the regularizer of complete training settings; empty: there is none."""
    family, _, kind = training.regularizer.partition(":")
    weight = {} if training.regularizer_weight is None else {"weight": training.regularizer_weight}
    if family == "none":
        return []
    if family == "range":
        is_relative = kind.startswith("relative_")
        return [partial(RangeRegularizer, kind=kind.removeprefix("relative_"), relative=is_relative, **weight)]
    made: Mapping[str, Regularizer] = {
        "bin": partial(BinRegularizer, **weight),
        "kurtosis": partial(KurtosisRegularizer, **weight),
        "l2": partial(DistanceRegularizer, kind="l2", **weight),
        "kl": partial(DistanceRegularizer, kind="kl", **weight),
    }
    return [made[family]]
