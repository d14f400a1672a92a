"""A float model prepared for training: weights and activations fake-quantized where export will quantize them.

Weights get their quantizers as `torch.nn.utils.parametrize` parametrizations. Activations are quantized at the sites
of the program's graph, which runs in place of the model's own forward: operands of a sum are no module's input.
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

from qcompress.compressed.model import CompressedModel
from qcompress.deployment import DEFAULT, Deployment
from qcompress.errors import ConfigError, DataError
from qcompress.finetune.finalize import BatchNorm, Parts, compressed
from qcompress.finetune.live_graph import AtSite, LiveGraph
from qcompress.finetune.methods import Methods
from qcompress.graph.batchnorm import fold_with_factors, unfolded_names
from qcompress.graph.example_inputs import by_position
from qcompress.graph.layers import bias_of, weight_layers
from qcompress.graph.options import ProgramOptions
from qcompress.graph.program import FloatProgram, state_nodes
from qcompress.graph.sites import OUTPUT, Placement, activation_sites, mark
from qcompress.graph.tensors import program_tensors
from qcompress.graph.tracing import from_module
from qcompress.plan.combinations import set_to
from qcompress.plan.plan import Plan
from qcompress.plan.resolve import TensorPlan, resolve
from qcompress.quantizers import AbstractQuantizer
from qcompress.regularizers.places import Place

Inputs = Tensor | Sequence[Tensor] | Mapping[str, Tensor]

_KEPT: Final = 1 << 16  # values of a batch that the quantizer of a site starts from
_MEAN: Final = ".running_mean"


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
    deployment: Deployment = DEFAULT,
) -> "Prepared":
    """Attach quantizers to a model, to be trained in any loop.

    Args:
        model: a float module that torch.export can trace; its weights get parametrizations. With batchnorm="fold" it
            stays as it is, and a copy is trained.
        plan: bits of each weight, and activation_bits of what its layer takes.
        example_inputs: one batch: a tensor where there is one input, or several by position or by name.
        calibration: more batches that the quantizers of activations start from.
        methods: how values are quantized; None: weights with LSQ, activations with LSQ+.
        regularizers: each makes a module with a method `penalty()` for the model with its quantizers.
        placement: which activations are quantized; see `sites.activation_sites`.
        batchnorm: "train": as its modules do; "freeze": with stored statistics, while γ and β train; "fold": folded
            into the layers before training, and their biases train.
        deployment: the place where the trained model is to run.

    Raises:
        ConfigError: plan, methods and model do not go together.
        SourceError: the model cannot be traced.

    >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> tuned = prepare(model, Plan.from_flags(bits=2, activation_bits=4), example_inputs=(torch.randn(16, 4),))
    >>> tuned(torch.randn(3, 4)).shape, tuned.finalize().artifacts["0.weight"].bits
    (torch.Size([3, 2]), 2)
    """
    if batchnorm not in get_args(BatchNorm):
        raise ConfigError(f"batchnorm must be one of {', '.join(get_args(BatchNorm))}, got {batchnorm!r}.")
    methods = methods or Methods()
    if isinstance(example_inputs, Tensor):
        example_inputs = (example_inputs,)
    named = example_inputs if isinstance(example_inputs, Mapping) else by_position(model, tuple(example_inputs))
    arguments = tuple(inspect.signature(model.forward).parameters)
    arrays = {name: value.detach().cpu().numpy() for name, value in named.items()}
    if any(isinstance(module, AbstractQuantizer) for module in model.modules()):
        raise ConfigError("prepare must have a float model, got one that is prepared already: unwrap() it first.")
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    training, model.training = model.training, False  # a model that is to be trained needs no note that it was so
    try:
        traced = model if device.type == "cpu" else copy.deepcopy(model).cpu()
        program = from_module(traced, ProgramOptions(inputs=arrays))
    finally:
        model.training = training
    folded, factors = fold_with_factors(program)
    if batchnorm == "fold":
        model, program, factors = _folded_copy(model, program, folded), folded, {}
    resolved = resolve(plan, program_tensors(folded))
    layers, state = weight_layers(folded), program.state()
    made: dict[str, AbstractQuantizer] = {}
    for tensor in resolved.compressed:
        _check_trains(tensor)
        layer, weight = layers[tensor.name], state[tensor.name]
        channels = weight.shape[layer.axis]
        if tensor.name in factors and len(factors[tensor.name]) != channels:
            raise ConfigError(
                f"{tensor.name}: the BatchNorm behind a grouped transposed convolution fits no scale of its weight: "
                f'leave it in float ([name."{tensor.name}"] skip = true), or fold it (batchnorm="fold").'
            )
        made[tensor.name] = methods.weight(tensor.bits, layer, channels)
        made[tensor.name].initialise(weight.detach())
    if methods.bias_bits is not None:
        names = state_nodes(folded.exported)
        biases = [names[bias] for name in made if (bias := bias_of(layers[name].node)) is not None and bias in names]
        for name in biases:
            if name in state:
                made[name] = methods.bias()
                made[name].initialise(state[name].detach())
    widths = {t.name: t.activation_bits for t in resolved.compressed if t.activation_bits is not None}
    sites = activation_sites(folded, widths, placement)
    parts = Parts(program, folded, resolved, sites, batchnorm, arguments, deployment)
    prepared = Prepared(model, parts)
    prepared.initialise(methods, [example_inputs, *calibration])
    prepared.quantize_weights(made)
    prepared.regularizers.extend(make(model) for make in regularizers)
    return prepared


@final
class Prepared(nn.Module):
    """A model in training, its weights and activations quantized; from `prepare`.

    Call it in place of the model. `parameters()` are those of the model, of its quantizers and of its regularizers.
    """

    def __init__(self, model: nn.Module, parts: Parts) -> None:
        super().__init__()
        self.model, self.parts, self.training = model, parts, model.training
        self.activations, self.regularizers = nn.ModuleList(), nn.ModuleList()
        names = unfolded_names(parts.program, parts.folded)
        keys = [(names.get(s.name, s.name) if s.index == OUTPUT else s.name, s.index) for s in parts.sites]
        self._graph = LiveGraph(mark(parts.program, keys))
        self._homes = {name: home for name in self._graph.tensors if (home := _home(model, name)) is not None}
        for name in set(self._graph.tensors) - set(self._homes):  # what the graph made of the model's code
            constant = parts.program.state()[name].clone().to(next(model.parameters()).device)
            self.register_buffer(_constant(name), constant, persistent=False)
        trained = parts.batchnorm == "train"
        self._norms = {n: p.module for n, p in self._homes.items() if trained and isinstance(p.module, _BatchNorm)}

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the model returns, for the arguments that its forward takes."""
        return self._run(self._flat(args, kwargs), self._quantized)

    def penalty(self) -> Tensor:
        """The sum of all regularizers' terms, 0-d; 0 where there is none."""
        terms: list[Tensor] = [getattr(regularizer, "penalty")() for regularizer in self.regularizers]  # noqa: B009
        return torch.stack(terms).sum() if terms else torch.zeros(())

    def quantizers(self) -> dict[str, AbstractQuantizer]:
        """All of them: weights' by qualified name, activations' by the site's name."""
        sites = (f"{s.name} (activation)" for s in self.parts.sites)
        return self._weight_quantizers() | dict(zip(sites, self._activations, strict=True))

    def quantizer_parameters(self) -> list[nn.Parameter]:
        """What quantizers learn: it commonly has a learning rate of its own."""
        return [parameter for quantizer in self.quantizers().values() for parameter in quantizer.parameters()]

    @torch.no_grad()
    def first_not_finite(self, batch: Inputs) -> str | None:
        """The weight of the first layer that gives NaN or Inf for a batch, or the name of another first such value."""
        self._run(self._batch(batch), self._quantized, watch=True)
        return self._graph.first_not_finite

    def snap_offsets(self) -> None:
        """From now on keep the offsets of activations at multiples of their scales, which zero points stand for.

        A layer that pads its input with zeros computes in integers with no other offset: at the latest for the last
        steps.
        """
        for quantizer in self._activations:
            quantizer.snap_offset()

    def finalize(self) -> CompressedModel:
        """What has been trained, with the codes of the last step.

        Weights are stored as they were trained with, bit for bit; where a BatchNorm is folded, its γ/σ is multiplied
        into their scales.

        Raises:
            ConfigError: a trained tensor is not finite.
        """
        tensors = {name: getattr(place.module, place.attribute) for name, place in self._homes.items()}
        quantizers, planned = self._weight_quantizers(), {t.name for t in self.parts.resolved.compressed}
        weights = {
            name: quantizer.weight_artifact(self._homes[name].weight().detach())
            for name, quantizer in quantizers.items()
            if name in planned
        }
        grids = [q.activation_grid(s.key) for q, s in zip(self._activations, self.parts.sites, strict=True)]
        return compressed(self.parts, tensors, weights, grids)

    def unwrap(self) -> nn.Module:
        """The plain model again, with its float weights as they are now."""
        for name in self._weight_quantizers():
            place = self._homes[name]
            parametrize.remove_parametrizations(place.module, place.attribute, leave_parametrized=False)
        return self.model

    @torch.no_grad()
    def reestimate_batchnorm(self, batches: Iterable[Inputs]) -> None:
        """Set the statistics of all BatchNorms to the mean over some batches.

        Args:
            batches: as `forward` takes them.
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
        """Make the quantizers of the sites, from what the float model has there.

        Args:
            methods: how values are quantized.
            batches: as `forward` takes them.
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
        for site, values, has_negative in zip(self.parts.sites, seen, negative, strict=True):
            quantizer = methods.activation(site.bits, has_negative)
            quantizer.initialise([v.float() for v in values])
            self.activations.append(quantizer.to(values[0].device))

    def quantize_weights(self, quantizers: Mapping[str, AbstractQuantizer]) -> None:
        """Attach quantizers to weights, by qualified name."""
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
        tensors |= {name: getattr(place.module, place.attribute) for name, place in self._homes.items()}
        outputs = self._graph.outputs(tensors, inputs, at_site, self._norms, training=self.training, watch=watch)
        return pytree.tree_unflatten(outputs, self.parts.program.exported.call_spec.out_spec)

    def _flat(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Tensor]:
        """The tensors among forward's arguments in the program's order."""
        spec = self.parts.program.exported.call_spec.in_spec
        positional, by_name = pytree.tree_unflatten(range(spec.num_leaves), spec)
        given = dict(zip(self.parts.arguments, args, strict=False)) | dict(kwargs)
        wanted = [*self.parts.arguments[: len(positional)], *by_name]
        if len(args) > len(self.parts.arguments) or set(given) != set(wanted):
            raise DataError(
                f"The model was prepared with {', '.join(wanted)} as inputs, got {', '.join(given) or 'none'}."
            )
        return pytree.tree_leaves([given[name] for name in wanted])

    def _batch(self, batch: Inputs) -> list[Tensor]:
        """The same of one batch by itself."""
        if isinstance(batch, Mapping):
            return self._flat((), batch) if set(batch) <= set(self.parts.arguments) else self._flat((batch,), {})
        return self._flat((batch,) if isinstance(batch, Tensor) else batch, {})

    def _weight_quantizers(self) -> dict[str, AbstractQuantizer]:
        return {name: found for name, place in self._homes.items() if (found := place.quantizer()) is not None}


def _check_trains(tensor: TensorPlan) -> None:
    """Rejects fields that no quantizer for training supports."""
    assert tensor.settings is not None
    for field in tensor.settings.fields:
        if not field.trains and field.asks(getattr(tensor.settings, field.name)):
            raise ConfigError(
                f"{tensor.name}: {set_to(field, tensor.settings, tensor.origins)} is supported by post-hoc compression "
                "only; remove it from plans passed to prepare()."
            )


def _folded_copy(model: nn.Module, program: FloatProgram, folded: FloatProgram) -> nn.Module:
    """A copy of a model with the weights and biases of its folded program, and nothing in the BatchNorms' place."""
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
    """Where a model keeps a tensor; None: nowhere."""
    path, _, attribute = name.rpartition(".")
    try:
        module = model.get_submodule(path)
    except AttributeError:
        return None
    return Place(name, module, attribute) if isinstance(getattr(module, attribute, None), Tensor) else None
