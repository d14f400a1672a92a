"""At how many bits the layers of a program take their activations, which need not be what the plan asks for."""

from collections import Counter
from collections.abc import Iterable, Mapping

from qcompress.graph.layers import LAYER_KINDS, weight_layers
from qcompress.graph.marks import input_sites, mark
from qcompress.graph.program import FloatProgram


def activation_widths(program: FloatProgram, bits: Mapping[tuple[str, int], int]) -> dict[str, int | None]:
    """Return the bits at which each layer takes its activations, by its weight; None: it takes floats.

    Args:
        program: BatchNorm folded.
        bits: of all activations that are quantized, by site.
    """
    marked = mark(program, bits)
    sites, taken = list(bits), input_sites(marked)
    layers = [name for name, layer in weight_layers(program).items() if layer.kind in LAYER_KINDS]
    return {name: bits[sites[taken[name]]] if name in taken else None for name in layers}


def widths_text(widths: Mapping[str, int | None], asked: Iterable[int] = ()) -> str:
    """Return how many layers take activations at which width: those that were asked for first, then narrow to wide.

    Args:
        widths: from `activation_widths`.
        asked: the widths that the plan asks for.

    >>> widths_text({"a": 8, "b": 2, "c": None, "d": 2}, asked=[2])
    '2 of 4 layers take activations at 2 bits, 1 at 8, 1 as floats'
    >>> widths_text({"a": 8}, asked=[1]), widths_text({})
    ('0 of 1 layer take activations at 1 bit, 1 at 8', 'no layer takes quantized activations')
    """
    counts = Counter(widths.values())
    wanted = sorted(set(asked))
    order = [*wanted, *sorted(bits for bits in counts if bits is not None and bits not in wanted)]
    if not order:
        return "no layer takes quantized activations"
    first, *others = order
    layers, bits = f"{len(widths)} layer{'s' * (len(widths) != 1)}", f"{first} bit{'s' * (first != 1)}"
    verb = "takes" if counts[first] == 1 else "take"
    parts = [f"{counts[first]} of {layers} {verb} activations at {bits}", *(f"{counts[b]} at {b}" for b in others)]
    return ", ".join([*parts, *([f"{counts[None]} as floats"] if counts[None] else [])])
