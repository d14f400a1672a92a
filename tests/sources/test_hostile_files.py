"""Nothing that a file carries is run. Each attack was first seen to work on torch.load or torch.export.load itself."""

import collections
import contextlib
import io
import json
import pickle
import random
import struct
import warnings
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from qcompress.errors import SourceError, UnsafeFileError
from qcompress.graph.options import ProgramOptions
from qcompress.openers import load_source
from qcompress.sources.base import SourceOptions
from qcompress.sources.pt2.archive import load_exported

TRAPS = ["system", "exec", "eval", "open", "torch", "mkdir"]
OPTIONS = ProgramOptions(inputs={"x": np.zeros((2, 3, 8, 8), np.float32)})


def touch(sprung: Path) -> str:
    """A Python expression that creates the file."""
    return f"__import__('pathlib').Path({str(sprung)!r}).touch()"


def save(value, path: Path, *, legacy: bool = False) -> Path:
    torch.save(value, path, _use_new_zipfile_serialization=not legacy)
    return path


def refused(path: Path, match: str, error: type[Exception] = UnsafeFileError) -> None:
    """Opening, listing or building the program raises; nothing else happens."""
    with pytest.raises(error, match=match):
        load_source(path).program(OPTIONS)


def test_the_traps_work(traps, sprung):
    """Else the tests below would prove nothing."""
    for trap in traps.values():
        sprung.unlink() if sprung.is_file() else sprung.rmdir() if sprung.is_dir() else None
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # an open file is dropped
            pickle.loads(pickle.dumps(trap))
        assert sprung.exists()


@pytest.mark.parametrize("trap", TRAPS)
@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_plain_pickle(traps, sprung, tmp_path, trap, protocol):
    path = tmp_path / "model.pt"
    path.write_bytes(pickle.dumps(traps[trap], protocol))
    refused(path, r"is a plain Python pickle that names (posix|nt|builtins|io|_io|__builtin__|torch)")
    assert not sprung.exists()


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("trap", TRAPS)
def test_checkpoint_of_a_trap(traps, sprung, tmp_path, trap, legacy):
    path = save(traps[trap], tmp_path / "model.pt", legacy=legacy)
    refused(path, r"no tensor found in .*model\.pt: .* was not run.*Its pickle names .*; none of its code was run\.$")
    assert not sprung.exists()


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("trap", TRAPS)
def test_trap_beside_a_module(traps, sprung, tmp_path, trap, legacy):
    net = torch.nn.Sequential(torch.nn.Linear(3, 2))
    net.extra = traps[trap]
    path = save(net, tmp_path / "model.pt", legacy=legacy)
    source = load_source(path)
    assert [t.name for t in source.tensors()] == ["0.weight", "0.bias"]
    refused(path, r"needs code which is not part of torch\.nn: .*None of its code was run\. Ways out: ")
    assert not sprung.exists()


@pytest.mark.parametrize("trap", TRAPS)
def test_trap_beside_a_state_dict(traps, sprung, tmp_path, trap, small):
    """Its tensors are read, the trap is read past, and the program that --arch builds gets the tensors alone."""
    path = save({"state_dict": small.state_dict(), "optimizer": traps[trap]}, tmp_path / "model.pt")
    assert len(list(load_source(path).tensors())) == 12
    refused(path, "a state dict holds no program", SourceError)
    assert not sprung.exists()


def test_trust_pickle_runs_it(traps, sprung, tmp_path):
    path = tmp_path / "model.pt"
    path.write_bytes(pickle.dumps(traps["system"]))
    with pytest.raises(SourceError, match=r"^a model must be a path, a torch\.nn\.Module, .*, got int\.$"):
        load_source(path, options=SourceOptions(trust_pickle=True))
    assert sprung.exists()


