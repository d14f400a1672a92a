"""A float model prepared for training: weights and activations fake-quantized where export will quantize them.

Quantizers of weights are `torch.nn.utils.parametrize` parametrizations. Activations are quantized at the sites of the
program's graph, which runs instead of the model's own forward: operands of a sum are not the input of any module.
"""

import copy
import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Final, final, get_args

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils import parametrize
from torch.utils import _pytree as pytree

from qcompress.batchnorm import fold_with_factors, unfolded_names
from qcompress.compressed import CompressedModel
from qcompress.errors import ConfigError, DataError
from qcompress.finetune.finalize import BatchNorm, Parts, compressed
from qcompress.finetune.live_graph import AtSite, LiveGraph
from qcompress.finetune.methods import Methods, ObservedSite
from qcompress.layers import Layer, bias_of, weight_layers
from qcompress.plan import Plan, ResolvedPlan, TensorPlan, resolve
from qcompress.posthoc.compress import by_position, program_tensors
from qcompress.program import FloatProgram, state_nodes
from qcompress.quantizers import AbstractQuantizer
from qcompress.regularizers.places import Place
from qcompress.sites import OUTPUT, Placement, activation_sites, mark
from qcompress.sources.base import ProgramOptions
from qcompress.tracing import from_module

Inputs = Tensor | Sequence[Tensor] | Mapping[str, Tensor]

_KEPT: Final = 1 << 16  # values per batch from which the quantizer of a site is initialised


def prepare(
    model: nn.Module,
    plan: Plan,
    *,
    example_inputs: Inputs,
    calibration: Iterable[Inputs] = (),
    methods: Methods | None = None,
    regularizers: Iterable[Callable[[nn.Module], nn.Module]] = (),
    placement: Placement = "deploy",
    batchnorm: BatchNorm = "train",
) -> "Prepared":
    """Attaches quantizers to a model, which can then be trained in any loop.

    Args:
        model: a float module that torch.export can trace; its weights get parametrizations. With batchnorm="fold" it
            is not modified, and a copy is trained.
        plan: `bits` of each weight, and `activation_bits` of its layer's input.
        example_inputs: one batch: a tensor for a model with one input, or several by position or by name.
        calibration: further batches from which the quantizers of activations are initialised.
        methods: how values are quantized; None: weights with LSQ, activations with LSQ+.
        regularizers: each is called with the model after its quantizers are attached, and returns a module with a
            method `penalty()`.
        placement: which activations are quantized; see `sites.activation_sites`.
        batchnorm: "train": as the model's modules do; "freeze": with stored statistics, while γ and β train; "fold":
            folded into the layers before training, and their biases train.

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
    if any(isinstance(module, AbstractQuantizer) for module in model.modules()):
        raise ConfigError("prepare needs a float model, but this one is already prepared; call unwrap() on it first.")
    methods = methods or Methods()
    if isinstance(example_inputs, Tensor):
        example_inputs = (example_inputs,)
    arguments = tuple(inspect.signature(model.forward).parameters)
    program = _traced(model, example_inputs)
    folded, factors = fold_with_factors(program)
    if batchnorm == "fold":
        model, program, factors = _folded_copy(model, program, folded), folded, {}
    resolved = resolve(plan, program_tensors(folded))
    state, layers = program.state(), weight_layers(folded)
    quantizers = _weight_quantizers(resolved, layers, state, methods)
    _check_batchnorm(quantizers, layers, state, factors)
    if methods.bias_bits is not None:
        nodes = [bias_of(layers[name].node) for name in quantizers]
        names = state_nodes(folded.exported)
        biases = [names[node] for node in nodes if node is not None and node in names]
        quantizers |= _bias_quantizers(biases, state, methods)
    widths = {t.name: t.activation_bits for t in resolved.compressed if t.activation_bits is not None}
    parts = Parts(program, folded, resolved, activation_sites(folded, widths, placement), batchnorm, arguments)
    prepared = Prepared(model, parts)
    prepared.initialise(methods, [example_inputs, *calibration])
    prepared.quantize_weights(quantizers)
    prepared.regularizers.extend(make(model) for make in regularizers)
    return prepared


def _traced(model: nn.Module, example_inputs: Sequence[Tensor] | Mapping[str, Tensor]) -> FloatProgram:
    named = example_inputs if isinstance(example_inputs, Mapping) else by_position(model, tuple(example_inputs))
    arrays = {name: value.detach().cpu().numpy() for name, value in named.items()}
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    training, model.training = model.training, False  # training mode is intended here: tracing should not note it
    try:
        traced = model if device.type == "cpu" else copy.deepcopy(model).cpu()
        return from_module(traced, ProgramOptions(inputs=arrays))
    finally:
        model.training = training


def _weight_quantizers(
    resolved: ResolvedPlan, layers: Mapping[str, Layer], state: Mapping[str, Tensor], methods: Methods
) -> dict[str, AbstractQuantizer]:
    """Returns the initialised quantizers of the plan's weights, by qualified name."""
    made: dict[str, AbstractQuantizer] = {}
    for tensor in resolved.compressed:
        _check_trains(tensor)
        layer, weight = layers[tensor.name], state[tensor.name]
        made[tensor.name] = methods.weight(tensor.bits, layer, weight.shape[layer.axis])
        made[tensor.name].initialise(weight.detach())
    return made


