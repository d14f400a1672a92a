"""The generic deployment, which compression takes where no other is given."""

import numpy as np
import pytest

from qcompress.artifacts import IntegerWeight, PalettizedWeight
from qcompress.deployment import DEFAULT, Choice, Deployment
from qcompress.palettes.even_grid import round_to_nearest
from qcompress.palettes.int8_palette import palettize_int8
from qcompress.palettes.scalar import palettize
from qcompress.palettes.vector import palettize_vectors

WEIGHT = np.random.default_rng(0).standard_normal((24, 70)).astype(np.float32)


def test_it_is_a_deployment():
    assert isinstance(DEFAULT, Deployment)
    assert DEFAULT.reads(4) == ()
    assert DEFAULT.integer_kinds("float") == ()


@pytest.mark.parametrize(
    ("artifact", "fields"),
    [
        (palettize(WEIGHT, 4), {}),
        (palettize(WEIGHT, 3, rows_per_lut=5), {"rows_per_lut": 5}),
        (palettize(WEIGHT, 4, lut_dtype="float16"), {"lut_dtype": "float16"}),
        (palettize_vectors(WEIGHT, 4, 2), {"vector_dim": 2}),
        (palettize_int8(WEIGHT, 4), {"lut_dtype": "int8", "scales": True}),
        (round_to_nearest(WEIGHT, 3), {"scales": True}),
        (round_to_nearest(WEIGHT, 4, block_size=32), {"block_size": 32}),
    ],
)
def test_a_choice_costs_the_bytes_of_its_artifact(artifact: PalettizedWeight | IntegerWeight, fields):
    choice = Choice(artifact=artifact.kind, bits=artifact.bits, **fields)
    assert DEFAULT.cost(WEIGHT.shape, 0, choice).nbytes == artifact.nbytes