@pytest.mark.parametrize(
    "name",
    ["torch.nn.modules.module functools", "torch.nn.modules.container OrderedDict", "torch.nn.modules.utils repeat",
     "torch.nn.modules.module Module.__class__", "torch.nn.modules.antigravity Module", "torch.nn Linear"],
)  # fmt: skip
def test_a_name_that_torch_nn_only_passes_on_is_foreign(tmp_path, name):
    net = torch.nn.Sequential(torch.nn.Linear(3, 2))
    path = save(net, tmp_path / "model.pt")
    module, attribute = name.split()
    with zipfile.ZipFile(path) as old:
        members = {i.filename: old.read(i) for i in old.infolist()}
    with zipfile.ZipFile(path, "w") as new:
        for member, data in members.items():
            old_name, new_name = b"ctorch.nn.modules.linear\nLinear\n", f"c{module}\n{attribute}\n".encode()
            new.writestr(member, data.replace(old_name, new_name))
    refused(path, rf"not part of torch\.nn: {module}\.{attribute}\.")


@pytest.mark.parametrize("trap", TRAPS)
def test_sample_inputs(traps, sprung, tmp_path, trap, pt2):
    buffer = io.BytesIO()
    torch.save(((torch.zeros(2, 3, 8, 8), traps[trap]), {}), buffer)
    path = pt2.with_members({"data/sample_inputs/model.pt": buffer.getvalue()}).save(tmp_path, "model.pt")
    assert len(list(load_source(path).tensors())) == 13
    refused(path, r"its sample inputs are a pickle of more than tensors and plain values")
    assert not sprung.exists()


@pytest.mark.parametrize("which", ["weights", "constants"])
def test_pickled_payload(traps, sprung, tmp_path, which, pt2):
    buffer = io.BytesIO()
    torch.save(traps["system"], buffer)
    member = "weight_0" if which == "weights" else "tensor_0"

    def pickled(config):
        next(iter(config["config"].values()))["use_pickle"] = True

    changed = pt2.with_members({f"data/{which}/{member}": buffer.getvalue()})
    path = changed.with_json(pickled, f"data/{which}/model_{which}_config.json").save(tmp_path)
    refused(path, rf"among its {which} is a pickle or a custom object \('{member}'\)")
    assert not sprung.exists()


@pytest.mark.parametrize("member", ["custom_obj_0", "opaque_obj_0"])
def test_custom_objects(traps, sprung, tmp_path, member, pt2):
    path = pt2.with_members({f"data/constants/{member}": pickle.dumps(traps["system"])}).save(tmp_path)
    refused(path, rf"holds a custom object \(data/constants/{member}\)")

    def custom(config):
        next(iter(config["config"].values()))["path_name"] = member

    path = pt2.with_json(custom, "data/constants/model_constants_config.json").save(tmp_path)
    refused(path, r"is a pickle or a custom object")
    assert not sprung.exists()


@pytest.mark.parametrize("which", ["weights", "constants"])
def test_payload_as_older_torch_wrote_it(traps, sprung, tmp_path, which, pt2):
    buffer = io.BytesIO()
    torch.save(traps["system"], buffer)
    path = pt2.with_members({f"data/{which}/model.pt": buffer.getvalue()}).save(tmp_path)
    refused(path, rf"data/{which}/model\.pt is a pickle as older torch wrote it")
    assert not sprung.exists()


@pytest.mark.parametrize("member", ["data/aotinductor/model/net.so", "data/weights/net.so"])
def test_compiled_code(tmp_path, member, pt2):
    refused(pt2.with_members({member: b"\x7fELF"}).save(tmp_path), r"holds compiled code \(data/")


@pytest.mark.parametrize("member", ["models/other.json", "notes.txt", "data/weights/evil.pkl"])
def test_unknown_members(tmp_path, member, pt2):
    path = pt2.with_members({member: b"{}"}).save(tmp_path)
    refused(path, r"which torch\.export\.save does not write for a float model")


def symbol_of(pt2) -> str:
    nodes = json.loads(pt2.member("models/model.json"))["graph_module"]["graph"]["tensor_values"]
    return nodes["x"]["sizes"][0]["as_expr"]["expr_str"]


