"""Training batches: the same ones from any start, with any number of workers and processes, and from any source."""

import itertools
import os
import random
import signal
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import numpy.lib.format
import pytest
import torch
from torch import Tensor, nn

from qcompress.data.augment import parse_augment
from qcompress.data.dataset import Dataset
from qcompress.data.reader import DataReader, open_data
from qcompress.data.training import BatchSettings, TrainingBatches
from qcompress.errors import ConfigError, DataError
from qcompress.graph.options import ProgramOptions
from qcompress.graph.program import FloatProgram
from qcompress.graph.tracing import from_module
from tests.helpers.user_module import code

N = 23
X = np.random.default_rng(0).standard_normal((N, 3, 8, 8)).astype(np.float32)
Y = np.arange(N) % 5

Read = list[tuple[dict[str, Tensor], Tensor | None]]


def reader(x: Any = X, y: Any = Y, **options: Any) -> DataReader:
    return Dataset(inputs={"x": x}, labels=y, **options).reader()


def batches(data: DataReader | None = None, *, size: int = 4, augment: str | None = None, **options: Any) -> Any:
    given = {k: options.pop(k) for k in ("program", "classes") if k in options}
    settings = BatchSettings(size=size, **options)
    augmented = None if augment is None else parse_augment(augment)
    return TrainingBatches(data or reader(), settings, augment=augmented, **given)


def assert_same(a: Read, b: Read) -> None:
    assert len(a) == len(b)
    for (x, y), (u, v) in zip(a, b, strict=True):
        assert list(x) == list(u)
        assert all(torch.equal(x[name], u[name]) and x[name].dtype == u[name].dtype for name in x)
        assert (y is None and v is None) or torch.equal(y, v)  # type: ignore[arg-type]


def conv() -> FloatProgram:
    module = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(144, 5))
    return from_module(module, ProgramOptions(inputs={"x": X[:2]}))


# A dataset whose samples are drawn with all three generators that users' code knows.
RANDOM_DATASET = """
import random, torch
class Mine(torch.utils.data.Dataset):
    def __len__(self): return 23
    def __getitem__(self, i):
        x = np.full((3, 8, 8), i, np.float32)
        return x + random.random() + np.random.rand() + float(torch.rand(())), i % 5
def make(): return Mine()
"""


@pytest.fixture(params=["arrays", "transform", "dataset"])
def source(request: pytest.FixtureRequest) -> DataReader:
    """Data without user code, with a transform that draws at random, and a torch Dataset that does."""
    if request.param == "dataset":
        return open_data(f"{code(RANDOM_DATASET)}:make")
    if request.param == "arrays":
        return reader()
    return reader(transform=lambda x: x + np.random.rand() + random.random(), transform_name="t")  # noqa: NPY002


# ---------------------------------------------------------------- the same batches, whatever happens


def test_any_start_gives_the_same_batches(source: DataReader) -> None:
    whole = {epoch: list(batches(source, augment="flip,crop:2", seed=3).epoch(epoch)) for epoch in (0, 1)}
    for epoch, first in itertools.product((0, 1), range(6)):
        again = batches(source, augment="flip,crop:2", seed=3)
        assert_same(list(again.epoch(epoch, first)), whole[epoch][first:])


@pytest.mark.parametrize("workers", [1, 3])
def test_any_number_of_workers_gives_the_same_batches(source: DataReader, workers: int) -> None:
    alone = list(batches(source, augment="flip,crop:2").epoch(1, 1))
    assert_same(list(batches(source, augment="flip,crop:2", workers=workers).epoch(1, 1)), alone)


@pytest.mark.parametrize("world_size", [2, 4])
def test_processes_share_one_global_batch(world_size: int) -> None:
    data = open_data(f"{code(RANDOM_DATASET)}:make")
    whole = list(batches(data, augment="flip,crop:2").epoch(1))
    parts = [
        list(batches(data, augment="flip,crop:2", rank=rank, world_size=world_size).epoch(1))
        for rank in range(world_size)
    ]
    joined = [
        ({"x": torch.cat([x["x"] for x, _ in shares])}, torch.cat([y for _, y in shares]))
        for shares in zip(*parts, strict=True)
    ]
    assert_same(joined, whole)


