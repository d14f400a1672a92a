"""Folders of images, good and hostile."""

import os
import struct
import subprocess
import sys
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("PIL", reason="an optional dependency")
from PIL import Image

from qcompress.data import images
from qcompress.data.dataset import load_data
from qcompress.data.reader import open_data
from qcompress.data.training import BatchSettings, TrainingBatches
from qcompress.errors import DataError, DependencyError

PIXELS = np.random.default_rng(0).integers(0, 256, (5, 6, 4, 3), np.uint8)


def save(path: str, pixels: Any = PIXELS[0], **options: Any) -> None:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, **options)


@pytest.fixture
def photos() -> str:
    """Two classes; among the files are some that are no images."""
    for number, name in enumerate(("dog/b.png", "cat/z.BMP", "cat/a.png", "dog/a.ppm", "cat/m.tiff")):
        save(f"photos/{name}", PIXELS[number])
    Path("photos/readme.txt").write_text("")
    Path("photos/cat/.hidden.png").write_text("")
    Path("photos/.git").mkdir()
    return "photos"


def test_sub_folders_are_classes_in_the_order_of_their_names(photos: str) -> None:
    data = load_data(photos)
    np.testing.assert_array_equal(data.inputs["x"], PIXELS[[2, 4, 1, 3, 0]])
    assert data.labels is not None
    assert data.labels.tolist() == [0, 0, 0, 1, 1]
    assert data.notes == ("skipped 1 entries of the folder that are not images",)
    assert (data.name, data.transform_name) == ("photos", "")
    assert data.digest == load_data(photos).digest


def test_without_a_transform_the_model_gets_floats_from_0_to_1(photos: str) -> None:
    expected = PIXELS[[2, 4]].transpose(0, 3, 1, 2).astype(np.float32) / np.float32(255)
    for example in (load_data(photos).example(), open_data(photos).example()):
        np.testing.assert_array_equal(example["x"], expected)
        assert example["x"].dtype == np.float32


def test_a_transform_gets_the_bytes(photos: str) -> None:
    data = open_data(photos, transform=lambda x: x[:, 1:3].astype(np.float16))
    np.testing.assert_array_equal(data.example()["x"], PIXELS[[2, 4], 1:3])


def test_images_without_sub_folders_have_no_labels() -> None:
    save("some/b.png", PIXELS[1])
    save("some/a.png", PIXELS[0])
    Path("some/empty").mkdir()
    data = load_data("some", what="--calibration")
    np.testing.assert_array_equal(data.inputs["x"], PIXELS[:2])
    assert data.labels is None


@pytest.mark.parametrize("workers", [0, 2])
def test_training_batches_of_images(photos: str, workers: int) -> None:
    some = TrainingBatches(open_data(photos), BatchSettings(size=2, workers=workers, seed=5), classes=2)
    some.check()
    arrays = load_data(photos)
    stored = TrainingBatches(arrays.reader(), BatchSettings(size=2, seed=5), classes=2)
    for (x, y), (u, v) in zip(some.epoch(3), stored.epoch(3), strict=True):
        assert x["x"].equal(u["x"])
        assert y is not None
        assert y.equal(v)


def test_every_kind_of_8_bits_becomes_rgb() -> None:
    grey = PIXELS[0, :, :, 0]
    save("some/1.png", grey)
    Image.fromarray(grey).convert("P").save("some/2.gif")
    Image.fromarray(PIXELS[0]).convert("RGBA").save("some/3.webp", lossless=True)
    Image.fromarray(PIXELS[0]).convert("CMYK").save("some/4.jpg")
    assert load_data("some").inputs["x"].shape == (4, 6, 4, 3)
    np.testing.assert_array_equal(load_data("some").inputs["x"][0], np.repeat(grey[:, :, None], 3, 2))
    np.testing.assert_array_equal(load_data("some").inputs["x"][2], PIXELS[0])


# ---------------------------------------------------------------- sizes


def same_size(pictures: Any) -> Any:
    """Works on an array and on a list alike, as a user's transform should."""
    return np.stack([picture[:4, :4].transpose(2, 0, 1) / np.float32(255) for picture in pictures])


def test_a_transform_can_make_sizes_equal() -> None:
    save("some/a/1.png")
    save("some/b/2.png", PIXELS[1, :5])
    save("some/b/3.png", PIXELS[2])
    data = load_data("some", transform=same_size)
    lazy = open_data("some", transform=same_size).read(np.arange(3))
    np.testing.assert_array_equal(next(data.batches(3)).inputs["x"], lazy.inputs["x"])
    np.testing.assert_array_equal(lazy.inputs["x"], same_size([PIXELS[0], PIXELS[1], PIXELS[2]]))
    assert data.labels is not None
    assert data.labels.tolist() == [0, 1, 1]
    assert data.transform_name.endswith("same_size")


