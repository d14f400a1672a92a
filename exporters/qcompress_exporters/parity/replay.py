"""Compares a quantized file with torch, layer by layer, on the same codes.

The codes of each activation are added to the file's outputs, so that they can be read as onnxruntime computes them.
Each activation is compared with the one that torch computes from onnxruntime's codes before it, so a difference shows
up only at the activation where it arises.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx

from qcompress.artifacts import ActivationGrid, SiteGrid
from qcompress.artifacts.base import along_axis, broadcast_scale
from qcompress.graph.layers import bias_of, layers, weight_layers
from qcompress.graph.marks import MarkedRunner, Visit, input_sites, output_layers, site_op
from qcompress.graph.program import FloatProgram, copy_graph, rebuild, state_nodes
from qcompress_exporters.onnx_format.int8.grid_format import FileGrid
from qcompress_exporters.onnx_format.names import (
    bias_name,
    code_name,
    code_scale_name,
    code_zero_point_name,
    offset_name,
    scale_name,
)
from qcompress_exporters.parity.sessions import Mode, run, session

Arrays = dict[str, npt.NDArray[Any]]
Floats = npt.NDArray[np.float32]

_RUN_TIME = ("", -1)  # the site of a grid that is computed at run time


@dataclass(frozen=True, slots=True)
class Reference:
    """The float tensors that a file's decoded tensors represent.

    Args:
        state: tensors by qualified name.
        added: by a layer's node, the float32 [O] that is added to its output: the part of a separately stored integer
            bias (see `names.bias_name`) that `state` does not hold.
    """

    state: Arrays
    added: Arrays


def reference_state(marked: FloatProgram, values: Mapping[str, npt.NDArray[Any]], grids: list[FileGrid]) -> Reference:
    """Return the float tensors that a file's decoded tensors represent.

    In the reference, activations include their offsets, so the parts of these offsets in biases are subtracted.

    Args:
        marked: the program, marked at the file's sites.
        values: from `decode.decoded`: int8 weights and their scales, int32 biases, float tensors.
        grids: one for each site; empty if the file computes scales at run time.
    """
    state = {name: v for name, v in values.items() if name in marked.state()}
    scales: dict[str, Floats] = {}
    for name, layer in weight_layers(marked).items():
        if name in state and state[name].dtype == np.int8:
            scales[name] = values[scale_name(name)]
            axis = layer.axis if scales[name].ndim else None
            state[name] = state[name].astype(np.float32) * broadcast_scale(scales[name], state[name].shape, axis)
    added: Arrays = {}
    apart: list[tuple[str, str, npt.NDArray[np.float64]]] = []  # node, name of its bias, the total that it adds
    inputs, names = input_sites(marked), state_nodes(marked.exported)
    seen = set[str]()
    taken = {
        weight: float(grids[i].grid.free_offset)
        for i, weight in output_layers(marked).items()
        if grids and grids[i].taken
    }
    for layer in layers(marked):
        use = layer.node.name if layer.weight in seen else layer.weight
        seen.add(layer.weight)
        if not grids or use not in inputs or layer.weight not in scales:
            continue
        site, bias = inputs[use], bias_of(layer.node)
        own = names.get(bias, "") if bias is not None else ""
        folded_O = np.zeros(1)
        grid = grids[site].grid
        if grids[site].folded:
            others = tuple(i for i in range(values[layer.weight].ndim) if i != layer.axis)
            codes_O = values[layer.weight].sum(axis=others, dtype=np.int64)
            folded_O = float(grid.free_offset) * scales[layer.weight].astype(np.float64) * codes_O
        written = bias_name(layer.weight, site)
        if (separate := offset_name(layer.weight, site)) in values:
            added[layer.node.name] = (values[separate] - folded_O).astype(np.float32)
        elif written in values or own:
            bias_O = values[written if written in values else own]
            step_O = (grid.scale * scales[layer.weight]).astype(np.float64) if bias_O.dtype == np.int32 else 1.0
            total_O = bias_O * step_O - folded_O + taken.get(layer.weight, 0.0)
            if written in values:
                apart.append((layer.node.name, own, total_O))
            else:
                state[own] = total_O.astype(np.float32)
    for node, own, total_O in apart:
        added[node] = (total_O - (state[own] if own else 0.0)).astype(np.float32)
    return Reference(state, added)


def _with_sites_behind(program: FloatProgram, nodes: Iterable[str], first: int) -> FloatProgram:
    """Return the program with a mark after each of the given nodes, numbered from `first`."""
    module = copy_graph(program.exported)
    by_name = {node.name: node for node in module.graph.nodes}
    for index, name in enumerate(nodes, first):
        node = by_name[name]
        with module.graph.inserting_after(node):
            mark = module.graph.call_function(site_op, (node, index))
        mark.meta["val"] = node.meta["val"]
        node.replace_all_uses_with(mark, delete_user_cb=lambda user, mark=mark: user is not mark)
    module.recompile()
    return replace(program, exported=rebuild(program.exported, module=module))


@dataclass(frozen=True, slots=True, kw_only=True)
class SiteDifference:
    """The difference between the runtime's and torch's codes at one site.

    Args:
        site: name of the value, or of the layer whose input it is.
        layer: weight of the layer that computes the value; empty for other values.
        terms: products that the layer adds up for each value; 1 for other values.
        codes: number of compared codes.
        off: number of codes that differ.
        largest: largest difference, in codes.
        signal: sum of squares of the original's values.
        noise: sum of squared differences between the file's values and the original's; all earlier layers add to it.
    """

    site: str
    layer: str
    terms: int
    codes: int
    off: int
    largest: int
    signal: float
    noise: float


@dataclass(frozen=True, slots=True)
class Replay:
    """The result of a comparison on the same codes.

    Args:
        sites: one for each site, in the order in which the graph computes them.
        wanted: the outputs that torch computes from the file's codes.
        got: the file's outputs.
    """

    sites: tuple[SiteDifference, ...]
    wanted: Arrays
    got: Arrays


def replay(
    marked: FloatProgram,
    model: onnx.ModelProto,
    sites: list[tuple[str, int]],
    wanted_state: Reference,
    grids: list[FileGrid],
    batches: Iterable[Arrays],
    mode: Mode,
) -> Replay:
    """Run a file and its torch reference side by side.

    Args:
        marked: the original, marked at `sites`.
        model: the file.
        sites: the sites' keys, in the order of their marks.
        wanted_state: from `reference_state`.
        grids: from `file_grids`; empty if the file computes scales at run time.
        batches: inputs by the graph's names.
        mode: mode of the session.
    """
    names = _code_outputs(model, len(sites), dynamic=not grids)
    watched = onnx.ModelProto()
    watched.CopyFrom(model)
    outputs = [v.name for v in model.graph.output]
    watched.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names if name not in outputs)
    active = session(watched.SerializeToString(), mode)
    added, layer_of = list(wanted_state.added.values()), {layer.node.name: layer for layer in layers(marked)}
    kinds = [layer_of[node].kind for node in wanted_state.added]
    reference = MarkedRunner(_with_sites_behind(marked.with_state(wanted_state.state), wanted_state.added, len(sites)))
    float_runner = MarkedRunner(marked)

    def visitor(compare: Visit) -> Visit:
        def visit(index: int, value: Floats, first: bool) -> Floats:
            if index < len(sites):
                return compare(index, value, first)
            vector, kind = added[index - len(sites)], kinds[index - len(sites)]
            return np.asarray(value + (vector if kind == "linear" else along_axis(vector, value.ndim, 1)))

        return visit

    tally = np.zeros((len(sites), 5))
    wanted, got, order = [], [], []
    for batch in batches:
        values = run(active, batch)
        seen: dict[int, Floats] = {}
        float_runner(batch, _keep(seen))
        order = list(seen)
        wanted.append(reference(batch, visitor(_compare(values, grids, seen, tally))))
        got.append({name: values[name] for name in outputs})
    behind, terms = output_layers(marked), _terms(marked)
    differences = tuple(
        SiteDifference(
            site=sites[i][0], layer=behind.get(i, ""), terms=terms.get(behind.get(i, ""), 1), codes=int(tally[i, 0]),
            off=int(tally[i, 1]), largest=int(tally[i, 2]), signal=float(tally[i, 3]), noise=float(tally[i, 4]),
        )
        for i in order
    )  # fmt: skip
    return Replay(differences, _joined(wanted), _joined(got))


def _terms(program: FloatProgram) -> dict[str, int]:
    """Return how many products each layer adds up for a value, by its weight."""
    state = program.state()
    return {
        name: state[name].numel() // max(1, state[name].shape[layer.axis])
        for name, layer in weight_layers(program).items()
    }


def _keep(seen: dict[int, Floats]) -> Callable[[int, Floats, bool], Floats]:
    def visit(index: int, value: Floats, first: bool) -> Floats:
        if first:
            seen[index] = value
        return value

    return visit


def _compare(
    values: Arrays, grids: list[FileGrid], originals: Mapping[int, Floats], tally: npt.NDArray[np.float64]
) -> Callable[[int, Floats, bool], Floats]:
    """Return a visitor that compares codes, then continues with the file's codes."""

    def visit(index: int, value: Floats, first: bool) -> Floats:
        name = code_name(index)
        if not first or (not grids and name not in values):
            return value  # a moved value, already on the grid; or the input of a layer that stays in float
        grid = grids[index].grid if grids else _dynamic_grid(value)
        codes = grid.quantize(value)
        if name in values:
            theirs = values[name].reshape(codes.shape)
            difference = np.abs(theirs.astype(np.int16) - codes)
            tally[index, :2] += difference.size, np.count_nonzero(difference)
            tally[index, 2] = max(tally[index, 2], difference.max(initial=0))
            codes = theirs
        if not grids:
            found = values[code_scale_name(index)], int(values[code_zero_point_name(index)])
            grid = ActivationGrid.from_zero_point(_RUN_TIME, *found, 8)
        result, float_value = grid.dequantize(codes), originals[index].astype(np.float64)
        tally[index, 3:] += np.square(float_value).sum(), np.square(float_value - result).sum()
        return result

    return visit


def _dynamic_grid(value: Floats) -> SiteGrid:
    """Return the grid that ONNX's DynamicQuantizeLinear computes for a value."""
    low, high = min(np.float32(0), value.min()), max(np.float32(0), value.max())
    scale = np.float32((high - low) / np.float32(255)) or np.float32(1)
    zero = int(np.clip(np.rint(-low / scale), 0, 255))
    return ActivationGrid.from_zero_point(_RUN_TIME, np.asarray(scale), zero, 8)


def _code_outputs(model: onnx.ModelProto, count: int, *, dynamic: bool) -> list[str]:
    given = {output for node in model.graph.node for output in node.output}
    names = [code_name(i) for i in range(count)]
    if dynamic:
        names += [text(i) for i in range(count) for text in (code_scale_name, code_zero_point_name)]
    return [name for name in names if name in given]


def _joined(parts: list[Arrays]) -> Arrays:
    return {n: np.concatenate([np.atleast_1d(p[n]) for p in parts]) for n in parts[0]}
