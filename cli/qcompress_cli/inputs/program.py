"""MODEL as a float program, traced with the example input that the user gave."""

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from qcompress.errors import ConfigError, did_you_mean
from qcompress.graph.options import ProgramOptions
from qcompress.sources.base import Source
from qcompress_cli.inputs.project import RunOptions
from qcompress_cli.terminal.console import Ui

if TYPE_CHECKING:
    from qcompress.graph.program import FloatProgram


def open_program(source: Source, given: RunOptions, ui: Ui, options: ProgramOptions | None = None) -> "FloatProgram":
    """Trace a source.

    Args:
        source: the opened MODEL.
        given: the run's options; --input-shape, else --data, else --calibration gives the example input.
        ui: shows the program's notes.
        options: names and dynamic axes that the program must have, where they are known already.

    Raises:
        DataError: the example input does not fit the model.
    """
    options = options or ProgramOptions()
    device(given)  # fails at once where there is no such device; tracing itself runs on the CPU
    inputs = example_inputs(given)
    program = source.program(
        replace(
            options,
            shares=True,  # nothing but this command has the model
            inputs=inputs,
            dynamic={(d.name, d.axis): d.label for d in given.dynamic} or options.dynamic,
            fixed_batch="example" if given.fixed_batch else None if given.dynamic else options.fixed_batch,
            input_names=given.input_names or options.input_names,
            output_names=given.output_names or options.output_names,
        )
    )
    _check_input_shapes(program, given)
    if inputs is not None:
        _check_fits(program, inputs)
    for note in program.notes:
        ui.note(note)
    return program


def _check_input_shapes(program: "FloatProgram", given: RunOptions) -> None:
    """Reject a name that the model does not have, even where the shape alone would do."""
    from qcompress.graph.tracing import input_names_of

    legal = dict.fromkeys((*program.input_names, *input_names_of(program)))
    for shape in given.input_shape:
        if shape.name is not None and shape.name not in legal:
            hint = did_you_mean(shape.name, legal)
            raise ConfigError(f"--input-shape: the model has no input {shape.name!r}; it has {', '.join(legal)}.{hint}")


def _check_fits(program: "FloatProgram", inputs: Mapping[str, npt.NDArray[Any]]) -> None:
    """Reject data of another model: an exported program is not traced again, so nothing else would notice."""
    renamed = not set(inputs) & set(program.input_names) and len(inputs) == len(program.input_names)
    arrays = dict(zip(program.input_names, inputs.values(), strict=True)) if renamed else inputs
    batch = program.fixed_batch
    program.bind(
        arrays if batch is None else {n: a if a.ndim == 0 else _of_length(a, batch) for n, a in arrays.items()}
    )


def _of_length(values: npt.NDArray[Any], length: int) -> npt.NDArray[Any]:
    return np.concatenate([values] * -(-length // max(1, len(values))))[:length]


def example_inputs(given: RunOptions) -> Mapping[str, npt.NDArray[Any]] | None:
    """Return one example batch, or None where the user gave no inputs."""
    if given.input_shape:
        unnamed = [s for s in given.input_shape if s.name is None]
        if unnamed and len(given.input_shape) > 1:
            raise ConfigError("Each of several --input-shape must have a name: --input-shape ids=1,128:int64.")
        random = np.random.default_rng(0)
        return {
            s.name or "x": random.standard_normal(s.shape).astype(s.dtype)
            if np.dtype(s.dtype).kind == "f"
            else np.zeros(s.shape, s.dtype)
            for s in given.input_shape
        }
    for spec, flag in ((given.data, "--data"), (given.calibration, "--calibration")):
        if spec:
            from qcompress.data.reader import open_data

            return open_data(spec, transform=given.transform, what=flag).example()
    return None


def device(given: RunOptions) -> str:
    """Return `cpu` or `cuda`; for `auto`, `cuda` where torch can use a GPU.

    Raises:
        ConfigError: cuda was asked for, and torch can use no GPU.
    """
    if given.device == "cpu":
        return "cpu"
    import torch

    if torch.cuda.is_available():
        return "cuda"
    if given.device == "cuda":
        raise ConfigError("--device cuda needs a GPU that torch can use, but there is no such GPU; use auto or cpu.")
    return "cpu"