def test_size_that_sympy_would_evaluate(sprung, tmp_path, pt2):
    path = pt2.with_text(symbol_of(pt2), touch(sprung)).save(tmp_path)
    refused(path, r"its graph holds the size \"__import__")
    assert not sprung.exists()


def test_name_of_a_range_that_sympy_might_evaluate(sprung, tmp_path, pt2):
    def rename(program):
        program["range_constraints"][touch(sprung)] = {"min_val": 0, "max_val": 9}

    refused(pt2.with_json(rename).save(tmp_path), r"its graph holds the size \"__import__")
    assert not sprung.exists()


def test_name_that_becomes_source_code(sprung, tmp_path, pt2):
    def rename(program):
        tensors = program["graph_module"]["graph"]["tensor_values"]
        tensors[f"y={touch(sprung)}"] = tensors.pop("conv2d")

    refused(pt2.with_json(rename).save(tmp_path), r"its graph holds the name \"y=__import__")
    refused(pt2.with_text("conv2d", f"y={touch(sprung)}").save(tmp_path), r"its graph holds the name \"y=__import__")
    refused(pt2.with_text("conv2d", "lambda").save(tmp_path), r"its graph holds the name 'lambda'")
    assert not sprung.exists()


def test_qualified_name_that_leaves_its_quotes(sprung, tmp_path, pt2):
    path = pt2.with_text("fc.bias", f'a", {touch(sprung)}) or getattr(self, "b').save(tmp_path)
    refused(path, r"its graph holds the name 'a\", __import__|its graph holds the name .a")
    assert not sprung.exists()


@pytest.mark.parametrize(
    "target",
    ["torch.os.system", "torch.ops.load_library", "torch.ops.aten.save.default", "torch.ops.aten.from_file.default",
     "torch.ops.debugprims.load_tensor.default", "_operator.attrgetter", "torch.hub.load", "#ext:op", "builtins.eval",
     "torch.ops.aten.__class__.default", "torch.ops.higher_order.triton_kernel_wrapper_mutation"],
)  # fmt: skip
def test_target_that_is_no_operator(tmp_path, target, pt2):
    path = pt2.with_text("torch.ops.aten.relu.default", target).save(tmp_path)
    refused(path, rf"its graph holds a call of '{target}'")


def test_guards_are_not_executed(sprung, tmp_path, pt2):
    """torch would exec them in `.module()`; they are left out, the program is still right."""

    def guard(program):
        program["guards_code"] = [f"{touch(sprung)} or True"]

    path = pt2.with_json(guard).save(tmp_path)
    source = load_source(path)
    exported = source.exported_program()
    exported.module()(torch.zeros(3, 3, 8, 8))
    source.program(OPTIONS)
    assert not sprung.exists()


class Named(torch.nn.Module):
    """Takes a constant and a dict."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = torch.nn.Linear(2, 2)

    def forward(self, x, table, name="abc"):
        return self.fc(x) + table["key"]


@pytest.fixture
def named_pt2(pt2):
    x = torch.ones(2, 2)
    exported = torch.export.export(Named().eval(), (x, {"key": x}), {"name": "abc"})
    buffer = io.BytesIO()
    torch.export.save(exported, buffer)
    return type(pt2)(buffer.getvalue())


def sprung_by_torch(path: Path, table: dict[str, torch.Tensor], name: str) -> None:
    """Whether an attack works: torch writes guards from the file's strings, and runs them."""
    with contextlib.suppress(Exception), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.export.load(path).module()(torch.ones(2, 2), table, name=name)


def test_constant_that_leaves_its_quotes(sprung, tmp_path, named_pt2):
    text = f"' or {touch(sprung)} or '"
    path = named_pt2.with_text("abc", text).save(tmp_path)
    sprung_by_torch(path, {"key": torch.ones(2, 2)}, text)
    assert sprung.exists()
    sprung.unlink()
    with pytest.raises(UnsafeFileError, match=r"its graph holds the constant \"' or __import__"):
        load_exported(path).module()
    assert not sprung.exists()
    assert load_exported(named_pt2.save(tmp_path)).module() is not None


