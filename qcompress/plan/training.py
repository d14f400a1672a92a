"""The fields of a plan's [training] table, a row each: what decides the result of `finetune` beside the weights' plan.

The options of `finetune`, their help and docs/plan.md are made from these rows. Where a field is unset, its default
holds unless the method and the width have another: `finetune.recipes`.
"""

from typing import Any, ClassVar, Final

from qcompress.plan.fields import Fields, PlanField
from qcompress.plan.settings import Settings
from qcompress.plan.toml import value_text
from qcompress.plan.values import Integer, Number, OneOf, Text, Values

METHODS: Final = (
    "lsq", "lsq_plus", "pact", "dorefa", "ewgs", "tqt", "ternary", "bmpq", "n2uq", "dkm", "none",
)  # fmt: skip
REGULARIZERS: Final = (
    "none", "range:margin", "range:linf", "range:soft_min_max", "range:relative_soft_min_max", "bin", "kurtosis", "l2",
    "kl",
)  # fmt: skip

# What users may call them.
_METHODS_MEANT: Final = {
    "lsq+": "lsq_plus", "qat": "lsq", "palette": "dkm", "palettes": "dkm", "kmeans": "dkm", "k-means": "dkm",
    "twn": "ternary", "ttq": "ternary", "float": "none", "fp32": "none", "float32": "none",
}  # fmt: skip
_REGULARIZERS_MEANT: Final = {
    "r2": "range:margin", "range": "range:margin", "br": "bin", "bins": "bin", "kure": "kurtosis",
}  # fmt: skip

# Widths of weights at which a method's defaults were chosen by measuring.
TUNED: Final = {"lsq": (2,), "dkm": (1, 2)}


def tuned_text() -> str:
    """Return which defaults are tuned, in a sentence.

    >>> tuned_text()
    'Tuned: lsq at 2 bits, dkm at 1 or 2 bits; untuned: other methods and widths.'
    """
    listed = (f"{method} at {' or '.join(map(str, widths))} bits" for method, widths in TUNED.items())
    return f"Tuned: {', '.join(listed)}; untuned: other methods and widths."


_BY_METHOD: Final = "by method and width"


def _row(name: str, values: Values, meaning: str, *, default: Any = None, unset: str = "", **more: Any) -> PlanField:
    """Return a row; what is said of an unset field is its default unless told otherwise."""
    said = value_text(default).strip('"') if default is not None and not unset else unset
    return PlanField(name=name, values=values, meaning=meaning, default=default, unset=said, **more)