def test_epochs_and_seeds_have_orders_of_their_own_and_hold_every_sample_once() -> None:
    data = reader(np.arange(N, dtype=np.float32))
    orders = [
        torch.cat([x["x"] for x, _ in batches(data, seed=seed, drop_last=False).epoch(epoch)]).tolist()
        for seed in (0, 1)
        for epoch in (0, 1)
    ]
    assert all(sorted(order) == list(range(N)) for order in orders)
    assert all(a != b for a, b in itertools.combinations(orders, 2))


def test_what_is_drawn_differs_between_steps_epochs_and_seeds() -> None:
    data = reader(np.tile(X[:1], (N, 1, 1, 1)))
    drawn = [
        x["x"].numpy().tobytes()
        for seed in (0, 1)
        for epoch in (0, 1)
        for x, _ in batches(data, augment="flip,crop:3", seed=seed).epoch(epoch)
    ]
    assert len(set(drawn)) == len(drawn)


def test_the_generators_of_the_training_are_left_alone(source: DataReader) -> None:
    def states() -> Any:
        return torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist()  # type: ignore[index]  # noqa: NPY002

    before = states()
    for workers in (0, 2):
        some = batches(source, augment="flip,crop:1", workers=workers, classes=5)
        some.check()
        list(some.epoch(0))
        assert states() == before


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("workers", [0, 2])
def test_on_a_gpu_no_batch_waits_for_the_device(workers: int) -> None:
    some = batches(augment="flip,crop:2", device="cuda", workers=workers)
    expected = list(batches().epoch(1))
    list(some.epoch(0))
    torch.cuda.set_sync_debug_mode("error")
    try:
        read = list(some.epoch(1))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(x["x"].is_cuda and x["x"].shape == e["x"].shape for (x, _), (e, _) in zip(read, expected, strict=True))
    assert all(torch.equal(y.cpu(), e) for (_, y), (_, e) in zip(read, expected, strict=True))


def test_without_shuffling_all_samples_come_in_their_order() -> None:
    some = batches(shuffle=False, drop_last=False)
    read = list(some.epoch(7))
    assert (len(some), len(read), len(read[-1][0]["x"])) == (6, 6, 3)
    np.testing.assert_array_equal(torch.cat([x["x"] for x, _ in read]), X)
    np.testing.assert_array_equal(torch.cat([y for _, y in read]), Y)
    assert len(batches()) == 5


def test_the_fingerprint_tells_what_decides_the_batches() -> None:
    base = {"size": 4, "seed": 0, "augment": "flip"}
    same = batches(**base, workers=3, rank=1, world_size=2).fingerprint
    assert same == batches(**base).fingerprint
    others = [
        batches(**base | {"size": 5}), batches(**base | {"seed": 1}), batches(**base | {"augment": "crop:1"}),
        batches(**base, drop_last=False), batches(**base, shuffle=False), batches(reader(X[1:], Y[1:]), **base),
        batches(reader(X.astype(np.float64)), **base), batches(reader(transform=np.abs, transform_name="abs"), **base),
        batches(reader(X + 1), **base), batches(reader(X, Y[::-1].copy()), **base),
    ]  # fmt: skip
    assert len({same, *(other.fingerprint for other in others)}) == 11


def test_a_worker_that_is_killed_is_one_message() -> None:
    code(
        "import os, signal\nclass Mine:\n    def __len__(self): return 8\n    def __getitem__(self, i):\n"
        "        if i == 5: os.kill(os.getpid(), signal.SIGKILL)\n        return np.zeros(2), i % 2\n"
    )
    some = batches(open_data("mine:Mine"), size=1, workers=1, shuffle=False)
    with pytest.raises(DataError, match=r"^a worker that loads batches ended \(.*\): use fewer workers, or 0\.$"):
        list(some.epoch(0))


def test_workers_leave_interrupts_to_the_training() -> None:
    code(
        "import os, signal\nclass Mine:\n    def __len__(self): return 8\n    def __getitem__(self, i):\n"
        "        os.kill(os.getpid(), signal.SIGINT)\n        return np.zeros(2), i % 2\n"
    )
    assert len(list(batches(open_data("mine:Mine"), workers=2).epoch(0))) == 2


