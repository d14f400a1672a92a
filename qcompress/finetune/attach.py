"""Prepares a float model for training: weights and activations are fake-quantized where export will quantize them."""

import copy
import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import get_args

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils.parametrize import ParametrizationList

from qcompress.deployment import DEFAULT, Deployment
from qcompress.errors import ConfigError
from qcompress.finetune.finalize import BatchNorm, Parts
from qcompress.finetune.held import held
from qcompress.finetune.methods import Methods
from qcompress.finetune.prepared import Inputs, Prepared
from qcompress.graph.batchnorm import fold_with_factors
from qcompress.graph.conversion import to_numpy
from qcompress.graph.example_inputs import by_position
from qcompress.graph.layers import LAYER_KINDS, Layer, bias_of, weight_layers
from qcompress.graph.options import ProgramOptions
from qcompress.graph.program import FloatProgram, state_nodes
from qcompress.graph.sites import Placement, activation_sites
from qcompress.graph.tensors import program_tensors
from qcompress.graph.tracing import from_module
from qcompress.plan.plan import Plan
from qcompress.plan.resolve import Named, ResolvedPlan, resolve
from qcompress.quantizers import AbstractQuantizer
from qcompress.regularizers.places import place_of


def prepare(
    model: nn.Module | FloatProgram,
    plan: Plan,
    *,
    example_inputs: Inputs,
    program: FloatProgram | None = None,
    calibration: Iterable[Inputs] = (),
    methods: Methods | None = None,
    regularizers: Iterable[Callable[[nn.Module], nn.Module]] = (),
    placement: Placement = "deploy",
    batchnorm: BatchNorm = "train",
    deployment: Deployment = DEFAULT,
) -> Prepared:
    """Attaches quantizers to a model, which can then be trained in any loop.

    Args:
        model: a float module that torch.export can trace; its weights get parametrizations. With batchnorm="fold" it
            is not modified, and a copy is trained. Of a float program a copy is trained; its BatchNorms keep their
            statistics, and what drops values at random does not, because it was exported for evaluation.
        plan: `bits` of each weight, and `activation_bits` of its layer's input.
        example_inputs: one batch: a tensor for a model with one input, or several by position or by name.
        program: the model's program, if it was traced already: with `computes=False`, since the model trains the
            tensors that it holds.
        calibration: further batches from which the quantizers of activations are initialised.
        methods: how values are quantized; None: weights with LSQ, activations with LSQ+.
        regularizers: each is called with the model after its quantizers are attached, and returns a module with a
            method `penalty()`.
        placement: which activations are quantized; see `sites.activation_sites`.
        batchnorm: "train": as the model's modules do; "freeze": with stored statistics, while γ and β train; "fold":
            folded into the layers before training, and their biases train.
        deployment: the place where the trained model is to run.

    Raises:
        ConfigError: an argument is invalid, or plan, methods and model conflict.
        SourceError: the model cannot be traced.

    >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> tuned = prepare(model, Plan.from_flags(bits=2, activation_bits=4), example_inputs=(torch.randn(16, 4),))
    >>> tuned(torch.randn(3, 4)).shape, tuned.finalize().artifacts["0.weight"].bits
    (torch.Size([3, 2]), 2)
    """
    if batchnorm not in get_args(BatchNorm):
        raise ConfigError(f"batchnorm must be one of {', '.join(get_args(BatchNorm))}, got {batchnorm!r}.")
    if isinstance(model, nn.Module) and any(isinstance(module, AbstractQuantizer) for module in model.modules()):
        raise ConfigError("prepare needs a float model, but this one is already prepared; call unwrap() on it first.")
    methods = methods or Methods()
    if isinstance(example_inputs, Tensor):
        example_inputs = (example_inputs,)
    if isinstance(model, FloatProgram):
        program, model = model, held(model)
        batchnorm = "freeze" if batchnorm == "train" else batchnorm
        arguments = program.input_names
    else:
        arguments = tuple(inspect.signature(model.forward).parameters)
        if program is None:
            program = _traced(model, example_inputs)
        else:
            _check_same_tensors(model, program)
    folded, factors = fold_with_factors(program)
    if batchnorm == "fold":
        model, program, factors = _folded_copy(model, program, folded), folded, {}
    resolved = resolve(plan, [t if _trains(model, t) else t._replace(kind="other") for t in program_tensors(folded)])
    state, layers = program.state(), weight_layers(folded)
    weight_notes = methods.weight_notes({t.name: t.bits for t in resolved.compressed})
    quantizers = _weight_quantizers(resolved, layers, state, methods)
    _check_batchnorm(quantizers, layers, state, factors)
    without_bias: list[str] = []
    if methods.bias_bits is not None:
        names = state_nodes(folded.exported)
        biases = {name: names.get(node) for name in quantizers if (node := bias_of(layers[name].node)) is not None}
        without_bias = [name for name in quantizers if biases.get(name) not in state]
        quantizers |= _bias_quantizers((name for name in biases.values() if name in state), state, methods)
    widths = {t.name: t.activation_bits for t in resolved.compressed if t.activation_bits is not None}
    sites = activation_sites(folded, widths, placement, deployment.fused)
    methods.check_sites([site.name for site in sites])
    parts = Parts(program, folded, resolved, sites, batchnorm, arguments, deployment)
    prepared = Prepared(model, parts)
    prepared.initialise(methods, [example_inputs, *calibration])
    prepared.add_notes(weight_notes)
    prepared.add_notes(methods.bias_notes(without_bias))
    prepared.quantize_weights(quantizers)
    prepared.regularizers.extend(make(model) for make in regularizers)
    return prepared


