"""Data files in every form, and every message that a wrong one gets."""

import contextlib
import io
import os
import pickle
import re
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.lib.format
import pytest
import torch
from hypothesis import HealthCheck, given
from hypothesis import strategies as st

from qcompress import zip_archive
from qcompress.data import npy as _npy
from qcompress.data.dataset import Dataset, as_dataset, load_data
from qcompress.errors import ConfigError, DataError
from tests.helpers.examples import examples
from tests.helpers.user_module import code

X = np.arange(24, dtype=np.float32).reshape(6, 4)
Y = np.arange(6)


def npy_bytes(header: str, payload: bytes = b"", magic: bytes = b"\x93NUMPY\x01\x00") -> bytes:
    text = header.encode("latin-1") + b"\n"
    return magic + len(text).to_bytes(2, "little") + text + payload


# ---------------------------------------------------------------- what it reads


def test_npz_with_x_and_y() -> None:
    np.savez("test.npz", x=X, y=Y)
    data = load_data("test.npz")
    assert (data.name, data.samples, data.notes) == ("test.npz", 6, ())
    np.testing.assert_array_equal(data.inputs["x"], X)
    np.testing.assert_array_equal(data.labels, Y)


def test_the_name_holds_no_folder(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    np.savez("deep/test.npz", x=X)
    assert load_data(str(tmp_path / "deep" / "test.npz")).name == "test.npz"
    np.save("deep/a.npy", X)
    assert load_data(str(tmp_path / "deep")).name == "deep"
    code("def f():\n    return [np.zeros(2)]", "deep/own")
    assert load_data(str(tmp_path / "deep" / "own.py:f")).name == "own.py:f"


def test_npz_with_one_array_per_input() -> None:
    np.savez_compressed("test.npz", ids=Y, mask=Y > 2, y=Y)
    assert list(load_data("test.npz").inputs) == ["ids", "mask"]


def test_text_beside_x_is_left_out_and_noted() -> None:
    np.savez("test.npz", x=X, y=Y, names=np.array(list("abcdef")))
    data = load_data("test.npz")
    assert list(data.inputs) == ["x"]
    assert data.notes == ("skipped arrays of text: names",)


@pytest.mark.parametrize(
    ("keys", "inputs", "labels"),
    [
        ("test_x,test_y", {"x": X}, Y),
        ("test_x", {"x": X}, None),
        ("image=test_x", {"image": X}, None),
        ("ids=test_y, image=test_x, y=test_y", {"ids": Y, "image": X}, Y),
    ],
)
def test_keys_of_an_npz(keys: str, inputs: dict[str, Any], labels: Any) -> None:
    np.savez("all.npz", train_x=X[:2], train_y=Y[:2], test_x=X, test_y=Y)
    data = load_data(f"all.npz:{keys}")
    assert list(data.inputs) == list(inputs)
    for name, values in inputs.items():
        np.testing.assert_array_equal(data.inputs[name], values)
    assert (data.labels is None) == (labels is None)


def test_a_colon_in_the_folder_is_no_key() -> None:
    Path("a:b").mkdir()
    np.savez("a:b/test.npz", x=X, other=X)
    assert list(load_data("a:b/test.npz:other").inputs) == ["x"]
    assert list(load_data("a:b/test.npz").inputs) == ["x", "other"]


def test_the_kind_is_decided_by_content() -> None:
    with open("data.bin", "wb") as f:
        np.savez(f, x=X, y=Y)
    with open("other.npz", "wb") as f:
        np.save(f, X)
    assert load_data("data.bin:x").labels is None
    assert load_data("other.npz").samples == 6


def test_npy_is_mapped_not_read() -> None:
    np.save("x.npy", X)
    values = load_data("x.npy").inputs["x"]
    assert isinstance(values.base, np.memmap) or isinstance(getattr(values.base, "base", None), np.memmap)
    np.testing.assert_array_equal(values, X)


def test_a_folder_of_npy_in_sorted_order() -> None:
    Path("cal").mkdir()
    np.save("cal/b.npy", X[4:])
    np.save("cal/a.npy", X[:4])
    Path("cal/readme.txt").write_text("")
    data = load_data("cal", what="--calibration")
    np.testing.assert_array_equal(data.inputs["x"], X)
    assert data.notes == ("skipped 1 entries of the folder that are not .npy files",)


@given(
    dtype=st.sampled_from(["<f4", ">f4", "<f2", "<f8", "<i8", ">i2", "|u1", "|b1"]),
    shape=st.lists(st.integers(1, 4), min_size=1, max_size=3),
    fortran=st.booleans(),
    compressed=st.booleans(),
)
@examples(60, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_every_layout_reads_as_numpy_reads_it(dtype: str, shape: list[int], fortran: bool, compressed: bool) -> None:
    values = np.arange(np.prod(shape)).reshape(shape).astype(dtype, order="F" if fortran else "C")
    (np.savez_compressed if compressed else np.savez)("t.npz", x=values)
    np.save("t.npy", values)
    for spec in ("t.npz", "t.npy"):
        read = load_data(spec).inputs["x"]
        np.testing.assert_array_equal(read, values)
        assert read.dtype == values.dtype.newbyteorder("=")


@pytest.mark.parametrize("version", [(1, 0), (2, 0), (3, 0)])
def test_every_version_of_npy(version: tuple[int, int]) -> None:
    with open("x.npy", "wb") as f:
        numpy.lib.format.write_array(f, X, version=version)
    np.testing.assert_array_equal(load_data("x.npy").inputs["x"], X)


@pytest.mark.parametrize(
    ("returned", "labels"),
    [
        ("[(np.full(3, i), i) for i in range(4)]", True),
        ("[(np.full(3, i),) for i in range(4)]", False),
        ("[np.full(3, i) for i in range(4)]", False),
        ("(np.full(3, i) for i in range(4))", False),
        ("np.arange(4)[:, None] * np.ones(3, int)", False),
        ("[{'x': np.full(3, i), 'y': i} for i in range(4)]", True),
        ("[({'x': np.full(3, i)}, i) for i in range(4)]", True),
        ("[([i, i, i], i) for i in range(4)]", True),
    ],
)
def test_a_factory(returned: str, labels: bool) -> None:
    data = load_data(f"{code(f'def make(): return {returned}')}:make")
    np.testing.assert_array_equal(data.inputs["x"], np.arange(4)[:, None] * np.ones(3))
    assert (data.labels is not None) == labels
    assert data.name == "mine:make"


def test_a_torch_dataset() -> None:
    code(
        "import torch\n"
        "def make():\n"
        "    return torch.utils.data.TensorDataset(torch.ones(5, 3, requires_grad=True), torch.arange(5))\n"
        "def loader():\n"
        "    return torch.utils.data.DataLoader(make())\n"
    )
    data = load_data("mine.py:make")
    assert data.inputs["x"].shape == (5, 3)
    assert data.inputs["x"].dtype == np.float32
    assert data.labels is not None
    assert data.labels.tolist() == [0, 1, 2, 3, 4]
    with pytest.raises(DataError, match="got DataLoader, which returns batches: return its dataset"):
        load_data("mine.py:loader")


# ---------------------------------------------------------------- what one does with it

TWICE = """
def twice(a):
    a *= 2
    return a
"""


@given(size=st.integers(1, 9), n=st.integers(1, 7))
def test_batches_hold_every_sample_once(size: int, n: int) -> None:
    data = Dataset(inputs={"a": X[:n], "b": Y[:n]}, labels=Y[:n])
    batches = list(data.batches(size))
    np.testing.assert_array_equal(np.concatenate([b.inputs["a"] for b in batches]), X[:n])
    np.testing.assert_array_equal(np.concatenate([b.labels for b in batches if b.labels is not None]), Y[:n])
    assert all(len(b) == size for b in batches[:-1])


def test_batches_are_copies_and_the_arrays_read_only() -> None:
    data = Dataset(inputs={"x": X.copy()})
    next(data.batches(2)).inputs["x"][:] = -1
    np.testing.assert_array_equal(data.inputs["x"], X)
    with pytest.raises(ValueError, match="read-only"):
        data.inputs["x"][:] = 0


def test_transform_gets_the_array_and_its_result_is_x() -> None:
    np.savez("t.npz", image=X, y=Y)
    data = load_data("t.npz", transform=f"{code(TWICE)}:twice")
    for _ in range(2):  # in place, and yet the raw array stays
        assert [b.inputs["x"].tolist() for b in data.batches(4)] == [(2 * X[:4]).tolist(), (2 * X[4:]).tolist()]
    assert data.transform_name == "mine:twice"


def test_transform_gets_a_dict_where_there_are_several_and_may_return_one() -> None:
    def swap(raw: dict[str, Any]) -> dict[str, Any]:
        return {"ids": raw["b"], "mask": raw["a"] > 3}

    batch = next(Dataset(inputs={"a": X, "b": Y}, transform=swap).batches(3))
    assert batch.inputs["ids"].tolist() == [0, 1, 2]
    assert batch.inputs["mask"].dtype.kind == "b"


def test_transform_may_return_tensors() -> None:
    import torch

    data = Dataset(inputs={"x": X}, transform=lambda x: torch.from_numpy(x).bfloat16().requires_grad_())
    assert next(data.batches(6)).inputs["x"].dtype == np.float32


def test_head_and_example() -> None:
    data = Dataset(inputs={"x": X}, labels=Y, name="n", transform=lambda x: x + 1, transform_name="t")
    head = data.head(2)
    assert (head.samples, head.name, head.transform_name) == (2, "n", "t")
    assert data.head(9) is data
    np.testing.assert_array_equal(data.example()["x"], X[:2] + 1)
    np.testing.assert_array_equal(data.head(1).example()["x"], X[[0, 0]] + 1)


def test_the_digest_tells_everything_apart() -> None:
    def digest(**given: Any) -> str:
        return Dataset(**{"inputs": {"x": X}, "labels": Y, **given}).digest

    same = {digest(), digest(name="other"), digest(inputs={"x": np.asfortranarray(X)}), digest(notes=("n",))}
    others = {
        digest(labels=None),
        digest(labels=Y[::-1]),
        digest(labels=Y.astype(np.int32)),
        digest(inputs={"image": X}),
        digest(inputs={"x": X.reshape(6, 2, 2)}),
        digest(inputs={"x": X + 1}),
        digest(inputs={"x": X.view(np.int32)}),
        digest(inputs={"x": X, "z": X}),
        digest(transform=abs, transform_name="abs"),
    }
    assert len(same) == 1
    assert len(others | same) == 10
    assert len(digest()) == 11


def test_the_digest_is_that_of_the_data_not_of_the_file() -> None:
    np.savez("a.npz", x=X, y=Y)
    np.savez_compressed("b.npz", p=X.astype(">f4"), q=Y)
    np.save("c.npy", X)
    assert load_data("a.npz").digest == load_data("b.npz:p,q").digest
    assert load_data("a.npz:x").digest == load_data("c.npy").digest


@pytest.mark.parametrize("block", [1, 5, 1000])
def test_blocks_change_nothing(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = Dataset(inputs={"x": X}).digest
    monkeypatch.setattr("qcompress.data.arrays._BLOCK", block)
    assert Dataset(inputs={"x": X}).digest == whole
    with pytest.raises(DataError, match="2 of 6 samples hold NaN"):
        Dataset(inputs={"x": np.where((np.arange(6) % 4 == 1)[:, None], np.nan, X)})


# ---------------------------------------------------------------- what it refuses


def write(name: str, **arrays: Any) -> Callable[[], None]:
    return lambda: np.savez(name, **arrays)


def put(name: str, content: bytes) -> Callable[[], None]:
    return lambda: (Path(name).write_bytes(content), None)[1]


OBJECTS = np.array([{"a": 1}, None], object)
FORMS = re.escape(
    "Pass FILE.npz, FILE.npz:x_key,y_key, FILE.npy, a folder of .npy files or of images, or module:factory."
)
NO_FILE = f"there is no such file. {FORMS}"


@pytest.mark.parametrize(
    ("make", "spec", "message"),
    [
        (write("test.npz", x=X), "tset.npz", rf"^--data tset\.npz: {NO_FILE} Did you mean test\.npz\?$"),
        (write("test.npz", x=X), "tset.npz:x", rf"^--data tset\.npz:x: {NO_FILE} Did you mean test\.npz\?$"),
        (None, "", rf"^--data : {NO_FILE}$"),
        (None, "C:\\data\\x.npz", NO_FILE),
        (None, "C:/data/x.npz:a,b", NO_FILE),
        (None, "folder/set:x", NO_FILE),
        (None, "x.npy:a", NO_FILE),
        (None, "a" * 5000, NO_FILE),
        (None, "a\0b", NO_FILE),
        (
            put("t.npz", b"PK\x05\x06" + 18 * b"\0"),
            "t.npz",
            "must hold arrays, as numpy.savez writes them, got nothing",
        ),
        (write("t.npz", y=Y), "t.npz", r"it must hold x, or one array of numbers per input, got only y\.$"),
        (write("t.npz", x=X, y=Y), "t.npz:x,z", r"there is no array 'z'; it holds x, y\.$"),
        (write("t.npz", test_x=X), "t.npz:tset_x", r"no array 'tset_x'; it holds test_x\. Did you mean test_x\?$"),
        (write("t.npz", x=X), "t.npz:", r"the keys must be x_key, or x_key,y_key, or name=key,…,y=key, got ''\.$"),
        (write("t.npz", x=X), "t.npz:x,y,z", "the keys must be .* got 'x,y,z'"),
        (write("t.npz", x=X), "t.npz:a=x,a=x", "the keys must be .* got 'a=x,a=x'"),
        (write("t.npz", x=X), "t.npz:y=x", "must name at least one input beside the labels, got 'y=x'"),
        (write("t.npz", x=X, y=Y[:4]), "t.npz", r"same number of samples, got x 6, y 4\. Name"),
        (
            write("t.npz", train_x=X, train_y=Y, test_x=X[:2], test_y=Y[:2]),
            "t.npz",
            r"must hold x, or one array per input, got train_x, train_y, test_x, test_y\. Name the arrays: "
            r"FILE\.npz:train_x,train_y or FILE\.npz:test_x,test_y\.$",
        ),
        (write("t.npz", x=X[:0], y=Y[:0]), "t.npz", r"hold at least one sample, got shape \[0, 4\]\.$"),
        (write("t.npz", x=X[:, :0]), "t.npz", r"array 'x' must not be empty, got shape \[6, 0\]\.$"),
        (write("t.npz", x=np.float32(1)), "t.npz", "must have the samples along its first axis, got a single number"),
        (write("t.npz", x=np.array(["a"])), "t.npz", r"must hold numbers \(bool, .*\), got <U1: convert it\.$"),
        (write("t.npz", x=X, y=np.array(list("abcdef"))), "t.npz", "array 'y' must hold numbers .* got <U1"),
        (write("t.npz", x=X + 1j), "t.npz", "array 'x' must hold numbers .* got complex64"),
        (write("t.npz", x=np.zeros(2, "i4,i4")), "t.npz", "array 'x' must hold numbers"),
        (write("t.npz", x=OBJECTS), "t.npz", "'x' must hold numbers, but it holds Python objects, which are never"),
        (write("t.npz", x=X, z=OBJECTS), "t.npz", "array 'z' must hold numbers, but it holds Python objects"),
        (
            write("t.npz", x=np.where(X == 5, np.nan, X)),
            "t.npz",
            "'x' must be finite, but 1 of 6 samples hold NaN",
        ),
        (
            write("t.npz", x=X, y=X[:, 0] / 0.5 + np.inf),
            "t.npz",
            "'y' must be finite, but 6 of 6 samples hold NaN",
        ),
        (lambda: np.save("t.npy", OBJECTS, allow_pickle=True), "t.npy", "Python objects, which are never unpickled"),
        (lambda: np.save("t.npy", X), "t.npy:a", r"a \.npy holds one array without a name: remove ':a'\.$"),
        (
            put("t.npz", b"x,y\n1,2\n"),
            "t.npz",
            r"must be \.npz or \.npy, but it starts with b'x,y\\n1,': save",
        ),
        (put("t.npz", b""), "t.npz", r"it must be \.npz or \.npy, but it is empty"),
        (
            lambda: Path("d").mkdir(),
            "d",
            r"must hold \.npy files, or images in one sub-folder per class, but .* no such file among its 0 entries\.$",
        ),
        (lambda: os.mkfifo("pipe"), "pipe", "it must be a regular file, but it is a pipe, a device or a socket"),
    ],
)
def test_refused(make: Callable[[], None] | None, spec: str, message: str) -> None:
    if make is not None:
        make()
    with pytest.raises(DataError, match=message):
        load_data(spec)


def test_the_flag_is_named() -> None:
    with pytest.raises(DataError, match=r"^--calibration none\.npy: there is no such file"):
        load_data("none.npy", what="--calibration")


def test_files_of_a_folder_must_agree() -> None:
    Path("cal").mkdir()
    np.save("cal/a.npy", X)
    np.save("cal/b.npy", X.astype(np.float64))
    message = r"agree in dtype and in all axes but the first: a\.npy is float32 \[6, 4\], b\.npy is float64 \[6, 4\]\.$"
    with pytest.raises(DataError, match=message):
        load_data("cal")
    np.save("cal/b.npy", X[:, :3])
    with pytest.raises(DataError, match=r"b\.npy is float32 \[6, 3\]\.$"):
        load_data("cal")


class Exploit:
    def __reduce__(self) -> Any:
        return os.mkdir, ("executed",)


def test_no_pickle_is_ever_read() -> None:
    payload = pickle.dumps(np.array([Exploit()], object))
    objects = npy_bytes("{'descr': '|O', 'fortran_order': False, 'shape': (1,), }", payload)
    Path("a.npy").write_bytes(objects)
    with zipfile.ZipFile("a.npz", "w") as z:
        z.writestr("x.npy", objects)
        z.writestr("data.pkl", payload)
    Path("raw.npz").write_bytes(payload)
    for spec in ("a.npy", "a.npz", "a.npz:x", "raw.npz"):
        with pytest.raises(DataError):
            load_data(spec)
    assert not Path("executed").exists()
    pickle.loads(payload)  # the trap works
    assert Path("executed").exists()


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_any_truncation_is_one_message(save: Callable[..., None]) -> None:
    save("whole.npz", x=X, y=Y)
    content = Path("whole.npz").read_bytes()
    for end in range(0, len(content), 7):
        Path("t.npz").write_bytes(content[:end])
        with pytest.raises(DataError, match=r"^--data t\.npz: "):
            load_data("t.npz")


def test_any_truncated_npy_is_one_message() -> None:
    np.save("whole.npy", X)
    content = Path("whole.npy").read_bytes()
    for end in range(len(content)):
        Path("t.npy").write_bytes(content[:end])
        with pytest.raises(DataError, match=r"^--data t\.npy: "):
            load_data("t.npy")
    Path("t.npy").write_bytes(content + b"more")
    with pytest.raises(DataError, match=r"float32 of shape \[6, 4\], asks for 96 bytes, there are 100\. Copy or save"):
        load_data("t.npy")


@given(st.data())
@examples(100, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_damage_is_one_message_or_none(data: st.DataObject) -> None:
    buffer = io.BytesIO()
    (np.savez if data.draw(st.booleans()) else np.savez_compressed)(buffer, x=X, y=Y)
    content = bytearray(buffer.getvalue())
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    Path("t.npz").write_bytes(content)
    with contextlib.suppress(DataError):
        load_data("t.npz")


@pytest.mark.parametrize(
    "header",
    [
        "{'descr': '<f4', 'fortran_order': False}",
        "{'descr': '<f4', 'fortran_order': 1, 'shape': (1,)}",
        "{'descr': '<f4', 'fortran_order': False, 'shape': (-1,)}",
        "{'descr': '<f4', 'fortran_order': False, 'shape': (True,)}",
        "{'descr': '<f4', 'fortran_order': False, 'shape': [1]}",
        "{'descr': 'nonsense', 'fortran_order': False, 'shape': (1,)}",
        "__import__('os').mkdir('executed')",
        "[" * 5000,
        "1",
        "",
        "'\\d'",
    ],
)
def test_a_damaged_header(header: str) -> None:
    Path("t.npy").write_bytes(npy_bytes(header, bytes(4)))
    with pytest.raises(DataError, match="array 'x' is damaged: its header cannot be read"):
        load_data("t.npy")
    assert not Path("executed").exists()


def test_a_member_that_is_no_npy() -> None:
    with zipfile.ZipFile("t.npz", "w") as z:
        z.writestr("x.npy", b"hello, world")
    with pytest.raises(DataError, match=r"array 'x' is not in numpy's \.npy format"):
        load_data("t.npz")
    with zipfile.ZipFile("t.npz", "w") as z:
        z.writestr("x.txt", b"hello, world")
    with pytest.raises(DataError, match=r"got 1 members, but no \.npy among them"):
        load_data("t.npz")


@pytest.mark.parametrize("shape", ["(10**15,)", "(1000000000000000,)", f"({10**30},)"])
def test_claimed_sizes_are_not_believed(shape: str) -> None:
    content = npy_bytes(f"{{'descr': '<f4', 'fortran_order': False, 'shape': {shape}}}", bytes(4))
    Path("t.npy").write_bytes(content)
    with zipfile.ZipFile("t.npz", "w") as z:
        z.writestr("x.npy", content)
    for spec in ("t.npy", "t.npz"):
        with pytest.raises(DataError, match=r"array 'x' is (truncated or )?damaged: its header"):
            load_data(spec)


def test_a_bomb_is_not_unpacked(monkeypatch: pytest.MonkeyPatch) -> None:
    np.savez_compressed("t.npz", x=np.zeros((1000, 1000), np.float32))
    assert load_data("t.npz").samples == 1000  # small enough: what packs well is no bomb
    monkeypatch.setattr(_npy, "FREE_BYTES", 1 << 20)
    message = r"member 'x\.npy' would grow \d+ times when unpacked, to 4000128 bytes; if that is meant, save it without"
    with pytest.raises(DataError, match=message):
        load_data("t.npz")


def test_odd_archives() -> None:
    np.save("x.npy", X)
    with zipfile.ZipFile("t.npz", "w") as z:
        z.write("x.npy")
        with pytest.warns(UserWarning, match="Duplicate"):
            z.write("x.npy")
    with pytest.raises(DataError, match=r"the archive is refused: it holds the member 'x\.npy' twice"):
        load_data("t.npz")
    with zipfile.ZipFile("t.npz", "w", zipfile.ZIP_LZMA) as z:
        z.write("x.npy")
    with pytest.raises(DataError, match=r"the archive is refused: its member 'x\.npy' is neither stored nor deflated"):
        load_data("t.npz")


def test_too_many_members(monkeypatch: pytest.MonkeyPatch) -> None:
    np.savez("t.npz", x=X, y=Y)
    monkeypatch.setattr(_npy, "MAX_ARRAYS", 1)
    with pytest.raises(DataError, match="it has 2 arrays, but at most 1 are read"):
        load_data("t.npz")
    monkeypatch.setattr(zip_archive, "MAX_MEMBERS", 1)
    with pytest.raises(DataError, match="it has 2 members, but at most 1 are read"):
        load_data("t.npz")


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("raise KeyError('gone')", r"^--data mine:make: calling it without arguments failed with KeyError: 'gone'\.$"),
        ("return []", "at least one sample is needed, but the sequence is empty"),
        ("return 5", r"a torch Dataset or a sequence of samples, each \(x, y\) or x alone, got int\.$"),
        ("return {'x': 1}", "must return a torch Dataset or a sequence of samples, .*, got dict"),
        (
            "return [(1, 2, 3)]",
            "sample 0: a sample must be a pair .* got a tuple of 3: use a dict, or .* for several inputs",
        ),
        ("return [(np.zeros(2), 0), (np.zeros(3), 0)]", r"x is float64 \[2\] in sample 0, float64 \[3\] in sample 1"),
        ("return [(np.zeros(2), 0), np.zeros(2)]", "sample 0 has x, y, sample 1 has x"),
        ("return [({'y': 1}, 0)]", "the label 'y' is both in the pair and in its dict"),
        ("return [(np.zeros(2), 'cat')]", "array 'y' must hold numbers .* got <U3"),
        ("return [object()]", "array 'x' must hold numbers"),
        ("return [[[1], [1, 2]]]", "sample 0: an array or a tensor is needed, got list .ValueError"),
        ("return (1 / 0 for _ in range(3))", "reading its samples failed with ZeroDivisionError"),
        ("return [{'y': 1}]", "at least one input array is needed, but there are none"),
    ],
)
def test_a_factory_that_fails(body: str, message: str) -> None:
    code(f"def make():\n    {body}")
    with pytest.raises(DataError, match=message):
        load_data("mine:make")


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("nowhere:make", r"^--data nowhere:make: there is no module 'nowhere'"),
        ("nowhere.py:make", r"^--data nowhere\.py:make: there is no file nowhere\.py"),
        ("mine:mkae", r"^--data mine:mkae: mine has no 'mkae'\. Did you mean make\?"),
        ("mine:thing", r"^--data mine:thing must be callable, got int\.$"),
    ],
)
def test_a_factory_that_is_not_there(spec: str, message: str) -> None:
    code("thing = 3\ndef make():\n    return []")
    with pytest.raises(ConfigError, match=message):
        load_data(spec)


