"""The machine that reads pickles without running them: plain values as Python reads them, and bounds for all else."""

import collections
import io
import pickle
import struct
import tracemalloc
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from qcompress.errors import SourceError, UnsafeFileError
from qcompress.graph.options import ProgramOptions
from qcompress.openers import load_source
from qcompress.sources.pickles import machine
from qcompress.sources.pickles.machine import OPCODES, Unpickled, unpickle
from qcompress.sources.pickles.standins import Name, StandIn
from tests.helpers.examples import examples

OPTIONS = ProgramOptions(inputs={"x": np.zeros((2, 3), np.float32)})
PLAIN = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text()
KEYS = PLAIN | st.tuples(PLAIN, PLAIN)


def read(pickled: bytes) -> Unpickled:
    return unpickle(io.BytesIO(pickled), "model.pt")


def values(leaves: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.recursive(leaves, lambda inner: st.lists(inner) | st.tuples(inner, inner) | st.dictionaries(KEYS, inner))


@given(values(PLAIN | st.sets(PLAIN)), st.integers(0, 5))
def test_plain_values_are_read_as_python_reads_them(value, protocol):
    found = read(pickle.dumps(value, protocol))
    assert found.value == value
    assert not found.stand_ins


@given(values(PLAIN | st.binary() | st.frozensets(PLAIN)), st.integers(4, 5))
def test_values_of_later_protocols(value, protocol):
    assert read(pickle.dumps(value, protocol)).value == value


@pytest.mark.parametrize(
    ("pickled", "value"),
    [
        (b"S'it\\'s'\n.", "it's"),
        (b'S"a\\x41\\n"\n.', "aA\n"),
        (b"U\x02\xc3\xa4.", "ä"),
        (b"U\x01\xe4.", "\\xe4"),
        (b"T\x02\x00\x00\x00ab.", "ab"),
        (b"I01\n.", True),
        (b"I-7\n.", -7),
        (b"L12345678901234567890L\n.", 12345678901234567890),
        (b"(I1\nI2\nd.", {1: 2}),
        (b"(I1\nl.", [1]),
        (b"I1\n2\x86.", (1, 1)),
        (b"I1\n(I2\n1.", 1),
        (b"I1\nI2\n0.", 1),
        (b"I1\np0\n0g0\n.", 1),
    ],
)
def test_what_old_python_wrote(pickled, value):
    found = read(pickled).value
    assert (type(found), found) == (type(value), value)


def test_classes_and_calls_become_stand_ins():
    found = read(pickle.dumps({"net": nn.ReLU(), "size": torch.Size([2, 3])}, 2))
    named = ["torch.nn.modules.activation.ReLU", "builtins.set", "collections.OrderedDict", "torch.Size"]
    assert [str(n) for n in found.names] == named
    assert [(str(s.made_by), s.args) for s in found.stand_ins] == [
        ("torch.nn.modules.activation.ReLU", ()), ("torch.Size", ((2, 3),)),
    ]  # fmt: skip
    assert found.value["net"].fields()["training"] is True
    ordered = read(pickle.dumps(collections.OrderedDict([("b", 1), ("a", 2)]), 2)).value
    assert type(ordered) is collections.OrderedDict
    assert list(ordered) == ["b", "a"]


@pytest.mark.parametrize("opcode", ["R", "\x81", "i", "o", "\x92"])
def test_every_way_to_call_makes_a_stand_in(opcode):
    pickled = {
        "R": b"cos\nsystem\n(S'x'\ntR.",
        "\x81": b"cos\nsystem\n(S'x'\nt\x81.",
        "i": b"(S'x'\nios\nsystem\n.",
        "o": b"(cos\nsystem\nS'x'\no.",
        "\x92": b"cos\nsystem\n(S'x'\nt}\x92.",
    }[opcode]
    (made,) = read(pickled).stand_ins
    assert made.made_by == Name("os", "system")
    assert made.args[0] == "x"


def test_the_opcodes_are_a_list_of_names():
    """An opcode that a newer Python adds must be looked at before it is allowed."""
    known = {name for name, value in vars(pickle).items() if isinstance(value, bytes) and len(value) == 1}
    refused = {"EXT1", "EXT2", "EXT4", "BYTEARRAY8", "NEXT_BUFFER", "READONLY_BUFFER", "PERSID"}
    assert set(OPCODES) == known - refused - {"STOP"}
    for name in refused:
        with pytest.raises(SourceError, match=rf"^model\.pt is refused: its pickle uses opcode {name}, which no torch"):
            read(getattr(pickle, name) + bytes(8) + b".")
    with pytest.raises(SourceError, match=r"its pickle uses opcode b'\\xff', which no torch file needs\.$"):
        read(b"\xff")


@pytest.mark.parametrize("opcode", ["BINUNICODE", "BINBYTES", "BINUNICODE8", "BINBYTES8", "BINSTRING", "LONG4"])
def test_claimed_lengths_are_not_believed(opcode):
    wide = opcode.endswith("8")
    for length in (1 << 27, *((1 << 40, (1 << 64) - 1) if wide else ((1 << 31) - 1,))):
        tracemalloc.start()
        try:
            with pytest.raises(SourceError, match=r"damaged: .* ends too early|claims to have over 268435456 bytes"):
                read(getattr(pickle, opcode) + struct.pack("<Q" if wide else "<I", length) + b"x" * 100)
            assert tracemalloc.get_traced_memory()[1] < 1 << 20
        finally:
            tracemalloc.stop()


@pytest.mark.parametrize("opcode", ["BINSTRING", "LONG4"])
def test_negative_lengths(opcode):
    with pytest.raises(SourceError, match=r"^model\.pt is damaged: its pickle cannot be read \(ValueError: a"):
        read(getattr(pickle, opcode) + struct.pack("<i", -1) + b"x" * 100)


def nested(depth):
    """A list of 2^depth elements, should anyone print it."""
    value = [1]
    for _ in range(depth):
        value = [value, value]
    return value


COPIES = {
    "set": b"cbuiltins\nset\nq\x02",
    "OrderedDict": b"ccollections\nOrderedDict\nq\x02",
}


@pytest.mark.parametrize("called", COPIES)
def test_a_list_that_is_copied_again_and_again(called, monkeypatch):
    """A pickle of 300 kB could otherwise make 20,000 sets of 20,000 elements."""
    monkeypatch.setattr(machine, "MAX_STEPS", 1 << 19)
    elements = b"".join(b"(K\x00M" + struct.pack("<H", i) + b"t" for i in range(20_000))
    pickled = b"\x80\x02]q\x00(" + elements + b"e\x85q\x01" + COPIES[called] + b"](" + b"h\x02h\x01R" * 20_000 + b"e."
    with pytest.raises(SourceError, match=r"^model\.pt is refused: its pickle takes over \d+ steps to read\.$"):
        read(pickled)


def test_a_pickle_of_small_objects_without_end(monkeypatch):
    monkeypatch.setattr(machine, "MAX_STEPS", 1000)
    with pytest.raises(SourceError, match=r"its pickle takes over 1000 steps to read"):
        read(pickle.EMPTY_SET * 1001 + b".")
    read(pickle.EMPTY_SET * 1000 + b".")


@pytest.mark.parametrize("shape", ["1 << 63", "10 ** 5000", "-(1 << 70)", "True", "None"])
def test_sizes_that_no_tensor_can_have(shape, tmp_path):
    class Huge:
        def __reduce__(self):
            storage = torch.zeros(1).untyped_storage()
            return torch._utils._rebuild_tensor_v2, (storage, 0, (eval(shape),), (1,), False, None)

    torch.save({"w": Huge()}, tmp_path / "model.pt")
    with pytest.raises(SourceError, match=r"is damaged: a size of a tensor in it is not a 64-bit integer\.$"):
        load_source(tmp_path / "model.pt")


def test_tensors_of_very_many_axes(tmp_path):
    class Long:
        def __reduce__(self):
            storage = torch.zeros(1).untyped_storage()
            return torch._utils._rebuild_tensor_v2, (storage, 0, (1,) * 33, (1,) * 33, False, None)

    torch.save({"w": Long()}, tmp_path / "model.pt")
    with pytest.raises(SourceError, match=r"is damaged: a tensor in it has over 32 axes\.$"):
        load_source(tmp_path / "model.pt")


def test_conjugate_views(tmp_path):
    torch.save({"w": torch.ones(2, dtype=torch.complex64).conj()}, tmp_path / "model.pt")
    with pytest.raises(SourceError, match="a conjugate view of a tensor is not readable; save it resolved"):
        load_source(tmp_path / "model.pt")


class Call:
    """Pickled as a call of a function with arguments of the file's choice."""

    def __init__(self, function: Any, *args: Any) -> None:
        self.call = function, args

    def __reduce__(self) -> Any:
        return self.call


@pytest.mark.parametrize(
    "size", [1_600_000_000, pytest.param(10**5000, id="huge"), [1, 2], pytest.param(nested(60), id="nested"), "abc", -1]
)
def test_bytearrays_that_are_not_in_the_file(tmp_path, size):
    torch.save({"w": torch.ones(2), "x": Call(bytearray, size)}, tmp_path / "model.pt")
    with pytest.raises(
        UnsafeFileError, match=r"is refused: its pickle asks for a bytearray made of .* None of its code was run"
    ):
        load_source(tmp_path / "model.pt")


@pytest.mark.parametrize("protocol", [2, 3, 4])
def test_bytearrays_that_are_in_the_file(tmp_path, protocol):
    torch.save({"w": torch.ones(2), "x": bytearray(b"\0\xffab")}, tmp_path / "model.pt", pickle_protocol=protocol)
    assert [t.name for t in load_source(tmp_path / "model.pt").tensors()] == ["w"]


@pytest.mark.parametrize(
    ("function", "args", "shown"),
    [
        (nn.Linear, (60000, 60000), r"torch\.nn\.modules\.linear\.Linear with the arguments 60000, 60000,"),
        (nn.Linear, (1, 1, True, None), r"torch\.nn\.modules\.linear\.Linear with the arguments 1, 1, True, …,"),
        (torch.Tensor, (100000, 100000), r"torch\.Tensor with the arguments 100000, 100000,"),
        (torch.Size, (3,), r"torch\.Size with the arguments 3,"),
        (
            nn.Linear,
            (nested(60), 10**5000),
            r".*\.Linear with the arguments an object of type list, a very large integer,",
        ),
    ],
)
def test_calls_with_arguments_of_the_files_choice(tmp_path, function, args, shown):
    """torch's restricted unpickler would make these objects, of whatever size."""
    net = nn.Sequential(nn.Linear(3, 2))
    net.extra = Call(function, *args)
    torch.save(net, tmp_path / "model.pt")
    source = load_source(tmp_path / "model.pt")
    assert [t.name for t in source.tensors()] == ["0.weight", "0.bias"]
    with pytest.raises(
        UnsafeFileError, match=rf"is refused: its pickle calls {shown} which torch\.save does not write"
    ):
        source.program(OPTIONS)


def test_attributes_that_modules_carry(tmp_path):
    net = nn.Sequential(nn.Linear(3, 2))
    net.shape, net.device, net.data = torch.Size([1, 2]), torch.device("cpu"), bytearray(b"abc")
    net.counter, net.dtype, net.activation = collections.Counter("ab"), torch.float16, nn.functional.relu
    torch.save(net, tmp_path / "model.pt")
    module = load_source(tmp_path / "model.pt").module()
    assert (module.shape, module.data, module.counter) == (net.shape, net.data, net.counter)


@pytest.mark.parametrize("legacy", [False, True])
def test_tensors_beside_the_module_are_checked_before_torch_reads_them(tmp_path, legacy):
    """torch takes memory for a view of any size."""

    class Outside:
        def __reduce__(self):
            storage = torch.zeros(1)._typed_storage()
            return torch._utils._rebuild_tensor_v2, (storage, 0, (1 << 30,), (1,), False, collections.OrderedDict())

    net = nn.Sequential(nn.Linear(3, 2))
    torch.save({"model": net, "beside": [Outside()]}, tmp_path / "model.pt", _use_new_zipfile_serialization=not legacy)
    source = load_source(tmp_path / "model.pt")
    with pytest.raises(SourceError, match=r"a tensor is damaged: shape \[1073741824\] .* bytes, but its data has 4"):
        source.program(OPTIONS)


def test_storages_shorter_than_they_claim(tmp_path):
    """torch would read beyond the end of the file's data."""
    path = tmp_path / "model.pt"
    torch.save(nn.Sequential(nn.Linear(3, 2)), path)
    data = path.read_bytes()
    count = b"K\x06tq"  # of the weight's storage
    assert data.count(count) == 1
    path.write_bytes(data.replace(count, b"K\xfftq"))
    import zipfile

    with zipfile.ZipFile(path) as old, zipfile.ZipFile(tmp_path / "new.pt", "w") as new:  # with right checksums
        for info in old.infolist():
            old_member = old.open(info)
            old_member._expected_crc = None
            new.writestr(info.filename, old_member.read())
    with pytest.raises(SourceError, match=r"is damaged: storage '0' has 24 bytes, fewer than it claims\.$"):
        load_source(tmp_path / "new.pt").program(OPTIONS)


@given(st.lists(st.sampled_from(sorted(getattr(pickle, n) for n in OPCODES)) | st.binary(max_size=6), max_size=40))
@examples(400)
def test_any_bytes_are_read_or_refused(pieces):
    try:
        found = read(b"".join(pieces) + b".")
    except SourceError as e:
        assert str(e).startswith("model.pt")  # noqa: PT017
    else:
        assert isinstance(found.value, StandIn | object)


@given(st.data(), st.integers(0, 5))
@examples(200)
def test_any_damage_to_a_pickle_is_one_message_or_none(data, protocol):
    content = bytearray(pickle.dumps({"a": [1, 2.5, "x" * 300, (None, True)], "net": nn.ReLU(), "s": {1, 2}}, protocol))
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    try:
        read(bytes(content))
    except SourceError as e:
        assert str(e).startswith("model.pt")  # noqa: PT017
