"""Decodes the tensors of our files with onnxruntime, and compares them with the digests in the file."""

from collections.abc import Container, Iterable, Mapping
from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt
import onnx
from onnx import numpy_helper

from qcompress.errors import SourceError
from qcompress.user_code import one_line
from qcompress_exporters.onnx_format.digests import tensor_digest
from qcompress_exporters.onnx_format.names import part_of, scale_name
from qcompress_exporters.parity.sessions import run, session

_DIGEST_LENGTH: Final = 11
_CHUNK: Final = 64  # tensors decoded at a time, so that memory stays bounded


class Signed(NamedTuple):
    """A tensor that carries its digest.

    Args:
        value: its name in the file.
        digest: which export computed before lowering.
    """

    value: str
    digest: str


def signed(model: onnx.ModelProto) -> dict[str, Signed]:
    """Return the tensors with digests by qualified name; scales of int8 weights by `names.scale_name`."""
    graph = model.graph
    texts = {node.output[0]: node.doc_string for node in graph.node} | {t.name: t.doc_string for t in graph.initializer}
    found = {name: Signed(name, text) for name, text in texts.items() if len(text) == _DIGEST_LENGTH}
    for name, text in texts.items():
        digest, scale = text[:_DIGEST_LENGTH], text[_DIGEST_LENGTH:]
        if scale in found:
            found[name] = Signed(name, digest)
            found[scale_name(name)] = found.pop(scale)
    return found


def digests(model: onnx.ModelProto) -> dict[str, str]:
    """Return the digests of all tensors, by their names as in `signed`."""
    return {name: tensor.digest for name, tensor in signed(model).items()}


def decoded(model: onnx.ModelProto) -> dict[str, npt.NDArray[Any]]:
    """Return every tensor as onnxruntime decodes it, by its name as in `signed`.

    Raises:
        SourceError: the file carries no digests, or onnxruntime cannot decode a tensor.
    """
    found = signed(model)
    if not found:
        raise SourceError("The file carries no digests of its tensors: export it again.")
    names = {tensor.value for tensor in found.values()}
    values = {t.name: _stored(t) for t in model.graph.initializer if t.name in names}
    computed = sorted(names - set(values))
    for start in range(0, len(computed), _CHUNK):
        part = _decoder(model, computed[start : start + _CHUNK])
        values |= run(session(part.SerializeToString(), "exact"), {})
    return {name: values[tensor.value] for name, tensor in found.items()}


def _stored(tensor: onnx.TensorProto) -> npt.NDArray[Any]:
    """Return the values of an initializer."""
    if tensor.data_location == onnx.TensorProto.EXTERNAL:
        raise SourceError(f"{tensor.name} is kept in another file, where export never puts a tensor: export it again.")
    try:
        return numpy_helper.to_array(tensor)
    except Exception as e:  # onnx fails in many ways over damaged fields
        raise SourceError(f"{tensor.name} is damaged in the file ({one_line(e)}): export it again.") from None


def joined(values: Mapping[str, npt.NDArray[Any]], whole: Container[str]) -> dict[str, npt.NDArray[Any]]:
    """Return tensors by name, with those that are written in parts in one piece.

    Args:
        values: tensors and parts, from `decoded`.
        whole: names that are no parts, whatever they look like.

    Raises:
        SourceError: parts of a tensor do not fit together.
    """
    found = {name: part for name in values if name not in whole and (part := part_of(name)) is not None}
    tensors = {name: tensor for name, tensor in values.items() if name not in found}
    parts: dict[tuple[str, int], list[npt.NDArray[Any]]] = {}
    for name, (weight, axis, _) in sorted(found.items(), key=lambda item: item[1]):
        parts.setdefault((weight, axis), []).append(values[name])
    for (weight, axis), pieces in parts.items():
        try:
            tensors[weight] = np.concatenate(pieces, axis)
        except ValueError:
            raise SourceError(f"The parts of {weight} in the file do not fit together: export it again.") from None
    return tensors


def mismatches(model: onnx.ModelProto, values: Mapping[str, npt.NDArray[Any]]) -> list[str]:
    """Return the tensors whose decoded value does not match their digest.

    Args:
        model: one of our files.
        values: its tensors, from `decoded`.
    """
    return [name for name, digest in digests(model).items() if tensor_digest(name, values[name]) != digest]


def decodes_as_written(data: bytes) -> dict[str, Any] | None:
    """Check that onnxruntime loads one of our files and decodes every tensor to its compressed value.

    Args:
        data: the file's bytes.

    Returns:
        The version of onnxruntime, the number of tensors and `ok`; None if onnxruntime is not installed.
    """
    try:
        import onnxruntime
    except ImportError:
        return None
    session(data, "deployed")  # the whole file loads
    model = onnx.load_from_string(data)
    values = decoded(model)
    wrong = mismatches(model, values)
    if wrong:
        raise AssertionError(f"onnxruntime {onnxruntime.__version__} decodes {wrong[0]} to other values than we wrote")
    return {"onnxruntime": onnxruntime.__version__, "tensors": len(values), "ok": True}


def _decoder(model: onnx.ModelProto, names: Iterable[str]) -> onnx.ModelProto:
    """Return the part of a model that computes the named values, as a model without inputs."""
    producer = {output: node for node in model.graph.node for output in node.output}
    wanted, needed = list(names), set()
    stack = list(wanted)
    while stack:
        name = stack.pop()
        if name and name not in needed:
            needed.add(name)
            stack += producer[name].input if name in producer else []
    part = onnx.ModelProto(ir_version=model.ir_version, opset_import=model.opset_import)
    part.graph.name = "decode"
    part.graph.node.extend(n for n in model.graph.node if any(o in needed for o in n.output))
    part.graph.initializer.extend(t for t in model.graph.initializer if t.name in needed)
    for name in wanted:
        part.graph.output.append(onnx.ValueInfoProto(name=name))
    return part