def test_key_of_sample_inputs_that_leaves_its_quotes(sprung, tmp_path, named_pt2):
    key, x = f"+str({touch(sprung)})+", torch.ones(2, 2)
    buffer = io.BytesIO()
    torch.save(((x, {key: x}), {"name": "abc"}), buffer)
    path = named_pt2.with_members({"data/sample_inputs/model.pt": buffer.getvalue()}).save(tmp_path)
    sprung_by_torch(path, {"key": x}, "abc")
    assert sprung.exists()
    sprung.unlink()
    with pytest.raises(UnsafeFileError, match=r"its sample inputs are .* they hold a dict with the key \"\+str\("):
        load_exported(path).module()
    assert not sprung.exists()


def save_samples(value) -> dict[str, bytes]:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return {"data/sample_inputs/model.pt": buffer.getvalue()}


def test_sample_inputs_that_are_kept(tmp_path, pt2):
    """Tensors that share memory, of any dtype and strides, in tuples, lists and dicts, and plain values."""
    x = torch.arange(12.0).reshape(3, 4)
    ordered = collections.OrderedDict(b=x.to(torch.bfloat16), a=x[:, ::2])
    args = (x, [x.t(), torch.tensor(3)], {"k": ordered, 3: torch.zeros(0, 2)}, x[:1].expand(5, 4), x.to(torch.bool))
    kwargs = {"n": 3, "f": 0.5, "s": "it's", "none": None, "flag": True, "dtype": torch.float16}
    kwargs |= {"device": torch.device("cpu"), "size": torch.Size([2, 3])}
    path = pt2.with_members(save_samples((args, kwargs))).save(tmp_path)
    found_args, found_kwargs = load_exported(path).example_inputs
    assert found_kwargs == kwargs
    assert type(found_args[2]["k"]) is collections.OrderedDict
    for found, expected in zip(*map(torch.utils._pytree.tree_leaves, (found_args, args)), strict=True):
        assert (found.dtype, found.shape, found.stride()) == (expected.dtype, expected.shape, expected.stride())
        assert torch.equal(found, expected)
    assert found_args[0].untyped_storage().data_ptr() == found_args[1][0].untyped_storage().data_ptr()


def nested(depth: int):
    value = [1]
    for _ in range(depth):
        value = [value, value]
    return value


@pytest.mark.parametrize(
    ("value", "match"),
    [
        (nested(60), r"they hold over 100000 values, or are nested over 100 deep\."),
        ([[[[0] * 1000] * 10] * 10] * 10, r"they hold over 100000 values, or are nested over 100 deep\."),
        ({("a", 1): 2}, r"they hold a dict with the key \"\('a', 1\)\"\."),
        ({1, 2}, r"they hold an object of type set\."),
        (torch.nn.ReLU(), r"they hold an object made by torch\.nn\.modules\.activation\.ReLU\."),
        (torch.nn.ReLU, r"they hold an object made by torch\.nn\.modules\.activation\.ReLU\."),
        (b"abc", r"they hold an object made by _codecs\.encode\."),
    ],
)
def test_sample_inputs_that_are_refused(tmp_path, pt2, value, match):
    path = pt2.with_members(save_samples(((value,), {}))).save(tmp_path)
    refused(path, rf"its sample inputs are a pickle of more than tensors and plain values: {match}")


def test_sample_inputs_that_reach_outside_their_data(tmp_path, pt2):
    class Outside:
        def __reduce__(self):
            storage = torch.zeros(1)._typed_storage()
            return torch._utils._rebuild_tensor_v2, (storage, 0, (1 << 30,), (1,), False, collections.OrderedDict())

    refused(
        pt2.with_members(save_samples(((Outside(),), {}))).save(tmp_path),
        r"a sample input is damaged: shape \[1073741824\] .* but its data has 4",
        SourceError,
    )


