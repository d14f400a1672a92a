"""Every artifact at every kind of layer, width and grid: a file's codes and outputs against float64 from artifacts."""

import itertools
from collections.abc import Sequence

import pytest

from tests.helpers.integer_chain import ARTIFACTS, FORMATS, GRIDS, KINDS, Case, case

BITS, ACTIVATION_BITS = (2, 4, 7, 8), (2, 4, 8)
WIDTHLESS = {"ternary", "float"}
WHY_FLOAT = {
    "asymmetric": "its grid has blocks, a zero point, or codes above 127",
    "k-means": "its palette is not on an int8 grid",
    "float": "by plan",
}
PADDED = {"conv padded", "conv strided padded", "conv dilated", "depthwise", "conv 1d"}
NO_KERNEL = "onnxruntime has no integer kernel for transposed convolutions"
FREE = "its input has a free offset, which only unpadded layers can take up"


def widths(weight: str) -> list[tuple[int, int]]:
    """Those of weights and of activations that a kind of weight may have."""
    return list(itertools.product((8,) if weight in WIDTHLESS else BITS, ACTIVATION_BITS))


def agrees(found: Case, forms: Sequence[str] = FORMATS) -> bool:
    failures = [text for form in forms for text in found.failures(form)]
    assert failures == [], [str(grid) for grid in found.grids()]
    return True


@pytest.mark.parametrize("weight", ARTIFACTS)
@pytest.mark.parametrize("kind", KINDS)
def test_what_computes_in_int8_and_that_it_agrees(kind, weight):
    # The widths, grids and formats in turns; all of them below.
    turn, every = list(KINDS).index(kind) + ARTIFACTS.index(weight), widths(weight)
    bits, activation_bits = every[7 * turn % len(every)]
    free = turn % 2 == 0
    grids = ("beta below 0", "signed with beta") if free else ("zero point", "beta below 0")
    found = case(kind, weight, bits=bits, activation_bits=activation_bits, grids=grids)
    assert agrees(found, FORMATS[turn // 2 % 2 :][:1])
    assert free == (found.grids()[0].zero_point is None)
    why = WHY_FLOAT.get(weight, FREE if free and kind in PADDED else "")
    if weight == "half integers" and bits == 8:  # odd integers up to 255
        why = WHY_FLOAT["k-means"]
    if kind == "conv transposed":
        why = NO_KERNEL
    for form in FORMATS:
        (layer,) = (r for r in found.file(form).report.layers if r.weight == "layer.weight")
        assert (layer.compute, layer.why) == ("float" if why else "int8", why)
        assert layer.offset == (("added" if why else "folded") if free else "" if why else "zero point")


@pytest.mark.slow
@pytest.mark.parametrize("weight", ARTIFACTS)
@pytest.mark.parametrize("kind", KINDS)
def test_at_every_width_and_grid(kind, weight):
    turns = itertools.cycle(itertools.product(GRIDS, GRIDS))
    for bits, activation_bits in widths(weight):
        for grids in itertools.islice(turns, 4):
            assert agrees(case(kind, weight, bits=bits, activation_bits=activation_bits, grids=grids))
