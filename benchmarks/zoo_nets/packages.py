"""What torchvision needs to be imported where its C++ operators do not load."""

import functools
import importlib.util
from pathlib import Path

import torch

# torchvision gives these two a shape as it is imported; no net of the zoo calls them.
_OPERATORS = ("nms", "qnms")
_SCHEMA = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"


@functools.cache
def declare_torchvision_operators() -> torch.library.Library | None:
    """Declare the operators that torchvision's Python asks for, unless its library loads; call it before importing."""
    spec = importlib.util.find_spec("torchvision")
    if spec is None or spec.origin is None:
        return None
    try:
        for path in Path(spec.origin).parent.glob("_C*.so"):
            torch.ops.load_library(path)
            return None
    except OSError:  # it was built for another build of torch
        pass
    library = torch.library.Library("torchvision", "FRAGMENT")
    for name in _OPERATORS:
        library.define(name + _SCHEMA)
    return library  # the operators live as long as this