def test_sample_inputs_that_are_no_archive(tmp_path, pt2):
    path = pt2.with_members({"data/sample_inputs/model.pt": pickle.dumps(3)}).save(tmp_path)
    refused(path, r"model\.pt2: the archive of its sample inputs is a truncated or damaged archive", SourceError)


def test_tree_that_would_import_a_module(sprung, tmp_path, pt2, monkeypatch):
    (tmp_path / "evil_module.py").write_text(touch(sprung))
    monkeypatch.syspath_prepend(tmp_path)
    enum = json.dumps([{"__enum__": True, "fqn": "evil_module:E", "name": "A"}])
    leaf = {"type": None, "context": None, "children_spec": []}

    def import_it(program, kind="builtins.dict", context=enum):
        spec = json.dumps([1, {"type": kind, "context": context, "children_spec": [leaf]}])
        program["graph_module"]["module_call_graph"][0]["signature"]["out_spec"] = spec

    refused(pt2.with_json(import_it).save(tmp_path), r"inputs or outputs with the keys \"\[\{'__enum__'")
    factory = {"default_factory_module": "evil_module", "default_factory_name": "E", "dict_context": "[]"}
    changed = pt2.with_json(lambda p: import_it(p, "collections.defaultdict", json.dumps(factory)))
    refused(changed.save(tmp_path), r"inputs or outputs of the type 'collections\.defaultdict'")
    for keys in ("[]", "null", "[1]", '["a", "a"]', '"a"', '[["a"], []]'):
        changed = pt2.with_json(lambda p, keys=keys: import_it(p, "evil_module.E", keys))
        refused(changed.save(tmp_path), r"inputs or outputs of the type 'evil_module\.E'")
    quoted = pt2.with_json(lambda p: import_it(p, "evil_module.E", '["a\'"]'))
    refused(quoted.save(tmp_path), r"inputs or outputs with the keys")
    named = load_source(pt2.with_json(lambda p: import_it(p, "evil_module.E", '["a"]')).save(tmp_path))
    assert list(named.exported_program().module()(torch.zeros(2, 3, 8, 8))) == ["a"]
    assert not sprung.exists()


def test_zip_hygiene(tmp_path, pt2):
    def archive(*members: tuple[str, bytes], method: int = zipfile.ZIP_STORED) -> Path:
        path = tmp_path / "model.pt2"
        with warnings.catch_warnings(), zipfile.ZipFile(path, "w", method) as new:
            warnings.simplefilter("ignore")  # zipfile warns of doubled names
            for name, data in members:
                new.writestr(name, data)
        return path

    refused(
        archive(("m/archive_format", b"pt2"), ("m/archive_format", b"pt2")), "holds the member .* twice", SourceError
    )
    refused(archive(("../x", b""), ("m/a", b"")), r"its member '\.\./x' points outside the archive", SourceError)
    refused(archive(("/etc/x", b"")), r"its member '/etc/x' points outside the archive", SourceError)
    bomb = archive(("m/data.pkl", b"\0" * (1 << 22)), method=zipfile.ZIP_DEFLATED)
    refused(bomb, r"its member 'm/data\.pkl' would grow \d+ times when unpacked", SourceError)
    path = pt2.save(tmp_path)
    data = path.read_bytes()
    path.write_bytes(data.replace(struct.pack("<II", 4, 4), struct.pack("<II", 1 << 30, 1 << 30)))
    if path.read_bytes() != data:
        refused(path, r"truncated|damaged", SourceError)


@pytest.mark.parametrize("keep", [0.2, 0.6, 0.99])
def test_truncated_exported_program(tmp_path, keep, pt2):
    path = tmp_path / "model.pt2"
    path.write_bytes(pt2.data[: int(len(pt2.data) * keep)])
    refused(path, r"model\.pt2 is a truncated or damaged archive", SourceError)


