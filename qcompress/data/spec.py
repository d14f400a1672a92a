"""Opens the arguments of `--data` and `--calibration`: a file, a folder or a factory.

Messages leave out the option and its argument, which `qcompress.data.reader` puts before them.
"""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Final, final

from qcompress.data.arrays import check_layout, check_lengths
from qcompress.data.images import ImageFolder, has_images, scaled
from qcompress.data.npy import MAGIC, ZIP_MAGIC, Npz, map_npy
from qcompress.data.samples import find_function, samples_of, short_name
from qcompress.data.stored import JoinedSamples, Samples, StoredSamples
from qcompress.data.transform import Transform
from qcompress.errors import DataError, did_you_mean
from qcompress.user_code import one_line

FORMS: Final = "FILE.npz, FILE.npz:x_key,y_key, FILE.npy, a folder of .npy files or of images, or module:factory"


@final
@dataclass(frozen=True, slots=True)
class Found:
    """What an argument names.

    Args:
        name: its name without the machine's folders.
        samples: its samples.
        notes: notes for the user.
        transform: what turns raw arrays into the model's inputs if the user gives no transform.
    """

    name: str
    samples: Samples
    notes: tuple[str, ...] = ()
    transform: Transform | None = None


def open_spec(spec: str, what: str) -> Found:
    """Open what an argument names.

    Args:
        spec: the argument; see `load_data`.
        what: the option that it was given to, for messages.

    Raises:
        ConfigError: a factory cannot be found.
        DataError: there is no such file, or it cannot be read as `spec` says.
        DependencyError: it is a folder of images, and Pillow is not installed.
    """
    place, keys = _split(spec)
    if place is None:
        return Found(short_name(spec), _from_factory(spec, what))
    try:
        return _from_path(place, keys)
    except OSError as e:
        raise DataError(f"it cannot be read: {e.strerror or e}.") from None


def _split(spec: str) -> tuple[Path | None, str | None]:
    """Split an argument into path and keys; for `module:factory`, both are None.

    >>> _split("pkg.data:test"), _split("data.py:test")
    ((None, None), (None, None))
    """
    if os.path.exists(spec):
        return Path(spec), None
    place, colon, rest = spec.rpartition(":")
    is_file = place.lower().endswith((".npz", ".npy")) or os.path.isfile(place)
    if colon and is_file and not place.endswith(".py"):
        if not os.path.exists(place):
            raise _no_such_file(place)
        return Path(place), rest
    is_module = all(word.isidentifier() for word in place.split(".")) or place.endswith(".py")
    if colon and rest.isidentifier() and is_module:
        return None, None
    raise _no_such_file(spec)


def _no_such_file(text: str) -> DataError:
    folder = Path(text).parent
    try:
        beside = os.listdir(folder) if text else []
    except (OSError, ValueError):
        beside = []
    return DataError(f"there is no such file. Pass {FORMS}.{did_you_mean(Path(text).name, beside)}")


def _from_path(path: Path, keys: str | None) -> Found:
    name = path.resolve().name
    if path.is_dir():
        return _from_folder(path, name)
    if not path.is_file():
        raise DataError("it must be a regular file, but it is a pipe, a device or a socket: save the data in a file.")
    with path.open("rb") as f:
        magic = f.read(len(MAGIC))
    if magic.startswith(ZIP_MAGIC):
        return _from_npz(Npz(path), keys, name)
    if magic != MAGIC:
        came = f"starts with {magic!r}" if magic else "is empty"
        raise DataError(f"it must be .npz or .npy, but it {came}: save arrays with numpy.savez or numpy.save.")
    if keys is not None:
        raise DataError(f"a .npy holds one array without a name: remove {':' + keys!r}.")
    return Found(name, StoredSamples({"x": map_npy(path, "x")}, None))


def _from_npz(npz: Npz, keys: str | None, name: str) -> Found:
    names, labels, notes = _all_keys(npz) if keys is None else (*_parse_keys(keys), ())
    used = [*names.values(), *([] if labels is None else [labels])]
    headers = {key: npz.header(key) for key in used}
    for key, header in headers.items():
        check_layout(key, header.dtype, header.shape)
    check_lengths({key: header.shape[0] for key, header in headers.items()}, _key_hint(npz.keys))
    arrays = npz.read(used)
    inputs = {name: arrays[key] for name, key in names.items()}
    return Found(name, StoredSamples(inputs, None if labels is None else arrays[labels]), notes)


