"""The only table of ATen operators, with their properties for compression.

Operators go by their names as strings, `conv2d.default`, so that the JSON of a `.pt2` file is read by the same rows as
a graph in memory, and without torch. An operator that is not listed is computed as it stands: no weight is found behind
it, and no activation is quantized at it. In-place operators have no rows: see `functional_name`.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Final


@dataclass(frozen=True, slots=True, kw_only=True)
class Layer:
    """How an operator uses a weight. Arguments go by their names in the operator's schema.

    Args:
        kind: kind of the layer, one of `kinds.KINDS`; `kind_of_conv` tells the sorts of convolutions apart.
        weights: arguments that are its weight, or its weights.
        data: argument that is the activation; None for layers that solvers and grids ignore.
        bias: argument that is the bias; None if it has no such argument.
        holds_in_out: whether the weight is [in, out], as in a matrix product, and not [out, in].
    """

    kind: str
    weights: tuple[str, ...] = ("weight",)
    data: str | None = None
    bias: str | None = None
    holds_in_out: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Operator:
    """The properties of one operator.

    Args:
        layer: how it uses a weight; None if it is not a layer.
        hands_on: whether it hands on its first argument in another form, or in parts, so that a layer behind it still
            uses the weight that came in.
        transposes: whether it swaps the axes of a matrix (and hands on a weight that is one).
        moves: whether it moves the values of its first argument without changing them, so that they stay on their grid.
        splits: whether it returns parts of its first argument, as a list.
        pads: whether it adds values around its first argument; with zeros it counts as a move.
        clamps: whether it is a monotone clamp, which a quantizer behind it absorbs.
        bends: whether it is a function of each value by itself, which a table of 256 entries computes on codes.
        sums: whether it adds or multiplies two values, one of which may be a number.
        pools: whether it averages over windows.
        averages: whether it averages over whole axes.
        joins: whether it concatenates a list of values.
        normalizes: whether it is a BatchNorm with stored statistics.
        drops: whether it is a dropout, which does nothing outside of training.
    """

    layer: Layer | None = None
    hands_on: bool = False
    transposes: bool = False
    moves: bool = False
    splits: bool = False
    pads: bool = False
    clamps: bool = False
    bends: bool = False
    sums: bool = False
    pools: bool = False
    averages: bool = False
    joins: bool = False
    normalizes: bool = False
    drops: bool = False

    @property
    def is_fresh(self) -> bool:
        """Whether the result of this operator, which is listed, is new memory: a write to it reaches nothing else."""
        return not (self.hands_on or self.transposes or self.moves or self.pads)


_CONV: Final = Layer(kind="conv", data="input", bias="bias")
_CONV_TRANSPOSE: Final = Layer(kind="conv_transpose", data="input", bias="bias")
_EMBEDDING: Final = Layer(kind="embedding")
_RECURRENT: Final = Layer(kind="recurrent", weights=("params",))
_CELL: Final = Layer(kind="recurrent", weights=("w_ih", "w_hh"))

# Names that share a row, and the row. No name occurs twice.
_TABLE: Final[tuple[tuple[str, Operator], ...]] = (
    ("conv1d.default conv1d.padding", Operator(layer=_CONV)),
    ("conv2d.default conv2d.padding", Operator(layer=_CONV)),
    ("conv3d.default conv3d.padding", Operator(layer=_CONV)),
    ("convolution.default _convolution.default", Operator(layer=_CONV)),
    ("conv_transpose1d.default conv_transpose2d.input conv_transpose3d.input", Operator(layer=_CONV_TRANSPOSE)),
    ("linear.default", Operator(layer=Layer(kind="linear", data="input", bias="bias"))),
    ("matmul.default", Operator(layer=Layer(kind="linear", weights=("other",), data="self", holds_in_out=True))),
    ("mm.default", Operator(layer=Layer(kind="linear", weights=("mat2",), data="self", holds_in_out=True))),
    (
        "addmm.default",
        Operator(layer=Layer(kind="linear", weights=("mat2",), data="mat1", bias="self", holds_in_out=True)),
    ),
    ("embedding.default embedding_bag.default embedding_bag.padding_idx", Operator(layer=_EMBEDDING)),
    ("_embedding_bag.default _embedding_bag_forward_only.default", Operator(layer=_EMBEDDING)),
    ("lstm.input gru.input rnn_tanh.input rnn_relu.input", Operator(layer=_RECURRENT)),
    ("lstm_cell.default gru_cell.default rnn_tanh_cell.default rnn_relu_cell.default", Operator(layer=_CELL)),
    ("layer_norm.default group_norm.default instance_norm.default softmax.int", Operator()),  # listed for `is_fresh`
    ("batch_norm.default _native_batch_norm_legit_no_training.default", Operator(normalizes=True)),
    ("view.default reshape.default unsqueeze.default select.int slice.Tensor", Operator(hands_on=True, moves=True)),
    ("contiguous.default clone.default alias.default detach.default", Operator(hands_on=True, moves=True)),
    (
        "chunk.default split.Tensor split.sizes split_with_sizes.default",
        Operator(hands_on=True, moves=True, splits=True),
    ),
    ("t.default transpose.int permute.default", Operator(transposes=True, moves=True)),
    ("numpy_T.default", Operator(transposes=True)),
    ("getitem to.dtype", Operator(hands_on=True)),
    ("flatten.using_ints unflatten.int squeeze.dim squeeze.dims expand.default flip.default", Operator(moves=True)),
    ("_unsafe_view.default pixel_shuffle.default", Operator(moves=True)),
    ("upsample_nearest1d.vec upsample_nearest2d.vec", Operator(moves=True)),
    ("max_pool1d.default max_pool2d.default", Operator(moves=True)),
    ("dropout.default feature_dropout.default", Operator(moves=True, drops=True)),
    ("pad.default constant_pad_nd.default", Operator(pads=True)),
    ("relu.default relu6.default hardtanh.default clamp.default clamp_min.default", Operator(clamps=True)),
    ("sigmoid.default hardsigmoid.default leaky_relu.default mish.default", Operator(bends=True)),
    ("add.Tensor mul.Tensor", Operator(sums=True)),
    ("avg_pool1d.default avg_pool2d.default", Operator(pools=True)),
    ("adaptive_avg_pool1d.default adaptive_avg_pool2d.default", Operator(pools=True)),
    ("mean.dim", Operator(averages=True)),
    ("cat.default concat.default", Operator(joins=True)),
)


def _rows() -> Iterator[tuple[str, Operator]]:
    for names, row in _TABLE:
        yield from ((name, row) for name in names.split())


# The row of each operator: `name.overload` of ATen's, and `getitem`, which takes a part out of a list.
OPERATORS: Final[Mapping[str, Operator]] = dict(_rows())
UNLISTED: Final = Operator()


def operator(name: str) -> Operator:
    """Return the row of an operator; that of an unlisted one is empty.

    >>> operator("relu.default").clamps, operator("fft_fft.default") == UNLISTED
    (True, True)
    """
    return OPERATORS.get(name, UNLISTED)


def kind_of_conv(weight_shape: tuple[int, ...], groups: object, transposed: object = False) -> str:
    """Return the kind of a convolution.

    Args:
        weight_shape: [out, in / groups, ...].
        groups: as the operator has it; a hostile file may put anything there.
        transposed: likewise.

    >>> kind_of_conv((8, 1, 3, 3), 8), kind_of_conv((8, 4, 3, 3), 2)
    ('depthwise', 'conv')
    """
    if transposed is True:
        return "conv_transpose"
    return "depthwise" if isinstance(groups, int) and groups > 1 and weight_shape[1] == 1 else "conv"


def functional_name(name: str) -> str | None:
    """Return the name of the operator that computes the same as an in-place one and writes to no argument.

    ATen keeps one rule for these names, so no table is needed: an underscore at the end.

    Returns:
        The name; None if the operator is not an in-place one.

    >>> functional_name("relu_.default"), functional_name("relu.default"), functional_name("_to_copy.default")
    ('relu.default', None, None)
    """
    head, _, overload = name.partition(".")
    return f"{head[:-1]}.{overload}" if head.endswith("_") and not head.startswith("_") else None