def test_deep_json(tmp_path, pt2):
    path = pt2.with_members({"models/model.json": b"[" * 200_000}).save(tmp_path)
    refused(path, r"is damaged: models/model\.json is not JSON", SourceError)


def as_checkpoint(pickled: bytes, path: Path) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("m/data.pkl", pickled)
    return path


@pytest.mark.parametrize(
    "pickled",
    [
        b"\x80\x02" + b"]" * 300_000 + b"a" * 299_999 + b".",  # a list in a list in a list …
        b"\x80\x02}" + b"N" + b"\x85" * 300_000 + b"Ns.",  # a deep tuple as a key, which Python would hash
        b"\x80\x02]q\x00h\x00a.",  # a list that holds itself
        b"\x80\x02" + b"]" + b"q\x00](h\x00h\x00e" * 60 + b"Q.",  # 2^60 elements, should anyone print them
        b"\x80\x02\x8a\xff" + b"\xff" * 100,  # cut off
        b"\x80\x02}}K\x01s.",  # a dict as a key
        b"\x80\x02cos\nsystem\n.",
        b"\x80\x02\x82\x01.",  # an extension
        b"\x80\x05\x96" + (1 << 40).to_bytes(8, "little") + b"x" * 100,  # a bytearray of a terabyte
        b"",
    ],
)
def test_pickles_that_would_exhaust_python(tmp_path, pickled):
    refused(as_checkpoint(pickled, tmp_path / "model.pt"), r"model\.pt", SourceError)


def test_modules_without_end(tmp_path, monkeypatch):
    """A module that is its own child, and forty that each hold the next one twice."""
    net = torch.nn.Sequential(torch.nn.Linear(2, 2))
    net._modules["self"] = net
    refused(save(net, tmp_path / "model.pt"), r"its modules hold each other, or are nested over 200 deep", SourceError)
    net = torch.nn.Linear(2, 2)
    for _ in range(40):
        net = torch.nn.Sequential(net, net)
    monkeypatch.setattr("qcompress.sources.pickles.chosen.MAX_MODULES", 1000)
    refused(save(net, tmp_path / "model.pt"), r"it claims to hold over 1000 modules", SourceError)


def test_tensor_that_claims_to_be_huge(tmp_path):
    huge = torch.zeros(1).expand(1 << 40)
    refused(
        save({"w": huge}, tmp_path / "model.pt"), r"4 bytes of data claim to be 1099511627776 elements", SourceError
    )


def test_damaged_bytes_are_read_or_refused(tmp_path, small, pt2):
    """Whatever byte is changed, cut out or put in: values or a SourceError, never another exception."""
    buffers = [pt2.data]
    for legacy in (False, True):
        buffer = io.BytesIO()
        torch.save(small, buffer, _use_new_zipfile_serialization=not legacy)
        buffers.append(buffer.getvalue())
    chance = random.Random(0)
    for _ in range(300):
        data = bytearray(chance.choice(buffers))
        at, kind = chance.randrange(len(data)), chance.randrange(4)
        if kind < 2:
            data[at] = chance.randrange(256)
        else:
            data[at : at + chance.randrange(20)] = bytes(chance.randrange(5) if kind == 3 else 0)
        (tmp_path / "model.pt").write_bytes(data)
        try:
            for tensor in load_source(tmp_path / "model.pt").tensors():
                np.asarray(tensor.array)
        except SourceError:
            pass


def test_view_outside_its_storage(tmp_path, pt2):
    def grow(config):
        config["config"]["fc.bias"]["tensor_meta"]["sizes"] = [{"as_int": 1 << 40}]

    path = pt2.with_json(grow, "data/weights/model_weights_config.json").save(tmp_path)
    refused(
        path,
        r"tensor 'fc\.bias' is damaged: shape \[1099511627776\] .* needs \d+ bytes, but its data has 16",
        SourceError,
    )