def _traced(model: nn.Module, example_inputs: Sequence[Tensor] | Mapping[str, Tensor]) -> FloatProgram:
    named = example_inputs if isinstance(example_inputs, Mapping) else by_position(model, tuple(example_inputs))
    arrays = {name: to_numpy(value) for name, value in named.items()}
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    training, model.training = model.training, False  # training mode is intended here: tracing should not note it
    try:
        traced = model if device.type == "cpu" else copy.deepcopy(model).cpu()
        return from_module(traced, ProgramOptions(inputs=arrays, computes=False))
    finally:
        model.training = training


def _check_same_tensors(model: nn.Module, program: FloatProgram) -> None:
    """Rejects a program that holds other values than the model, such as weights that it computed once."""
    for name, value in program.state().items():
        place = place_of(model, name)
        held = None if place is None else place.weight().detach()
        if held is not None and not (
            held.shape == value.shape and torch.allclose(held.to(value), value.detach(), rtol=0, atol=0, equal_nan=True)
        ):
            raise ConfigError(
                f"program must hold the tensors of the model, but {name} has other values in it; trace the model "
                "again, with ProgramOptions(computes=False)."
            )


def _trains(model: nn.Module, tensor: Named) -> bool:
    """Returns whether a tensor can get a quantizer: the weights of layers can, others if they are parameters."""
    if tensor.kind in LAYER_KINDS or tensor.kind == "embedding":
        return True
    place = place_of(model, tensor.name)
    return (
        place is not None
        and not isinstance(place.module, ParametrizationList)
        and isinstance(place.weight(), nn.Parameter)
    )


def _weight_quantizers(
    resolved: ResolvedPlan, layers: Mapping[str, Layer], state: Mapping[str, Tensor], methods: Methods
) -> dict[str, AbstractQuantizer]:
    """Returns the initialised quantizers of the plan's weights, by qualified name."""
    made: dict[str, AbstractQuantizer] = {}
    for tensor in resolved.compressed:
        axis, weight = layers[tensor.name].axis if tensor.name in layers else 0, state[tensor.name]
        made[tensor.name] = methods.weight(tensor, axis, weight.shape[axis])
        made[tensor.name].initialise(weight.detach())
    return made


def _bias_quantizers(
    biases: Iterable[str], state: Mapping[str, Tensor], methods: Methods
) -> dict[str, AbstractQuantizer]:
    """Returns the initialised quantizers of biases."""
    made = {name: methods.bias() for name in biases}
    for name, quantizer in made.items():
        quantizer.initialise(state[name].detach())
    return made


def _check_batchnorm(
    quantized: Iterable[str], layers: Mapping[str, Layer], state: Mapping[str, Tensor], factors: Mapping[str, Tensor]
) -> None:
    """Rejects weights into whose scale the factors of their BatchNorm cannot be multiplied afterwards."""
    for name in quantized:
        if name in factors and len(factors[name]) != state[name].shape[layers[name].axis]:
            raise ConfigError(
                f"{name}: the BatchNorm after a grouped transposed convolution cannot be folded into the scale of its "
                f'weight; leave the weight in float ([name."{name}"] skip = true), or fold the BatchNorm before '
                'training (batchnorm="fold").'
            )


def _folded_copy(model: nn.Module, program: FloatProgram, folded: FloatProgram) -> nn.Module:
    """Returns a copy of a model with the weights and biases of its folded program; its BatchNorms become identities."""
    copied, state, device = copy.deepcopy(model), folded.state(), next(model.parameters()).device
    for name, value in state.items():
        path, _, attribute = name.rpartition(".")
        place = place_of(copied, name)
        if isinstance(value, nn.Parameter) and (place is not None or name not in program.state()):
            trained = nn.Parameter(value.detach().clone().to(device))
            copied.get_submodule(path).register_parameter(attribute, trained)
    for path, module in list(copied.named_modules()):
        if isinstance(module, _BatchNorm) and f"{path}.running_mean" not in state:
            parent, _, attribute = path.rpartition(".")
            setattr(copied.get_submodule(parent), attribute, nn.Identity())
    return copied
