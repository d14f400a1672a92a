"""Random changes of training batches, on the batch's device: `--augment flip,crop:4` or `module:fn`.

What is drawn depends on a key and on the sample's place in the global batch alone, not on the number of processes that
share the batch. Only `module:fn` sees its own share and no more, so what it draws depends on that number.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final, Protocol, final

import torch
from torch import Tensor
from torch.nn import functional

from qcompress.data.randomness import AUGMENT, seeds_of
from qcompress.data.samples import find_function
from qcompress.errors import ConfigError, DataError, did_you_mean
from qcompress.user_code import one_line

Inputs = dict[str, Tensor]

_KNOWN: Final = "flip, crop:N (pixels) and module:fn"


@final
@dataclass(frozen=True, slots=True)
class Share:
    """The part of a global batch that one process has.

    Args:
        total: samples of the global batch.
        start: the first sample of the part.
        stop: the sample after its last one.
    """

    total: int
    start: int
    stop: int

    @property
    def part(self) -> slice:
        """The part as a slice of the global batch."""
        return slice(self.start, self.stop)


class Augmentation(Protocol):
    """One random change of a batch."""

    def __call__(self, inputs: Inputs, share: Share, generator: torch.Generator) -> Inputs:
        """Return changed inputs of the same names, shapes and dtypes.

        Args:
            inputs: tensors by name; they stay as they are.
            share: which part of the global batch they are.
            generator: of the inputs' device; it is used for this batch only.
        """


@final
@dataclass(frozen=True, slots=True)
class Augment:
    """Several random changes, one after the other; made by `parse_augment`.

    Args:
        spec: the text that describes them, without folders.
        steps: the changes.
    """

    spec: str
    steps: tuple[Augmentation, ...]

    def __call__(self, inputs: Inputs, share: Share, key: Sequence[int]) -> Inputs:
        """Return changed inputs.

        Args:
            inputs: tensors by name; they stay as they are.
            share: which part of the global batch they are.
            key: what the random numbers depend on, for example (seed, epoch, step).

        Raises:
            DataError: an input does not fit a change, or the user's function fails.
        """
        device = next(iter(inputs.values())).device
        for seed, step in zip(seeds_of(len(self.steps), AUGMENT, *key), self.steps, strict=True):
            inputs = step(inputs, share, torch.Generator(device).manual_seed(int(seed)))
        return inputs


def parse_augment(text: str, what: str = "--augment") -> Augment:
    """Return the changes that a text names, separated by commas.

    Args:
        text: a list of

            - `flip`: mirrors each image left to right with probability 1/2;
            - `crop:N`: pads each image with N zeros on every side and crops it back at random, which moves it by up to
              N pixels;
            - `module:fn` or `path/file.py:fn`: is called with the batch (a tensor if there is one input, else a dict by
              name) and a torch.Generator on its device, and returns a batch of the same shapes and dtypes.
        what: the option, for messages.

    Raises:
        ConfigError: a name is unknown, its value is wrong, or the function cannot be found.

    >>> parse_augment("flip, crop:4").spec
    'flip,crop:4'
    """
    parsed = [_parse(word.strip(), what) for word in text.split(",")]
    return Augment(",".join(spec for spec, _ in parsed), tuple(step for _, step in parsed))


def flip(inputs: Inputs, share: Share, generator: torch.Generator) -> Inputs:
    """Mirror each image left to right with probability 1/2; all images of a sample alike."""
    images = _images(inputs, "flip")
    device = next(iter(images.values())).device
    mirrored_N111 = torch.rand(share.total, 1, 1, 1, generator=generator, device=device)[share.part] < 0.5
    return inputs | {name: torch.where(mirrored_N111, x.flip(3), x) for name, x in images.items()}


@final
@dataclass(frozen=True, slots=True)
class Crop:
    """Pads images with zeros and crops them back at random; all images of a sample alike.

    Args:
        pad: pixels on every side.
    """

    pad: int

    def __call__(self, inputs: Inputs, share: Share, generator: torch.Generator) -> Inputs:
        """Return the inputs with moved images."""
        images = _images(inputs, "crop")
        device = next(iter(images.values())).device
        corners_2N = torch.randint(2 * self.pad + 1, (2, share.total), generator=generator, device=device)
        return inputs | {name: _cropped(x, self.pad, corners_2N[:, share.part]) for name, x in images.items()}


@final
@dataclass(frozen=True, slots=True)
class UserAugmentation:
    """The user's own function.

    Args:
        name: its name in messages.
        function: (batch, generator) -> batch.
    """

    name: str
    function: Callable[[Any, torch.Generator], Any]

    def __call__(self, inputs: Inputs, share: Share, generator: torch.Generator) -> Inputs:
        """Return what the function makes of the inputs."""
        if share.start:  # processes must not draw the same numbers for different samples
            generator.manual_seed((generator.initial_seed() + share.start) % (1 << 64))
        single = next(iter(inputs)) if len(inputs) == 1 else None
        try:
            result = self.function(dict(inputs) if single is None else inputs[single], generator)
        except (Exception, SystemExit) as e:
            raise DataError(f"--augment {self.name}: it failed with {one_line(e)}.") from e
        named = {single: result} if single is not None else result
        if not isinstance(named, dict) or _kinds(named) != _kinds(inputs):
            raise DataError(
                f"--augment {self.name}: it must return a batch of the same names, shapes and dtypes as it gets, "
                f"{_kinds(inputs)}, got {_kinds(named) if isinstance(named, dict) else type(named).__name__}."
            )
        return named


def _parse(word: str, what: str) -> tuple[str, Augmentation]:
    name, colon, value = word.partition(":")
    if word == "flip":
        return word, flip
    if name == "crop" and value.isdecimal() and int(value):
        return word, Crop(int(value))
    if name in ("flip", "crop"):
        needed = "flip takes no value" if name == "flip" else "crop needs a number of pixels, at least 1: crop:4"
        raise ConfigError(f"{what}: {needed}; got {word!r}.")
    if not colon or value.isdecimal() or not value:
        near = did_you_mean(name, ("flip", "crop"))
        raise ConfigError(f"{what}: unknown augmentation {word!r}; known are {_KNOWN}.{near}")
    found, function = find_function(word, what)
    return found, UserAugmentation(found, function)


def _images(inputs: Inputs, who: str) -> Inputs:
    images = {name: x for name, x in inputs.items() if x.ndim == 4}
    if not images:
        raise DataError(f"--augment {who} needs an input of images [N, C, H, W], got {_kinds(inputs)}.")
    return images


def _cropped(x: Tensor, pad: int, corners_2N: Tensor) -> Tensor:
    height, width = x.shape[2:]
    if pad >= min(height, width):
        raise DataError(f"--augment crop:{pad} needs images larger than {pad} pixels, got {height} x {width}.")
    padded = functional.pad(x, (pad, pad, pad, pad))
    windows = padded.unfold(2, height, 1).unfold(3, width, 1)  # a view: [N, C, 2·pad + 1, 2·pad + 1, H, W]
    index_N = torch.arange(len(x), device=x.device)
    return windows[index_N, :, corners_2N[0], corners_2N[1]].contiguous()


def _kinds(values: dict[str, Any]) -> str:
    return ", ".join(
        f"{name} {str(v.dtype).removeprefix('torch.')} {list(v.shape)}" if isinstance(v, Tensor) else type(v).__name__
        for name, v in sorted(values.items())
    )