def test_an_error_in_a_worker_is_the_same_message_as_without_workers() -> None:
    code("class Mine:\n    def __len__(self): return 8\n    def __getitem__(self, i): return 1 / (i - 5), i % 2")
    for workers in (0, 2):
        with pytest.raises(DataError, match=r"^--data mine:Mine: reading its samples failed with ZeroDivisionError: "):
            list(batches(open_data("mine:Mine"), workers=workers).epoch(0))


# ---------------------------------------------------------------- sources


def test_every_source_of_the_same_samples_gives_the_same_batches() -> None:
    np.savez("plain.npz", x=X, y=Y, names=np.array(["a"] * N))
    np.savez_compressed("packed.npz", train_x=X, train_y=Y)
    code(
        "import torch\nwith np.load('plain.npz') as file:\n    d = {key: file[key] for key in 'xy'}\n"
        "def pairs(): return [(x, y) for x, y in zip(d['x'], d['y'])]\n"
        "def dicts(): return [{'x': torch.from_numpy(x), 'y': y} for x, y in zip(d['x'], d['y'])]\n"
        "def drawn(): return iter(pairs())\n"
    )
    expected = list(batches(classes=5).epoch(0))
    for spec in ("plain.npz", "packed.npz:train_x,train_y", "mine:pairs", "mine:dicts", "mine:drawn"):
        assert open_data(spec).has_labels
        some = batches(open_data(spec), classes=5)
        some.check()
        assert_same(list(some.epoch(0)), expected)
    np.save("x.npy", X)
    Path("parts").mkdir()
    for number, part in enumerate(np.array_split(X, [1, 9, 10])):
        np.save(f"parts/{number}.npy", part)
    code("def alone(): return list(np.load('x.npy'))", "unlabelled")
    for spec in ("x.npy", "parts", "plain.npz:x", "unlabelled:alone"):
        assert not open_data(spec).has_labels
        some = batches(open_data(spec))
        some.check()
        assert_same(list(some.epoch(0)), [(x, None) for x, _ in expected])


def test_uncompressed_arrays_are_mapped_not_read() -> None:
    np.savez("t.npz", x=X, y=Y)
    inputs, _ = open_data("t.npz").samples.arrays()  # type: ignore[misc]
    base: Any = inputs["x"]
    while isinstance(base, np.ndarray) and not isinstance(base, np.memmap):
        base = base.base
    assert isinstance(base, np.memmap)


def test_a_mapped_array_that_was_damaged_is_one_message() -> None:
    np.savez("t.npz", x=X, y=Y)
    content = bytearray(Path("t.npz").read_bytes())
    content[len(content) // 2] ^= 1
    Path("t.npz").write_bytes(content)
    with pytest.raises(DataError, match=r"member 'x\.npy' do not match their checksum\. Copy or save the file again"):
        open_data("t.npz")


def test_a_zip_that_declares_huge_members_is_refused_before_memory_is_taken() -> None:
    header = b"{'descr': '<f4', 'fortran_order': False, 'shape': (1000000000000,)}\n"
    content = b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + bytes(64)
    for compression in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        with zipfile.ZipFile("t.npz", "w", compression) as z:
            z.writestr("x.npy", content)
        with pytest.raises(DataError, match="asks for 4000000000000 bytes, there are 64"):
            open_data("t.npz")


def test_objects_are_never_unpickled() -> None:
    class Trap:
        def __reduce__(self) -> Any:
            return os.mkdir, ("executed",)

    np.savez("t.npz", x=np.array([Trap()], object), y=np.zeros(1))
    with pytest.raises(DataError, match="Python objects, which are never unpickled"):
        open_data("t.npz")
    assert not Path("executed").exists()
    np.load("t.npz", allow_pickle=True)["x"]  # the trap works
    assert Path("executed").exists()


def test_samples_of_a_dataset_are_read_when_they_are_needed() -> None:
    code(
        "seen = []\nclass Mine:\n    def __len__(self): return 10**9\n"
        "    def __getitem__(self, i):\n        seen.append(i)\n        return np.zeros(2), i % 2\n"
    )
    data = open_data("mine:Mine")
    assert data.example()["x"].shape == (2, 2)
    import mine  # type: ignore[import-not-found]

    assert mine.seen == [0, 1]


class TwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 2)

    def forward(self, image: Tensor, meta: Tensor) -> Tensor:
        return self.fc(image) + meta  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    "x", ["(np.full(4, i, np.float32), np.ones(2))", "{'meta': np.ones(2), 'image': np.full(4, i)}"]
)
def test_several_inputs_by_position_and_by_name(x: str) -> None:
    code(f"def make(): return [({x}, i % 2) for i in range(6)]")
    data = open_data("mine:make", transform=lambda d: {n: np.asarray(v, np.float32) for n, v in d.items()})
    program = from_module(TwoInputs(), ProgramOptions(inputs=data.example()))
    assert program.input_names == ("image", "meta")
    inputs, labels = next(batches(data, program=program, shuffle=False).epoch(0))
    assert {name: (x.dtype, list(x.shape)) for name, x in inputs.items()} == {
        "image": (torch.float32, [4, 4]),
        "meta": (torch.float32, [4, 2]),
    }
    assert inputs["image"][:, 0].tolist() == [0, 1, 2, 3]
    assert labels is not None
    assert labels.tolist() == [0, 1, 0, 1]