TRAINING_FIELDS: Final[Fields] = (
    _row(
        name="method",
        values=OneOf(METHODS),
        meaning="How weights and activations are quantized in training; none trains the float model. " + tuned_text(),
        unset="lsq",
        synonyms=_METHODS_MEANT,
    ),
    _row(name="epochs", values=Integer(1), meaning="Passes over the data.", default=6),
    _row(name="batch_size", values=Integer(1), meaning="Samples of a step, over all processes.", default=64),
    _row(name="optimizer", values=OneOf(("adamw", "adam", "sgd")), meaning="sgd has momentum 0.9.", default="adamw"),
    _row(
        name="nesterov",
        values=OneOf((True, False)),
        meaning="Whether sgd uses Nesterov's momentum.",
        default=False,
    ),
    _row(name="rate", values=Number(0), meaning="Highest learning rate of the model's parameters.", unset=_BY_METHOD),
    _row(
        name="quantizer_rate",
        values=Number(0),
        meaning="Learning rate of the quantizers' parameters, as a share of the rate.",
        default=1.0,
        unset=_BY_METHOD,
    ),
    _row(
        name="weight_decay",
        values=Number(0),
        meaning="Of tensors with two or more axes.",
        default=0.0,
        unset=_BY_METHOD,
    ),
    _row(
        name="clip",
        values=Number(0),
        meaning="Largest norm of all gradients together; 0 sets no limit.",
        default=0.0,
    ),
    _row(
        name="schedule",
        values=OneOf(("cosine", "linear", "constant")),
        meaning="How the learning rate goes from its highest value: to 0, or not at all.",
        default="cosine",
    ),
    _row(
        name="warm_up",
        values=Number(0, 1),
        meaning="Share of the steps in which the learning rate rises.",
        default=0.05,
    ),
    _row(
        name="precision",
        values=OneOf(("float32", "bfloat16", "float16")),
        meaning="What layers compute in while training.",
        default="float32",
    ),
    _row(
        name="compile",
        values=OneOf((True, False)),
        meaning="Whether torch.compile makes few kernels of a step, which takes minutes at the start.",
        default=False,
    ),
    _row(
        name="loss",
        values=Text(("cross_entropy", "mse"), "MODULE:FN"),
        meaning="The loss of outputs and labels; a function runs your code.",
        default="cross_entropy",
    ),
    _row(
        name="teacher",
        values=Text(("self", "none"), "FILE"),
        meaning="A model whose outputs are learned: self is MODEL before training.",
        default="self",
        unset="self; none with the method none or from_scratch",
    ),
    _row(
        name="kd_weight",
        values=Number(0, 1),
        meaning="Weight of the teacher in the loss where there are labels too.",
        default=1.0,
    ),
    _row(
        name="temperature",
        values=Number(0.01),
        meaning="Divides the logits of teacher and model.",
        default=4.0,
    ),
    _row(
        name="regularizer",
        values=OneOf(REGULARIZERS),
        meaning="A penalty on weights: R² (range), bin regularization, kurtosis, L2 or KL.",
        default="none",
        synonyms=_REGULARIZERS_MEANT,
    ),
    _row(
        name="regularizer_weight",
        values=Number(0),
        meaning="The weight of the penalty in the loss.",
        unset="as in its paper",
    ),
    _row(
        name="stage",
        values=OneOf(("S1", "S2", "S3")),
        meaning="When the penalty acts: always (S1), after the first third (S2), in every other epoch (S3).",
        default="S2",
        unset="S2, or S1 with the method none",
    ),
    _row(
        name="augment",
        values=Text((), "flip,crop:4|MODULE:FN"),
        meaning="Random changes of training images: flip mirrors them, crop:N shifts them by up to N pixels.",
        unset="none",
    ),
    _row(
        name="placement",
        values=OneOf(("deploy", "paper")),
        meaning="Which activations are quantized: all that the target fuses, or inputs of layers only.",
        default="deploy",
    ),
    _row(
        name="per_tensor",
        values=OneOf((True, False)),
        meaning="Whether a weight has one scale in place of one per output channel.",
        default=False,
    ),
    _row(
        name="fixed_offset",
        values=OneOf((True, False)),
        meaning="Whether the offsets of LSQ+ stay at their start.",
        default=False,
    ),
    _row(
        name="snap_offsets",
        values=Number(0, 1),
        meaning="Share of the steps, at the end, in which offsets are zero points.",
        default=0.5,
    ),
    _row(
        name="free_inputs",
        values=OneOf((True, False)),
        meaning="Whether the offsets of the model's inputs of 1 to 3 bits stay as learned where layers pad them: these "
        "layers compute in float.",
        default=True,
    ),
    _row(
        name="settle",
        values=Number(0, 1),
        meaning="Share of the steps, at the end, that compute with biases as the file holds them.",
        default=0.1,
    ),
    _row(
        name="batchnorm",
        values=OneOf(("train", "freeze", "fold")),
        meaning="Whether BatchNorm's statistics train, stay, or are folded into weights first.",
        default="train",
    ),
    _row(
        name="reestimate",
        values=Integer(0),
        meaning="Batches over which BatchNorm's statistics are computed anew for models that are scored or stored.",
        default=0,
    ),
    _row(
        name="from_scratch",
        values=OneOf((True, False)),
        meaning="Whether training starts from random weights, as the architecture makes them.",
        default=False,
    ),
)


class Training(Settings):
    """The settings of a plan's [training] table: an attribute per field, None where it is unset.

    >>> Training(method="dkm", epochs=3)
    Training(method='dkm', epochs=3)
    """

    fields: ClassVar[Fields] = TRAINING_FIELDS
