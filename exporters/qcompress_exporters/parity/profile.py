"""Measures what each layer of a file costs, with onnxruntime's profiler."""

import json
import re
import tempfile
from collections import defaultdict
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import onnx

from qcompress_exporters.onnx_format.layer_weight import layer_weight
from qcompress_exporters.parity.sessions import run, session

# What onnxruntime adds to the names of nodes and values as it optimizes.
_EVENT: Final = re.compile(r"(.*?)(?:_nchwc|_token_\d+)*_kernel_time")
_WARM_UP: Final = 5


def layer_costs(
    data: bytes, feeds: Mapping[str, npt.NDArray[Any]], weights: Collection[str], *, rounds: int = 20
) -> dict[str, float]:
    """Return the microseconds of each layer, and of all nodes behind it up to the next one, in the file's order.

    Args:
        data: the file, its integer layers written as quantizers around float operators.
        feeds: one batch of inputs by name.
        weights: the qualified names of the layers' weights.
        rounds: measured runs; the figure is the median over them.

    Raises:
        SourceError: onnxruntime does not load the file.
    """
    model = onnx.load_from_string(data)
    owners = _owners(model, frozenset(weights))
    costs: dict[str, list[float]] = {weight: [] for weight in dict.fromkeys(owners.values())}
    for times in _runs(model.SerializeToString(), feeds, rounds):
        spent, owner = defaultdict[str, float](float), ""
        for name, duration in times:
            owner = owners.get(name, owner)  # a node that onnxruntime adds counts to the one before it
            spent[owner] += duration
        for weight, found in costs.items():
            found.append(spent[weight])
    return {weight: float(np.median(found)) for weight, found in costs.items() if weight}


def _owners(model: onnx.ModelProto, weights: frozenset[str]) -> dict[str, str]:
    """Name the nodes of a model, and return the weight of the layer that each node and value counts to."""
    givers = {name: node for node in model.graph.node for name in node.output}
    owners: dict[str, str] = {}
    current = ""
    for i, node in enumerate(model.graph.node):
        current = layer_weight(node, givers, weights) or current
        node.name = f"node {i}"  # no value has such a name
        owners |= dict.fromkeys((node.name, *node.output), current)
    return owners


def _runs(data: bytes, feeds: Mapping[str, npt.NDArray[Any]], rounds: int) -> list[list[tuple[str, float]]]:
    """Return the nodes that each run computes, in order, and the microseconds of each."""
    with tempfile.TemporaryDirectory() as folder:
        active = session(data, "deployed", one_thread=True, profile=Path(folder) / "profile")
        for _ in range(_WARM_UP + rounds):
            run(active, feeds)
        events = json.loads(Path(active.end_profiling()).read_text())
    found: list[list[tuple[str, float]]] = [[]]
    for event in events:
        if event["name"] == "model_run":  # the end of a run
            found.append([])
        elif event.get("cat") == "Node" and (match := _EVENT.fullmatch(event["name"])):
            found[-1].append((match[1], event["dur"]))
    return found[_WARM_UP:-1]