def test_inputs_get_the_names_and_dtypes_of_the_model() -> None:
    program = from_module(nn.Linear(2, 2), ProgramOptions(inputs={"x": np.zeros((2, 2), np.float32)}))
    inputs, _ = next(batches(reader(np.ones((N, 2))), program=program).epoch(0))
    assert {name: x.dtype for name, x in inputs.items()} == {"input": torch.float32}


@pytest.mark.parametrize(
    ("labels", "dtype", "shape"),
    [
        (Y.astype(np.uint8), torch.int64, [4]),
        (Y.astype(np.int32)[:, None], torch.int64, [4]),
        (Y > 2, torch.int64, [4]),
        (Y.astype(np.float64), torch.float32, [4]),
        (np.zeros((N, 4, 4), np.int16), torch.int64, [4, 4, 4]),
    ],
)
def test_labels_are_classes_or_floats(labels: Any, dtype: torch.dtype, shape: list[int]) -> None:
    _, y = next(batches(reader(y=labels)).epoch(0))
    assert (y.dtype, list(y.shape)) == (dtype, shape)


def test_probabilities_are_labels_too() -> None:
    some = batches(reader(y=np.full((N, 5), 0.2)), classes=5)
    some.check()
    assert next(some.epoch(0))[1].shape == (4, 5)


# ---------------------------------------------------------------- checks


