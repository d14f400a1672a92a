"""Augmentation: what flip and crop do to each image, and the messages of wrong ones."""

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from qcompress.data.augment import Share, parse_augment
from qcompress.errors import ConfigError, DataError
from tests.helpers.user_module import code

X = torch.arange(64 * 2 * 5 * 4, dtype=torch.float32).reshape(64, 2, 5, 4) + 1
ALL = Share(64, 0, 64)


def shifted(image: Tensor, down: int, right: int) -> Tensor:
    """Move an image; zeros come in from the other side."""
    result = torch.zeros_like(image)
    height, width = image.shape[1:]
    for row in range(height):
        for column in range(width):
            if 0 <= row - down < height and 0 <= column - right < width:
                result[:, row, column] = image[:, row - down, column - right]
    return result


def test_flip_mirrors_about_half_of_the_images() -> None:
    out = parse_augment("flip")({"x": X}, ALL, (0,))["x"]
    mirrored = [bool(torch.equal(a, b.flip(2))) for a, b in zip(out, X, strict=True)]
    assert all(m or torch.equal(a, b) for m, a, b in zip(mirrored, out, X, strict=True))
    assert 20 < sum(mirrored) < 44


def test_crop_moves_each_image_and_fills_with_zeros() -> None:
    out = parse_augment("crop:2")({"x": X}, ALL, (0,))["x"]
    moves = []
    for a, b in zip(out, X, strict=True):
        found = [(d, r) for d in range(-2, 3) for r in range(-2, 3) if torch.equal(a, shifted(b, d, r))]
        assert len(found) == 1
        moves += found
    assert len(set(moves)) > 15
    assert out.is_contiguous()


def test_all_images_of_a_sample_change_alike_and_other_inputs_do_not() -> None:
    depth, ids = X[:, :1].to(torch.int32), torch.arange(64)
    given = {"x": X, "depth": depth, "ids": ids}
    out = parse_augment("flip,crop:1")(given, ALL, (3,))
    assert torch.equal(out["x"][:, :1].to(torch.int32), out["depth"])
    assert out["ids"] is ids
    assert given["x"] is X
    assert not torch.equal(out["x"], X)


@given(cuts=st.lists(st.integers(0, 64), max_size=4), key=st.lists(st.integers(0, 2**63), min_size=3, max_size=3))
def test_shares_of_a_batch_change_as_the_whole_does(cuts: list[int], key: list[int]) -> None:
    augment, edges = parse_augment("crop:2,flip"), sorted({0, 64, *cuts})
    whole = augment({"x": X}, ALL, key)["x"]
    parts = [augment({"x": X[a:b]}, Share(64, a, b), key)["x"] for a, b in itertools.pairwise(edges)]
    assert torch.equal(torch.cat(parts), whole)


def test_the_users_function_gets_a_tensor_or_a_dict_and_a_generator() -> None:
    code(
        "import torch\n"
        "def noise(x, generator): return x + torch.rand(len(x), 1, 1, 1, generator=generator)\n"
        "def both(d, generator): return {n: noise(x, generator) for n, x in d.items()}\n"
    )
    one = parse_augment("flip,mine:noise")
    assert one.spec == "flip,mine:noise"
    assert torch.equal(one({"x": X}, ALL, (1,))["x"], one({"x": X}, ALL, (1,))["x"])
    assert not torch.equal(one({"x": X}, ALL, (1,))["x"], one({"x": X}, ALL, (2,))["x"])
    two = parse_augment("mine.py:both")({"a": X, "b": X}, ALL, (1,))
    assert 0 < (two["a"] - X).mean() < 1
    other = parse_augment("mine:noise")({"x": X[32:]}, Share(64, 32, 64), (1,))["x"] - X[32:]
    assert not torch.equal(other, parse_augment("mine:noise")({"x": X[:32]}, Share(64, 0, 32), (1,))["x"] - X[:32])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_nothing_waits_for_the_device() -> None:
    x, augment = X.cuda(), parse_augment("flip,crop:2")
    augment({"x": x}, ALL, (0,))
    torch.cuda.set_sync_debug_mode("error")
    try:
        out = augment({"x": x}, ALL, (0,))["x"]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert out.device == x.device


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "filp",
            r"^--augment: unknown augmentation 'filp'; known are flip, crop:N .* and module:fn\. Did you mean flip\?$",
        ),
        ("flip,crp:4", r"^--augment: unknown augmentation 'crp:4'; known are .*\. Did you mean crop\?$"),
        ("", r"^--augment: unknown augmentation ''; known are .* module:fn\.$"),
        ("flip,", r"^--augment: unknown augmentation ''"),
        ("mixup:", r"^--augment: unknown augmentation 'mixup:'"),
        ("crop", r"^--augment: crop needs a number of pixels, at least 1: crop:4; got 'crop'\.$"),
        ("crop:0", r"^--augment: crop needs a number of pixels, at least 1: crop:4; got 'crop:0'\.$"),
        ("crop:-1", r"^--augment: crop needs .* got 'crop:-1'\.$"),
        ("flip:2", r"^--augment: flip takes no value; got 'flip:2'\.$"),
        ("nowhere:fn", r"^--augment nowhere:fn: there is no module 'nowhere'"),
        ("math:pi", r"^--augment math:pi must be callable, got float\.$"),
    ],
)
def test_wrong_texts(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_augment(text)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("1 / 0", r"^--augment mine:fn: it failed with ZeroDivisionError: division by zero\.$"),
        (
            "x[1:]",
            r"it must return a batch of the same names, .*, x float32 \[64, 2, 5, 4\], got x float32 \[63, 2, 5, 4\]",
        ),
        ("x.double()", r"got x float64 \[64, 2, 5, 4\]\.$"),
        ("None", r"got NoneType\.$"),
    ],
)
def test_wrong_functions(body: str, message: str) -> None:
    code(f"def fn(x, generator): return {body}")
    with pytest.raises(DataError, match=message):
        parse_augment("mine:fn")({"x": X}, ALL, (0,))
    code("def fn(x, generator): return 3", "several")
    with pytest.raises(DataError, match=r"got int\.$"):
        parse_augment("several:fn")({"a": X, "b": X}, ALL, (0,))


@pytest.mark.parametrize(
    ("text", "x", "message"),
    [
        (
            "flip",
            np.zeros((64, 9)),
            r"^--augment flip needs an input of images \[N, C, H, W\], got x float64 \[64, 9\]\.$",
        ),
        ("crop:1", np.zeros((64, 9)), r"^--augment crop needs an input of images"),
        ("crop:4", np.zeros((64, 1, 9, 4)), r"^--augment crop:4 needs images larger than 4 pixels, got 9 x 4\.$"),
    ],
)
def test_inputs_that_do_not_fit(text: str, x: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        parse_augment(text)({"x": torch.from_numpy(x)}, ALL, (0,))