def _bias_quantizers(
    biases: Iterable[str], state: Mapping[str, Tensor], methods: Methods
) -> dict[str, AbstractQuantizer]:
    """Returns the initialised quantizers of those biases that the model has before BatchNorm is folded."""
    made = {name: methods.bias() for name in biases if name in state}
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


@final
class Prepared(nn.Module):
    """A model in training with quantized weights and activations; made by `prepare`.

    Call it in place of the model. `parameters()` are those of the model, of its quantizers and of its regularizers.
    `notes` tells what the user should know about the quantizers.
    """

    def __init__(self, model: nn.Module, parts: Parts) -> None:
        super().__init__()
        self.model, self.parts, self.training = model, parts, model.training
        self.activations, self.regularizers = nn.ModuleList(), nn.ModuleList()
        self.notes: tuple[str, ...] = ()
        names = unfolded_names(parts.program, parts.folded)
        keys = [(names.get(s.name, s.name) if s.index == OUTPUT else s.name, s.index) for s in parts.sites]
        self._graph = LiveGraph(mark(parts.program, keys))
        self._homes = {name: home for name in self._graph.tensors if (home := _home(model, name)) is not None}
        for name in set(self._graph.tensors) - set(self._homes):  # constants in the model's code
            constant = parts.program.state()[name].clone().to(next(model.parameters()).device)
            self.register_buffer(_constant(name), constant, persistent=False)
        trained = parts.batchnorm == "train"
        self._norms = {n: p.module for n, p in self._homes.items() if trained and isinstance(p.module, _BatchNorm)}

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Returns the model's outputs for the arguments of its forward."""
        return self._run(self._flat(args, kwargs), self._quantized)

    def penalty(self) -> Tensor:
        """Returns the sum of all regularizers' terms, 0-d; 0 without regularizers."""
        terms: list[Tensor] = [getattr(regularizer, "penalty")() for regularizer in self.regularizers]  # noqa: B009
        return torch.stack(terms).sum() if terms else torch.zeros(())

    def quantizers(self) -> dict[str, AbstractQuantizer]:
        """Returns all quantizers: of weights by qualified name, of activations by the site's name."""
        sites = (f"{s.name} (activation)" for s in self.parts.sites)
        return self._weight_quantizers() | dict(zip(sites, self._activations, strict=True))

    def quantizer_parameters(self) -> list[nn.Parameter]:
        """Returns the parameters of all quantizers, which usually have their own learning rate."""
        return [parameter for quantizer in self.quantizers().values() for parameter in quantizer.parameters()]

    @torch.no_grad()
    def first_not_finite(self, batch: Inputs) -> str | None:
        """Returns the name of the first layer (its weight) or other value with NaN or Inf; None: all are finite."""
        self._run(self._batch(batch), self._quantized, watch=True)
        return self._graph.first_not_finite

    def snap_offsets(self) -> None:
        """Keeps the offsets of activations from now on at multiples of their scales, which zero points can store.

        Call it before the last steps: a layer that pads its input with zeros computes in integers only with such an
        offset.
        """
        for quantizer in self._activations:
            quantizer.snap_offset()

    def finalize(self) -> CompressedModel:
        """Returns the compressed model with the codes of the last step.

        Weights are stored bit for bit as the forward uses them; γ/σ of a folded BatchNorm is multiplied into their
        scales.

        Raises:
            ConfigError: a trained tensor is not finite.
        """
        tensors = {name: place.used() for name, place in self._homes.items()}
        quantizers, planned = self._weight_quantizers(), {t.name for t in self.parts.resolved.compressed}
        weights = {
            name: quantizer.weight_artifact(self._homes[name].weight().detach())
            for name, quantizer in quantizers.items()
            if name in planned
        }
        grids = [q.activation_grid(s.key) for q, s in zip(self._activations, self.parts.sites, strict=True)]
        return compressed(self.parts, tensors, weights, grids, self.notes)

    def unwrap(self) -> nn.Module:
        """Removes the quantizers and returns the plain model with its current float weights."""
        for name in self._weight_quantizers():
            place = self._homes[name]
            parametrize.remove_parametrizations(place.module, place.attribute, leave_parametrized=False)
        return self.model

    @torch.no_grad()
    def reestimate_batchnorm(self, batches: Iterable[Inputs]) -> None:
        """Sets the statistics of all BatchNorms to the mean over some batches.

        Args:
            batches: arguments of `forward`.
        """
        norms = [m for m in self.model.modules() if isinstance(m, _BatchNorm) and m.running_mean is not None]
        kept = [(norm, norm.momentum, norm.training) for norm in norms]
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum, norm.training = None, True
        for batch in batches:
            self._run(self._batch(batch), self._quantized)
        for norm, momentum, training in kept:
            norm.momentum, norm.training = momentum, training

    @torch.no_grad()
    def initialise(self, methods: Methods, batches: Iterable[Inputs]) -> None:
        """Makes the quantizers of the sites and initialises them from the float model's values there.

        Args:
            methods: how activations are quantized.
            batches: arguments of `forward`.
        """
        seen: list[list[Tensor]] = [[] for _ in self.parts.sites]
        negative = [False] * len(seen)

        def observe(index: int, x: Tensor) -> Tensor:
            seen[index].append(x.reshape(-1)[:: max(1, x.numel() // _KEPT)])
            negative[index] |= bool((x < 0).any())
            return x

        training = [m for m in self.model.modules() if m.training]
        self.model.eval()
        for batch in batches if self.parts.sites else ():
            self._run(self._batch(batch), observe)
        for module in training:
            module.training = True
        observed = [ObservedSite(s.name, s.bits, sign) for s, sign in zip(self.parts.sites, negative, strict=True)]
        self.notes = methods.notes(observed)
        for site, values in zip(observed, seen, strict=True):
            quantizer = methods.activation(site)
            quantizer.initialise([v.float() for v in values])
            self.activations.append(quantizer.to(values[0].device))

    def quantize_weights(self, quantizers: Mapping[str, AbstractQuantizer]) -> None:
        """Attaches quantizers to tensors of the model, by qualified name."""
        for name, quantizer in quantizers.items():
            place = self._homes[name]
            device = place.weight().device
            parametrize.register_parametrization(place.module, place.attribute, quantizer.to(device))

    @property
    def _activations(self) -> list[AbstractQuantizer]:
        return [part for part in self.activations if isinstance(part, AbstractQuantizer)]

    def _quantized(self, index: int, x: Tensor) -> Tensor:
        quantized: Tensor = self.activations[index](x)
        return quantized

    def _run(self, inputs: list[Tensor], at_site: AtSite, *, watch: bool = False) -> Any:
        tensors = {name: getattr(self, _constant(name)) for name in self._graph.tensors if name not in self._homes}
        tensors |= {name: place.used() for name, place in self._homes.items()}
        outputs = self._graph.outputs(tensors, inputs, at_site, self._norms, training=self.training, watch=watch)
        return pytree.tree_unflatten(outputs, self.parts.program.exported.call_spec.out_spec)

    def _flat(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Tensor]:
        """Returns the tensors among forward's arguments in the program's order."""
        spec = self.parts.program.exported.call_spec.in_spec
        positional, by_name = pytree.tree_unflatten(range(spec.num_leaves), spec)
        given = dict(zip(self.parts.arguments, args, strict=False)) | dict(kwargs)
        wanted = [*self.parts.arguments[: len(positional)], *by_name]
        if len(args) > len(self.parts.arguments) or set(given) != set(wanted):
            raise DataError(
                f"The model was prepared with the inputs {', '.join(wanted)}, got {', '.join(given) or 'no inputs'}."
            )
        return pytree.tree_leaves([given[name] for name in wanted])

    def _batch(self, batch: Inputs) -> list[Tensor]:
        """Returns the tensors of one batch in the program's order."""
        if isinstance(batch, Mapping):
            return self._flat((), batch) if set(batch) <= set(self.parts.arguments) else self._flat((batch,), {})
        return self._flat((batch,) if isinstance(batch, Tensor) else batch, {})

    def _weight_quantizers(self) -> dict[str, AbstractQuantizer]:
        return {name: found for name, place in self._homes.items() if (found := place.quantizer()) is not None}


def _check_trains(tensor: TensorPlan) -> None:
    """Rejects fields for palettes and blocks, which no quantizer for training supports."""
    assert tensor.settings is not None
    for field, plain in (("rows_per_lut", "auto"), ("vector_dim", 1), ("block_size", None), ("lut_dtype", None)):
        value = getattr(tensor.settings, field)
        if value not in (plain, None):
            raise ConfigError(
                f"{tensor.name}: {field} = {value} ({tensor.origins[field]}) is supported by post-hoc compression "
                "only; remove it from plans passed to prepare()."
            )


def _folded_copy(model: nn.Module, program: FloatProgram, folded: FloatProgram) -> nn.Module:
    """Returns a copy of a model with the weights and biases of its folded program; its BatchNorms become identities."""
    copied, state, device = copy.deepcopy(model), folded.state(), next(model.parameters()).device
    for name, value in state.items():
        path, _, attribute = name.rpartition(".")
        home = _home(copied, name)
        if isinstance(value, nn.Parameter) and (home is not None or name not in program.state()):
            trained = nn.Parameter(value.detach().clone().to(device))
            copied.get_submodule(path).register_parameter(attribute, trained)
    for path, module in list(copied.named_modules()):
        if isinstance(module, _BatchNorm) and f"{path}.running_mean" not in state:
            parent, _, attribute = path.rpartition(".")
            setattr(copied.get_submodule(parent), attribute, nn.Identity())
    return copied


def _constant(name: str) -> str:
    return "constant_" + name.replace(".", "_")


def _home(model: nn.Module, name: str) -> Place | None:
    """Returns the place in a model that holds a tensor; None: the model has no tensor of that name."""
    path, _, attribute = name.rpartition(".")
    try:
        module = model.get_submodule(path)
    except AttributeError:
        return None
    return Place(name, module, attribute) if isinstance(getattr(module, attribute, None), Tensor) else None