@pytest.mark.parametrize(
    ("data", "options", "message"),
    [
        (reader(X[:, :, :4]), {}, r"^data: Input input must have shape \[any, 3, 8, 8\], got \[4, 3, 4, 8\]\.$"),
        (reader((X * 9).astype(np.uint8)), {}, r"^data: Input input must be float32, got uint8: convert it, or pass a"),
        (reader(y=Y + 1), {"classes": 5}, r"^data: labels must be from 0 to 4 for the model's 5 outputs, .* 1 to 5\.$"),
        (reader(y=Y - 1), {"classes": 5}, r"^data: labels must be from 0 to 4 .*, got labels from -1 to 3\.$"),
        (reader(y=Y * 0 + 3), {"classes": 5}, r"^data: labels must hold at least two classes, but all 23 are 3: name "),
        (
            reader(y=Y * 0.5),
            {"classes": 5},
            r"^data: labels must be integers from 0 to 4, or .*, got float64 .* \[23\]",
        ),
        (reader(), {"augment": "crop:8"}, r"^--augment crop:8 needs images larger than 8 pixels, got 8 x 8\.$"),
    ],
)
def test_what_cannot_be_trained_on_is_refused_first(data: DataReader, options: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        batches(data, program=conv(), **options).check()


def test_nan_is_refused_first() -> None:
    x = X.copy()
    x[20, 0, 0, 0] = np.nan
    Path("parts").mkdir()
    np.save("parts/a.npy", X)
    np.save("parts/b.npy", x)
    with pytest.raises(DataError, match=r"^--data parts: array 'x' must be finite, but 1 of 23 samples hold NaN"):
        batches(open_data("parts")).check()
    np.savez("t.npz", x=x, y=Y)
    with pytest.raises(DataError, match=r"^--data t\.npz: array 'x' must be finite, but 1 of 23 samples hold NaN"):
        batches(open_data("t.npz")).check()
    code("def make(): return [(np.array([np.nan if i == 7 else 0.0]), i % 2) for i in range(9)]")
    with pytest.raises(DataError, match=r"^--data mine:make: array 'x' must be finite, but 1 of 4 samples hold NaN"):
        list(batches(open_data("mine:make")).epoch(0))


def test_labels_of_a_dataset_are_checked_until_two_classes_were_seen_and_then_batch_by_batch() -> None:
    code(
        "seen = []\ndef at(i, y):\n    seen.append(i)\n    return np.zeros(2), y\n"
        "class Base:\n    def __len__(self): return 40\n"
        "class Sorted(Base):\n    def __getitem__(self, i): return at(i, i // 20)\n"
        "class Single(Base):\n    def __getitem__(self, i): return at(i, 1)\n"
        "class Wrong(Base):\n    def __getitem__(self, i): return at(i, 9 if i == 39 else i // 20)\n"
    )
    batches(open_data("mine:Sorted"), classes=2).check()
    import mine

    assert len(mine.seen) < 15
    with pytest.raises(DataError, match=r"^--data mine:Single: labels must hold .* all 40 are 1: name the key"):
        batches(open_data("mine:Single"), classes=2).check()
    with pytest.raises(DataError, match=r"^--data mine:Wrong: labels must be from 0 to 1 .* from \d to 9\.$"):
        list(batches(open_data("mine:Wrong"), classes=2).epoch(0))


def test_files_that_hold_too_little() -> None:
    np.savez("t.npz", x=X, y=Y[:9])
    with pytest.raises(
        DataError, match=r"^--data t\.npz: all arrays must have the same number of samples, got x 23, y 9"
    ):
        open_data("t.npz")
    np.savez("t.npz", x=X[:0], y=Y[:0])
    with pytest.raises(DataError, match=r"^--data t\.npz: array 'x' must hold at least one sample"):
        open_data("t.npz")
    with pytest.raises(DataError, match=r"^--data t\.npz:x,z: there is no array 'z'; it holds x, y\.$"):
        open_data("t.npz:x,z")
    code("class Mine:\n    def __len__(self): raise KeyError('no')\n    def __getitem__(self, i): return 0")
    with pytest.raises(DataError, match=r"^--data mine:Mine: asking for its length failed with KeyError: 'no'\.$"):
        open_data("mine:Mine")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": 0}, r"^BatchSettings\.size must be at least 1, got 0\.$"),
        ({"workers": -1}, r"^BatchSettings\.workers must be at least 0, got -1\.$"),
        ({"rank": 2, "world_size": 2}, r"^BatchSettings\.rank must be below world_size = 2, got 2\.$"),
        ({"size": 7, "world_size": 2}, r"multiple of the number of processes, 2, got 7: use 6\.$"),
        ({"size": 1, "world_size": 2}, r"multiple of the number of processes, 2, got 1: use 2\.$"),
        ({"size": 24}, r"^A batch needs 24 samples, but data has 23: use a batch size of at most 23\.$"),
        (
            {"size": 22, "world_size": 2, "drop_last": False},
            r"^The last batch of data has 1 samples, too few for 2 processes: use another batch size\.$",
        ),
    ],
)
def test_settings_that_make_no_batches(options: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        batches(**options)


@pytest.mark.parametrize(("epoch", "first"), [(-1, 0), (0, -1), (0, 6)])
def test_steps_that_are_not_there(epoch: int, first: int) -> None:
    with pytest.raises(ConfigError, match=r"^An epoch must be at least 0 and its first step from 0 to 5, got epoch"):
        batches().epoch(epoch, first)
    assert list(batches().epoch(0, 5)) == []


def test_without_fork_there_are_no_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.multiprocessing, "get_all_start_methods", lambda: ["spawn"])
    with pytest.raises(ConfigError, match=r"^Workers need a system that can fork processes: use 0 workers\.$"):
        next(batches(workers=1).epoch(0))


def test_interrupted_epochs_leave_no_workers_behind() -> None:
    before = signal.getsignal(signal.SIGINT)
    epoch = batches(size=1, workers=2).epoch(0)
    next(epoch)
    children = torch.multiprocessing.active_children()
    assert len(children) == 2
    epoch.close()
    for child in children:
        child.join(10)
        assert not child.is_alive()
    assert signal.getsignal(signal.SIGINT) is before
