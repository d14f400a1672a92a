"""Folders of images: one sub-folder per class, or images alone.

Pillow decodes them. Its decoders that run other programs are never called, and an image is refused before it is
decoded if it would take too much memory. Messages leave out the folder, which the caller puts before them.
"""

import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeVar, final

import numpy as np
import numpy.typing as npt

from qcompress.data.arrays import Arrays
from qcompress.data.randomness import Seeds
from qcompress.data.stored import Indices, Labels, Raw
from qcompress.errors import DataError, missing
from qcompress.user_code import one_line

if TYPE_CHECKING:
    import PIL.Image

T = TypeVar("T")

SUFFIXES: Final = (".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
MAX_PIXELS: Final = 1 << 26
_FORMATS: Final = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
# Those whose values are 8 bits or less; of others, Pillow would clip the values.
_MODES: Final = frozenset({"1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr"})


def has_images(folder: Path) -> bool:
    """Return whether a folder or one of its sub-folders has a file with the suffix of an image."""
    return any(_images(place) for place in (folder, *_folders(folder)))


def scaled(images: npt.NDArray[np.uint8] | Sequence[npt.NDArray[np.uint8]]) -> npt.NDArray[np.float32]:
    """Turn images [N, H, W, C] from 0 to 255 into float32 [N, C, H, W] from 0 to 1, as torchvision's ToTensor does.

    Raises:
        DataError: the images have different sizes.

    >>> scaled(np.full((1, 2, 4, 3), 255, np.uint8)).shape
    (1, 3, 2, 4)
    """
    if not isinstance(images, np.ndarray):
        height, width = images[0].shape[:2]
        other = next(image.shape for image in images if image.shape != images[0].shape)
        raise DataError(
            f"all images must have the same size (width x height), got {width} x {height} and {other[1]} x {other[0]}: "
            "pass a --transform that gives them one size."
        )
    return np.ascontiguousarray(images.transpose(0, 3, 1, 2)).astype(np.float32) / np.float32(255)


@final
class ImageFolder:
    """The images of a folder, as uint8 [H, W, 3].

    If it has sub-folders with images, each is a class, and the classes are numbered in the order of their names.
    Otherwise the images of the folder itself have no labels.

    Args:
        folder: its path.

    Raises:
        DataError: a sub-folder has no images.
        DependencyError: Pillow is not installed.
    """

    def __init__(self, folder: Path) -> None:
        try:
            import PIL.Image
        except ImportError:
            raise missing("pillow", "reading a folder of images") from None
        self._open = PIL.Image.open
        self._folder = folder
        folders = _folders(folder)
        found = {place.name: _images(place) for place in folders}
        self.classes = tuple(found) if any(found.values()) else ()
        for name in self.classes:
            if not found[name]:
                raise DataError(
                    f"each sub-folder must hold the images of a class, but {name} has no image "
                    f"({', '.join(SUFFIXES)}): remove it."
                )
        self._files = [file for files in found.values() for file in files] if self.classes else _images(folder)
        counts = [len(found[name]) for name in self.classes]
        self._labels: Labels = np.repeat(np.arange(len(counts)), counts) if self.classes else None
        entries = sum(1 for place in (folder, *folders) for p in place.iterdir() if not p.name.startswith("."))
        others = entries - len(self._files) - len(self.classes)
        self.notes = (f"skipped {others} entries of the folder that are not images",) if others else ()

    def __len__(self) -> int:
        return len(self._files)

    def take(self, indices: Indices, seeds: Seeds | None = None) -> tuple[Raw, Labels]:
        """Return some images, decoded: an array, or a list if their sizes differ; and the numbers of their classes."""
        images = [self._decoded(self._files[i]) for i in indices]
        same = len({image.shape for image in images}) == 1
        return {"x": np.stack(images) if same else images}, None if self._labels is None else self._labels[indices]

    def arrays(self) -> tuple[Arrays, Labels] | None:
        """Return all images, decoded into memory; None if their sizes differ."""
        sizes = {self._with(file, lambda image: image.size) for file in self._files}
        return self.take(np.arange(len(self))) if len(sizes) == 1 else None

    def labels(self) -> Iterator[npt.NDArray[Any]]:
        """Yield the numbers of all classes in one piece."""
        if self._labels is not None:
            yield self._labels

    def check(self) -> None:
        """Refuse nothing: bytes hold no NaN."""

    def _decoded(self, file: Path) -> npt.NDArray[np.uint8]:
        return self._with(file, lambda image: np.asarray(image.convert("RGB")))

    def _with(self, file: Path, use: "Callable[[PIL.Image.Image], T]") -> T:
        """Open an image and return what `use` makes of it."""
        name = file.relative_to(self._folder).as_posix()
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # a limit of Pillow above ours, and oddities of metadata
                with self._open(file, formats=_FORMATS) as image:
                    _check_image(name, image)
                    return use(image)
        except DataError:
            raise
        except (Exception, SystemExit) as e:  # decoders fail in many ways over damaged files
            raise DataError(f"the image {name} cannot be decoded ({one_line(e)}): replace or remove it.") from None


def _check_image(name: str, image: "PIL.Image.Image") -> None:
    if image.width * image.height > MAX_PIXELS:
        raise DataError(
            f"the image {name} is refused: it has {image.width} x {image.height} pixels, but at most {MAX_PIXELS:,} "
            "are decoded. Make it smaller, or remove it."
        )
    if image.mode not in _MODES:
        raise DataError(f"the image {name} must have 8 bits per channel, got mode {image.mode}: convert it.")


def _folders(folder: Path) -> list[Path]:
    return sorted(p for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))


def _images(folder: Path) -> list[Path]:
    return sorted(
        p for p in folder.iterdir() if p.suffix.lower() in SUFFIXES and p.is_file() and not p.name.startswith(".")
    )