def test_a_transform_that_is_not_there() -> None:
    np.savez("t.npz", x=X)
    with pytest.raises(ConfigError, match=r"^--transform nowhere:f: there is no module 'nowhere'"):
        load_data("t.npz", transform="nowhere:f")


def _fail(x: Any) -> Any:
    raise RuntimeError("two\nlines")


@pytest.mark.parametrize(
    ("transform", "message"),
    [
        (
            _fail,
            r"^--transform t, samples 0 to 3: it failed with RuntimeError: two lines\. It was called with float32",
        ),
        (lambda x: x[:-1], r"must return all 4 samples, got 3 in x\.$"),
        (lambda x: {"a": x, "b": x[:1]}, r"must return all 4 samples, got 1 in b\.$"),
        (lambda x: x * np.nan, "array 'x' must be finite, but 4 of 4 samples"),
        (lambda x: None, r"an array, a tensor, or a dict of them by input name, got NoneType\.$"),
        (lambda x: (x, x), r"by input name, got tuple\.$"),
        (lambda x: {}, r"by input name, got dict\.$"),
        (lambda x: x.astype(str), "array 'x' must hold numbers"),
        (lambda x: np.float32(3), "array 'x' must have the samples along its first axis"),
    ],
)
def test_a_transform_that_fails(transform: Any, message: str) -> None:
    data = Dataset(inputs={"x": X}, transform=transform, transform_name="t")
    with pytest.raises(DataError, match=message):
        next(data.batches(4))


