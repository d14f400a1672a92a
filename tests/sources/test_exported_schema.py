"""The keys and strings of an exported program's JSON: the table is torch's own schema, and nothing else passes."""

import dataclasses
import enum
import json
import re
import types
import typing
from typing import Any

import numpy as np
import pytest
import torch
from torch._export.serde import schema, union

from qcompress.errors import SourceError, UnsafeFileError
from qcompress.graph.options import ProgramOptions
from qcompress.openers import load_source
from qcompress.sources.pt2.forms import FORMS
from qcompress.sources.pt2.graph import checked_program, checked_record
from qcompress.sources.pt2.schema import NEWEST_TORCH, RECORDS, SCHEMA_VERSION, UNIONS
from qcompress.sources.pt2.symbols import is_symbolic_expression

OPTIONS = ProgramOptions(inputs={"x": np.zeros((2, 3, 8, 8), np.float32)})
TEXTS = {"text", "quotable_text", "name", "argument_name", "qualified_name", "expression", "operator", "tree"}
# Values that are not handed on as they are, with torch's type for them.
REPLACED = {
    "custom_object": {"CustomObjArgument", "InputToCustomObjSpec"},
    "no_custom_objects": {"dict[str, CustomObjArgument]"},
    "left_out": {"dict[str, str]", "dict[str, NamedTupleDef]"},
    "origins": {"dict[str, str]"},
    "verifiers": {"list[str]"},
    "guards": {"list[str]"},
}


def written(hint: Any) -> str:
    """A type of torch's schema as the table writes it, each string a str."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Annotated:
        return written(args[0])
    if origin in (typing.Union, types.UnionType):
        (inner,) = [a for a in args if a is not type(None)]
        return f"{written(inner)} | None"
    if origin in (list, dict):
        return f"{origin.__name__}[{', '.join(map(written, args))}]"
    if isinstance(hint, typing.ForwardRef):
        return hint.__forward_arg__
    if isinstance(hint, str):
        return hint
    return "enum" if issubclass(hint, enum.IntEnum) else hint.__name__


def agree(ours: str, torchs: str) -> bool:
    if ours in REPLACED:
        return torchs in REPLACED[ours]
    plain = ours.replace("InputArgument", "Argument")
    for form in sorted(TEXTS, key=len, reverse=True):
        plain = re.sub(rf"\b{form}\b", "str", plain)
    return plain == torchs


@pytest.mark.parametrize("record", RECORDS)
def test_the_table_is_torchs_schema(record):
    """A torch whose schema has a key more fails here, before a user's file is refused."""
    theirs = getattr(schema, "Argument" if record == "InputArgument" else record)
    fields = {field.name: written(field.type) for field in dataclasses.fields(theirs)}
    assert set(RECORDS[record]) == (set(RECORDS[record]) & set(fields) if record == "InputArgument" else set(fields))
    for key, ours in RECORDS[record].items():
        assert agree(ours, fields[key]), (key, fields[key])
    assert (record in UNIONS) == issubclass(theirs, union._Union)


def test_every_record_and_form_is_there():
    types = {part for fields in RECORDS.values() for kind in fields.values() for part in re.findall(r"\w+", kind)}
    assert types - {"list", "dict", "None"} == (set(RECORDS) - {"ExportedProgram", "PayloadConfig"}) | set(FORMS)


def test_the_version_is_that_of_the_newest_torch():
    assert schema.SCHEMA_VERSION <= SCHEMA_VERSION
    assert tuple(map(int, torch.__version__.split(".")[:2])) <= tuple(map(int, NEWEST_TORCH.split(".")))


def objects(value: Any, path: tuple[Any, ...] = ()):
    """Every object of a JSON value with the way to it, but for dictionaries with free keys and tree specifications."""
    free = {"tensor_values", "sym_int_values", "sym_bool_values", "sym_float_values", "custom_obj_values", "metadata",
            "opset_version", "range_constraints", "treespec_namedtuple_fields", "config"}  # fmt: skip
    if isinstance(value, list):
        for i, inner in enumerate(value):
            yield from objects(inner, (*path, i))
    elif isinstance(value, dict):
        if not path or path[-1] not in free:
            yield path
        for key, inner in value.items():
            yield from objects(inner, (*path, key))


def test_a_key_more_is_refused_at_every_level(pt2):
    """In each object of the JSON of a whole program, one after the other."""
    text = pt2.member("models/model.json").decode()
    ways = list(objects(json.loads(text)))
    assert len(ways) > 100
    for way in ways:
        program = json.loads(text)
        place = program
        for step in way:
            place = place[step]
        place["evil"] = 1
        with pytest.raises(
            SourceError, match=r"^m is (refused|damaged): its graph (has the key 'evil'|is not what torch)"
        ):
            checked_program(program, "m")


def test_the_message_for_a_newer_torch(tmp_path, pt2):
    def newer(program):
        program["torch_version"] = "9.9.0"
        program["graph_module"]["graph"]["nodes"][0]["stream"] = 3

    with pytest.raises(
        UnsafeFileError,
        match=r"is refused: its graph has the key 'stream' in Node, which torch up to 2\.13 does not write, so it "
        r"cannot be checked\. The file says that torch 9\.9\.0 wrote it\. "
        r"Export the model with torch 2\.13 or older\.$",
    ):
        load_source(pt2.with_json(newer).save(tmp_path)).program(OPTIONS)