def test_mixed_sizes_are_refused_without_one() -> None:
    save("some/a/1.png")
    save("some/b/2.png", PIXELS[1, :5])
    message = (
        r"^--data some: all images must have the same size \(width x height\), got 4 x 6 and 4 x 5: pass a --trans"
    )
    for read in (load_data, lambda spec: open_data(spec).read(np.arange(2))):
        with pytest.raises(DataError, match=message):
            read("some")  # type: ignore[operator]
    message = (
        r"--transform .*: it failed with AttributeError: .* with a list of 2 arrays of different shapes, the first"
    )
    with pytest.raises(DataError, match=message):
        load_data("some", transform=lambda x: x.astype(np.float32))


# ---------------------------------------------------------------- what is refused


def png_that_claims(width: int, height: int) -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(bytes(100))) + chunk(b"IEND", b"")


@pytest.mark.parametrize("sides", [(9000, 9000), (12000, 12000), (60000, 60000)])
def test_decompression_bombs_are_refused_before_they_are_decoded(sides: tuple[int, int]) -> None:
    Path("some").mkdir()
    Path("some/1.png").write_bytes(png_that_claims(*sides))
    message = (
        r"^--data some: the image 1\.png (is refused: it has \d+ x \d+ pixels, but at most 67,108,864|cannot be dec)"
    )
    with pytest.raises(DataError, match=message):
        load_data("some")


def test_the_limit_of_pixels(monkeypatch: pytest.MonkeyPatch) -> None:
    save("some/1.png")
    monkeypatch.setattr(images, "MAX_PIXELS", 6 * 4)
    assert load_data("some").samples == 1
    monkeypatch.setattr(images, "MAX_PIXELS", 6 * 4 - 1)
    with pytest.raises(
        DataError, match=r"1\.png is refused: it has 4 x 6 pixels, but at most 23 are decoded\. Make it"
    ):
        load_data("some")


def test_no_decoder_that_runs_programs_is_called() -> None:
    Path("some").mkdir()
    Path("some/1.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n")
    with pytest.raises(DataError, match=r"^--data some: the image 1\.png cannot be decoded \(UnidentifiedImageError: "):
        load_data("some")


@pytest.mark.parametrize("name", ["1.png", "1.jpg", "1.gif", "1.bmp", "1.tiff", "1.webp", "1.ppm"])
def test_any_truncation_is_one_message_or_none(name: str) -> None:
    save(f"some/{name}")
    content = Path("some", name).read_bytes()
    refused = 0
    for end in range(0, len(content), max(1, len(content) // 40)):
        Path("some", name).write_bytes(content[:end])
        try:
            load_data("some")
        except DataError as e:
            assert str(e).startswith(f"--data some: the image {name} cannot be decoded (")  # noqa: PT017
            refused += 1
    assert refused > 20


def test_values_above_8_bits_are_not_clipped() -> None:
    save("some/1.png", np.full((4, 4), 1000, np.uint16))
    with pytest.raises(DataError, match=r"the image 1\.png must have 8 bits per channel, got mode I;16: convert it\.$"):
        load_data("some")


def test_pipes_and_links_to_nowhere_are_no_images() -> None:
    save("some/1.png")
    os.mkfifo("some/2.png")
    os.symlink("nowhere.png", "some/3.png")
    data = load_data("some")
    assert (data.samples, data.notes) == (1, ("skipped 2 entries of the folder that are not images",))


def test_a_class_without_images_is_refused(photos: str) -> None:
    Path(photos, "bird").mkdir()
    with pytest.raises(
        DataError, match=r"^--data photos: each sub-folder must hold the images of a class, but bird has"
    ):
        load_data(photos)


def test_without_pillow_the_pip_line_is_said(photos: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "PIL", None)
    message = r"^reading a folder of images needs the package pillow, .*: pip install 'qcompress\[images\]'$"
    with pytest.raises(DependencyError, match=message) as caught:
        load_data(photos)
    assert caught.value.exit_code == 2


def test_arrays_are_read_without_pillow() -> None:
    np.save("x.npy", np.zeros((2, 2)))
    script = "import sys; sys.modules['PIL'] = None; from qcompress import load_data; print(load_data('x.npy').samples)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, env={
        "PYTHONPATH": ":".join(p for p in sys.path if p)
    })  # fmt: skip
    assert done.stdout == "2\n"