def test_a_transform_of_several_is_told_what_it_was_given() -> None:
    data = Dataset(inputs={"x": X, "index": Y}, transform=lambda x: x.astype(int), transform_name="t")
    with pytest.raises(DataError, match=r"failed with AttributeError: .* It was called with a dict of x, index\.$"):
        data.example()


def test_sizes_below_one() -> None:
    data = Dataset(inputs={"x": X})
    with pytest.raises(ConfigError, match=r"^The batch size must be at least 1, got 0\.$"):
        data.batches(0)
    with pytest.raises(ConfigError, match=r"^The number of samples must be at least 1, got -1\.$"):
        data.head(-1)


def test_a_function_names_itself() -> None:
    np.savez("t.npz", x=X)
    assert load_data("t.npz", transform=np.square).transform_name.endswith("square")
    assert load_data("t.npz", transform=_fail).transform_name.endswith(":_fail")


def test_as_dataset_takes_what_python_has_at_hand():
    x, y = np.arange(12, dtype=np.float32).reshape(6, 2), np.arange(6)
    loader = torch.utils.data.DataLoader(
        torch.utils.data.TensorDataset(torch.from_numpy(x), torch.from_numpy(y)), batch_size=4
    )
    for data in (loader, {"x": x, "y": y}, [(x[:4], y[:4]), (x[4:], y[4:])], [{"x": x, "y": y}]):
        dataset = as_dataset(data)
        np.testing.assert_array_equal(dataset.inputs["x"], x)
        np.testing.assert_array_equal(dataset.labels, y)
    assert as_dataset(dataset) is dataset
    assert as_dataset([torch.from_numpy(x)]).labels is None


@pytest.mark.parametrize(
    ("data", "match"),
    [
        (3, r"^data must be a Dataset, arrays by name or batches, got int\.$"),
        ([], r"^at least one batch is needed, but there are none\.$"),
        ([np.zeros((1, 2)), (np.zeros((1, 2)), [1])], r"batch 0 has x, batch 1 has x, y\.$"),
        ([np.zeros((1, 2)), np.zeros((1, 3))], r"^the batches cannot be joined: "),
    ],
)
def test_as_dataset_refuses(data, match):
    with pytest.raises(DataError, match=match):
        as_dataset(data)