def _all_keys(npz: Npz) -> tuple[dict[str, str], str | None, tuple[str, ...]]:
    """Input names, the key of the labels, and notes, where no keys are given.

    Each array except `y` becomes the input of the same name. Text arrays cannot be inputs and are skipped, except `x`,
    which is an error.
    """
    keys = npz.keys
    if not {"x", "y"} & set(keys) and _pairs(keys):
        raise DataError(f"it must hold x, or one array per input, got {', '.join(keys)}.{_key_hint(keys)}")
    text = [key for key in keys if key not in ("x", "y") and npz.header(key).dtype.kind in "US"]
    inputs = {key: key for key in keys if key != "y" and key not in text}
    if not inputs:
        raise DataError(f"it must hold x, or one array of numbers per input, got only {', '.join(keys)}.")
    notes = (f"skipped arrays of text: {', '.join(text)}",) if text else ()
    return inputs, "y" if "y" in keys else None, notes


def _parse_keys(text: str) -> tuple[dict[str, str], str | None]:
    """Parse keys into keys by input name, and the key of the labels.

    >>> _parse_keys("test_x,test_y"), _parse_keys("ids=a,mask=b,y=c")
    (({'x': 'test_x'}, 'test_y'), ({'ids': 'a', 'mask': 'b'}, 'c'))
    """
    words = [word.strip() for word in text.split(",")]
    named = [word.partition("=") for word in words]
    if all(words) and not any(equals for _, equals, _ in named) and len(words) <= 2:
        return {"x": words[0]}, words[1] if len(words) == 2 else None
    pairs = {name.strip(): key.strip() for name, _, key in named}
    if not all(name.strip() and equals and key.strip() for name, equals, key in named) or len(pairs) < len(words):
        raise DataError(f"the keys must be x_key, or x_key,y_key, or name=key,…,y=key, got {text!r}.")
    labels = pairs.pop("y", None)
    if not pairs:
        raise DataError(f"the keys must name at least one input beside the labels, got {text!r}.")
    return pairs, labels


def _pairs(keys: list[str]) -> list[str]:
    return [f"{key},{key[:-1]}y" for key in keys if key.endswith("_x") and f"{key[:-1]}y" in keys]


def _key_hint(keys: list[str]) -> str:
    """A sentence that says how to name keys, with pairs of keys that exist.

    >>> _key_hint(["train_x", "train_y", "test_x", "test_y"])
    ' Name the arrays: FILE.npz:train_x,train_y or FILE.npz:test_x,test_y.'
    """
    pairs = [f"FILE.npz:{pair}" for pair in _pairs(keys)[:3]] or ["FILE.npz:x_key,y_key"]
    return f" Name the arrays: {' or '.join(pairs)}."


def _from_folder(folder: Path, name: str) -> Found:
    files = sorted(p for p in folder.iterdir() if p.suffix.lower() == ".npy" and p.is_file())
    others = sum(1 for p in folder.iterdir() if not p.name.startswith(".")) - len(files)
    if not files and has_images(folder):
        images = ImageFolder(folder)
        return Found(name, images, images.notes, scaled)
    if not files:
        raise DataError(
            "the folder must hold .npy files, or images in one sub-folder per class, but it has no such file among its "
            f"{others} entries."
        )
    parts = [map_npy(p, p.name) for p in files]
    for path, part in zip(files, parts, strict=True):
        if (part.shape[1:], part.dtype) != (parts[0].shape[1:], parts[0].dtype):
            raise DataError(
                f"its files must agree in dtype and in all axes but the first: {files[0].name} is {parts[0].dtype} "
                f"{list(parts[0].shape)}, {path.name} is {part.dtype} {list(part.shape)}."
            )
    notes = (f"skipped {others} entries of the folder that are not .npy files",) if others > 0 else ()
    return Found(name, JoinedSamples(parts), notes)


def _from_factory(spec: str, what: str) -> Samples:
    _, factory = find_function(spec, what)
    try:
        returned = factory()
    except (Exception, SystemExit) as e:
        raise DataError(f"calling it without arguments failed with {one_line(e)}.") from e
    return samples_of(returned)