@pytest.mark.parametrize("which", ["weights", "constants"])
def test_a_key_more_beside_the_tensors(tmp_path, pt2, which):
    member = f"data/{which}/model_{which}_config.json"
    path = pt2.with_json(lambda config: next(iter(config["config"].values())).update(loader="evil"), member).save(
        tmp_path
    )
    with pytest.raises(
        UnsafeFileError, match=rf"is refused: {member} has the key 'loader' in PayloadMeta, which torch"
    ):
        load_source(path)


@pytest.mark.parametrize(
    ("record", "value", "match"),
    [
        ("SymInt", {}, r"SymInt must be one key, got dict"),
        ("SymInt", {"as_int": 1, "as_expr": {"expr_str": "s0"}}, r"SymInt must be one key, got dict"),
        ("SymInt", {"as_int": 10**30}, r"SymInt\.as_int must be an integer of 64 bits, got int"),
        ("SymInt", {"as_int": True}, r"SymInt\.as_int must be an integer of 64 bits, got True"),
        ("SymInt", {"as_int": "1"}, r"SymInt\.as_int must be an integer of 64 bits, got '1'"),
        ("SymInt", [], r"SymInt must be an object, got list"),
        ("SymFloat", {"as_float": "1"}, r"SymFloat\.as_float must be a number, got '1'"),
        ("SymFloat", {"as_float": 10**400}, r"SymFloat\.as_float must be a number, got int"),
        ("SymBool", {"as_bool": 1}, r"SymBool\.as_bool must be true or false, got int"),
        ("TensorMeta", {"dtype": 256}, r"TensorMeta\.dtype must be a small integer, got int"),
        ("TensorMeta", {"sizes": 3}, r"TensorMeta\.sizes must be a list, got int"),
        ("Graph", {"tensor_values": []}, r"Graph\.tensor_values must be an object, got list"),
        ("Device", {"type": None}, r"Device\.type must be a string, got None"),
        ("Node", {"metadata": 3}, r"Node\.metadata must be an object, got int"),
        (
            "ModuleCallSignature",
            {"in_spec": "[2, 1]"},
            r"ModuleCallSignature\.in_spec must be a tree of version 1, got",
        ),
        (
            "ModuleCallSignature",
            {"in_spec": "[" * 100_000},
            r"ModuleCallSignature\.in_spec must be a tree of version 1, got '\[\[",
        ),
    ],
)
def test_values_of_a_wrong_type(record, value, match):
    with pytest.raises(SourceError, match=rf"^m is damaged: its graph is not what torch writes \({match}"):
        checked_record(value, record, "m")


@pytest.mark.parametrize(
    ("record", "value", "match"),
    [
        ("TensorArgument", {"name": "a.b"}, r"the name 'a\.b'"),
        ("TensorArgument", {"name": 3}, r"the name '3'"),
        ("GraphArgument", {"name": "class"}, r"the name 'class'"),
        ("NamedArgument", {"name": "x=1"}, r"the name 'x=1'"),
        ("Argument", {"as_string_to_argument": {"a'": {"as_int": 1}}}, r"the name \"a'\""),
        ("Argument", {"as_operator": "torch.ops.aten.save.default"}, r"a call of 'torch\.ops\.aten\.save\.default'"),
        ("Argument", {"as_custom_obj": {"name": "x", "class_fqn": "y"}}, r"the custom object \"\{'name': 'x'"),
        ("Graph", {"custom_obj_values": {"x": 1}}, r"custom objects,"),
        ("SymExpr", {"expr_str": "exec"}, r"the size 'exec'"),
        ("ExportedProgram", {"range_constraints": {"exec": {}}}, r"the size 'exec'"),
    ],
)
def test_strings_that_torch_would_evaluate(record, value, match):
    with pytest.raises(UnsafeFileError, match=rf"^m is refused: its graph holds {match}.*None of its code was run\.$"):
        checked_record(value, record, "m")


def test_arguments_may_be_called_as_python_keywords():
    """`uniform(self, from, to)` has one; it becomes no variable."""
    given = {"name": "from", "arg": {"as_float": 0.0}, "kind": 1}
    assert checked_record(given, "NamedArgument", "m") == given


def test_graphs_nested_without_end():
    graph: dict[str, Any] = {"nodes": []}
    for _ in range(200):
        argument = {"name": "g", "arg": {"as_graph": {"name": "g", "graph": graph}}}
        graph = {"nodes": [{"target": "torch.ops.higher_order.cond", "inputs": [argument]}]}
    with pytest.raises(SourceError, match=r"^m is refused: its graph is nested over 100 deep\.$"):
        checked_record(graph, "Graph", "m")


@pytest.mark.parametrize(("text", "legal"), [("u999999", True), ("u1000000", False), ("s" * 11 + "1", False)])
def test_numbers_of_symbols_are_bounded(text, legal):
    """torch counts up to the number of an unbacked symbol, one by one."""
    assert is_symbolic_expression(text) == legal
