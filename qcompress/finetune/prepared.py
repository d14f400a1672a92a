"""A model in training with quantized weights and activations.

Quantizers of weights are `torch.nn.utils.parametrize` parametrizations. Activations are quantized at the sites of the
program's graph, which runs instead of the model's own forward: operands of a sum are not the input of any module.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any, Final, final

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils import parametrize
from torch.utils import _pytree as pytree

from qcompress.compressed.model import CompressedModel
from qcompress.errors import DataError
from qcompress.finetune.bias_steps import BiasSteps, Scales
from qcompress.finetune.compiling import Compiler
from qcompress.finetune.finalize import Parts, compressed, drop_notes, left_out_notes
from qcompress.finetune.live_graph import AtSites, LiveGraph, LiveGraphs
from qcompress.finetune.methods import Methods, ObservedSite
from qcompress.graph.batchnorm import unfolded_names, with_split_norms
from qcompress.graph.marks import mark, padded_inputs
from qcompress.graph.sites import OUTPUT
from qcompress.graph.widths import activation_widths, widths_text
from qcompress.quantizers import AbstractQuantizer
from qcompress.regularizers.places import place_of

Inputs = Tensor | Sequence[Tensor] | Mapping[str, Tensor]

_FEW: Final = 3  # bits of an input at which half a step is much
_TINY: Final = 1e-30
_KEPT: Final = 1 << 16  # values per batch from which the quantizer of a site is initialised


@final
class Prepared(nn.Module):
    """A model in training with quantized weights and activations; made by `prepare`.

    Call it in place of the model. `parameters()` are those of the model, of its quantizers and of its regularizers.
    """

    def __init__(self, model: nn.Module, parts: Parts) -> None:
        super().__init__()
        self.model, self.parts, self.training = model, parts, model.training
        self.activations, self.regularizers = nn.ModuleList(), nn.ModuleList()
        self._attached: dict[str, AbstractQuantizer] = {}  # those of tensors, by qualified name
        self._compiler: Compiler | None = None
        self._notes: tuple[str, ...] = ()
        self._is_settled = False
        self._bias_steps: BiasSteps | None = None  # made when they are first needed
        program = with_split_norms(parts.program)
        names = unfolded_names(program, parts.folded)
        keys = [(names.get(s.name, s.name) if s.index == OUTPUT else s.name, s.index) for s in parts.sites]
        marked = mark(program, keys)
        self._free = {i for i in padded_inputs(marked) if parts.sites[i].bits <= _FEW}
        self._graphs = LiveGraphs(marked)
        self._places = {n: place for n in self._graphs.tensors if (place := place_of(model, n)) is not None}
        self._norms = {n: p.module for n, p in self._places.items() if isinstance(p.module, _BatchNorm)}
        for name in set(self._graphs.tensors) - set(self._places):  # constants in the model's code
            constant = parts.program.state()[name].clone().to(next(model.parameters()).device)
            self.register_buffer(_constant(name), constant, persistent=False)

    @property
    def notes(self) -> tuple[str, ...]:
        """What the user should know about the quantizers, the widths of activations and `compile`."""
        taken, asked = self.activation_bits(), self._asked_widths()
        others = asked and any(bits not in asked for bits in taken.values())
        return (*self._method_notes(), *([f"{widths_text(taken, asked)}."] if others else []))

    def _method_notes(self) -> tuple[str, ...]:
        failed = None if self._compiler is None else self._compiler.failure
        return self._notes if failed is None else (*self._notes, f"Training runs without torch.compile: {failed}")

    def _asked_widths(self) -> set[int]:
        return {t.activation_bits for t in self.parts.resolved.compressed if t.activation_bits is not None}

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Returns the model's outputs for the arguments of its forward."""
        return self._run(self._flat(args, kwargs), self._activations)

    def penalty(self, *, regularizers: bool = True) -> Tensor:
        """Returns the sum of the terms that belong to the loss beside the task's, 0-d; 0 if there are none.

        Args:
            regularizers: whether the regularizers' terms count, which stages of training leave out in some epochs. The
                quantizers' own terms, such as the decay of PACT, always count.
        """
        terms = [term for quantizer in self._all_quantizers() if (term := quantizer.penalty()) is not None]
        if regularizers:
            terms += [getattr(regularizer, "penalty")() for regularizer in self.regularizers]  # noqa: B009
        return torch.stack(terms).sum() if terms else torch.zeros((), device=next(self.model.parameters()).device)

    def quantizers(self) -> dict[str, AbstractQuantizer]:
        """Returns all quantizers: of weights by qualified name, of activations by the site's name."""
        sites = (f"{s.name} (activation)" for s in self.parts.sites)
        return self._attached | dict(zip(sites, self._activations, strict=True))

    def activation_bits(self) -> dict[str, int | None]:
        """Returns the bits at which each layer takes its activations, by its weight; None: it takes floats.

        They are not always those that the plan asks for: operands of sums have 8, and so do all layers that share them.
        """
        return activation_widths(self.parts.folded, {site.key: site.bits for site in self.parts.sites})

    def __repr__(self) -> str:
        """Returns the widths of weights and activations in a line."""
        bits = Counter(quantizer.bits for quantizer in self._planned_quantizers().values())
        weights = ", ".join(f"{count} at {width}" for width, count in sorted(bits.items()))
        asked = self._asked_widths()
        widths = f"; {widths_text(self.activation_bits(), asked)}" if asked else ""
        return f"Prepared({type(self.model).__name__}; bits of weights: {weights or 'none'}{widths})"

    def quantizer_parameters(self) -> list[nn.Parameter]:
        """Returns the parameters of all quantizers, which usually have their own learning rate."""
        return [parameter for quantizer in self._all_quantizers() for parameter in quantizer.parameters()]

    @torch.no_grad()
    def is_good(self, loss: Tensor) -> Tensor:
        """Returns whether loss and gradients are finite and no scale has collapsed: bool, 0-d, on the device.

        Call it between `backward` and the step of the optimizer. It does not wait for the device.

        Args:
            loss: 0-d.
        """
        checks = [loss.isfinite(), *(~found for q in self._all_quantizers() if (found := q.is_collapsed()) is not None)]
        gradients = [parameter.grad for parameter in self.parameters() if parameter.grad is not None]
        if gradients:  # the sum of sizes: that of squares overflows early, and a maximum may ignore NaN
            checks.append(torch.stack(torch._foreach_norm(gradients, 1)).isfinite().all())
        return torch.stack(checks).all()

    @torch.no_grad()
    def first_not_finite(self, batch: Inputs) -> str | None:
        """Returns the name of the first layer (its weight) or other value with NaN or Inf; None: all are finite."""
        graph, norms = self._live()
        return graph.first_not_finite(self._arguments(graph, self._batch(batch), self._activations, norms))

    def step(self, done: float) -> None:
        """Advances the schedules of quantizers that have one; call it before each step of training.

        Args:
            done: share of all steps that are done, in [0, 1].
        """
        for quantizer in self._attached.values():
            quantizer.advance(done)

    def hold_scales(self) -> None:
        """Drops the gradients of the weights' learned scales: the optimizer's next step leaves these as they are.

        Call it between `backward` and the step of the optimizer.
        """
        for name, quantizer in self._planned_quantizers().items():
            if quantizer.step_size(self._places[name].weight()) is not None:
                for parameter in quantizer.parameters():
                    parameter.grad = None

    def snap_offsets(self, *, inputs: bool = False) -> None:
        """Keeps the offsets of activations from now on at multiples of their scales, which zero points can store.

        Call it before the last steps: a layer that pads its input with zeros computes in integers only with such an
        offset.

        Args:
            inputs: whether offsets of the model's inputs snap, too, where they have up to 3 bits and all layers that
                take them pad them. Half a step is much at so few bits; with a free offset these layers compute in
                float.
        """
        for i, quantizer in enumerate(self._activations):
            if inputs or i not in self._free:
                quantizer.snap_offset()

    def settle(self, *, inputs: bool = False) -> None:
        """Computes from now on with what the file can hold: snapped offsets, biases of integer layers at whole steps.

        Call it before the last steps. BatchNorms then stay at their stored statistics, since the biases that the file
        holds have these folded in; γ and β train on. It does nothing where no activation is quantized.

        Args:
            inputs: see `snap_offsets`.
        """
        self.snap_offsets(inputs=inputs)
        self._is_settled = bool(self.parts.sites)

    def get_extra_state(self) -> dict[str, bool]:
        """Returns whether the model is settled, for the state dict."""
        return {"is_settled": self._is_settled}

    def set_extra_state(self, state: dict[str, bool]) -> None:
        """Restores whether the model is settled."""
        self._is_settled = state["is_settled"]

    def drops(self) -> dict[str, float]:
        """Returns by how much each weight will change in `finalize`, relative to its size, by qualified name.

        It is 0 for methods whose training computes with the weights that are stored.
        """
        found = self._planned_quantizers().items()
        return {name: quantizer.drop(self._places[name].weight().detach()) for name, quantizer in found}

    @torch.no_grad()
    def errors(self) -> dict[str, float]:
        """Returns the relative distance of each weight as it is stored from its float value, by qualified name."""
        found = {}
        for name, quantizer in self._planned_quantizers().items():
            weight, training = self._places[name].weight().detach(), quantizer.training
            distance = (quantizer.eval()(weight) - weight).norm() / weight.norm().clamp_min(_TINY)
            quantizer.train(training)
            found[name] = float(distance)
        return found

    def finalize(self) -> CompressedModel:
        """Returns the compressed model with the codes of the last step.

        Weights are stored bit for bit as the forward in eval mode uses them; γ/σ of a folded BatchNorm is multiplied
        into their scales. So are the biases of integer layers if the model is settled.

        Raises:
            ConfigError: a trained tensor is not finite.
        """
        return self._compressed(self._steps() if self._is_settled else None)

    def unwrap(self) -> nn.Module:
        """Removes the quantizers and returns the plain model with its current float weights."""
        for name in self._attached:
            place = self._places[name]
            parametrize.remove_parametrizations(place.module, place.attribute, leave_parametrized=False)
        self._attached = {}
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
            graph = self._graphs.with_norms(self._norms)
            graph.function(*self._arguments(graph, self._batch(batch), self._activations, self._norms))
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

        def observe(x: Tensor, index: int) -> Tensor:
            seen[index].append(x.reshape(-1)[:: max(1, x.numel() // _KEPT)])
            negative[index] |= bool((x < 0).any())
            return x

        training = [m for m in self.model.modules() if m.training]
        self.model.eval()
        for batch in batches if self.parts.sites else ():
            self._run(self._batch(batch), [partial(observe, index=i) for i in range(len(seen))])
        for module in training:
            module.training = True
        observed = [ObservedSite(s.name, s.bits, sign) for s, sign in zip(self.parts.sites, negative, strict=True)]
        self._notes = methods.notes(observed)
        for site, values in zip(observed, seen, strict=True):
            quantizer = methods.activation(site)
            quantizer.initialise([v.float() for v in values])
            self.activations.append(quantizer.to(values[0].device))

    def add_notes(self, notes: Iterable[str]) -> None:
        """Adds what the user should know."""
        self._notes += tuple(notes)

    def quantize_weights(self, quantizers: Mapping[str, AbstractQuantizer]) -> None:
        """Attaches quantizers to tensors of the model, by qualified name."""
        for name, quantizer in quantizers.items():
            place = self._places[name]
            device = place.weight().device
            parametrize.register_parametrization(place.module, place.attribute, quantizer.to(device))
        self._attached = {name: quantizers[name] for name in self._places if name in quantizers}

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """Lets torch.compile make few kernels of the graph and its quantizers, when a step of training first runs.

        That takes from seconds to minutes, once for each batch size up to the second. Evaluation is not compiled, and
        computes bit for bit what is stored. Where there is no compiler, training goes on without it, and `notes` says
        so.

        Args:
            args: none.
            kwargs: options of the compiler, as in torch.compile(options=...).
        """
        self._compiler = Compiler(kwargs)

    @property
    def _activations(self) -> list[AbstractQuantizer]:
        return [part for part in self.activations if isinstance(part, AbstractQuantizer)]

    def _live(self) -> tuple[LiveGraph, Mapping[str, nn.Module]]:
        """Returns the graph that runs now, and the BatchNorms that run as modules in it: those that train."""
        norms = self._norms if self.parts.batchnorm == "train" and not self._is_settled else {}
        return self._graphs.with_norms(norms), norms

    def _run(self, inputs: list[Tensor], at_sites: AtSites) -> Any:
        graph, norms = self._live()
        arguments = self._arguments(graph, inputs, at_sites, norms)
        if self._compiler is not None and self.training and torch.is_grad_enabled():
            outputs = self._compiler.run(graph.function, *arguments)
        else:
            outputs = graph.function(*arguments)
        return pytree.tree_unflatten(outputs, self.parts.program.exported.call_spec.out_spec)

    def _arguments(
        self, graph: LiveGraph, inputs: list[Tensor], at_sites: AtSites, norms: Mapping[str, nn.Module]
    ) -> list[Any]:
        """Returns the arguments of a live graph's function."""
        tensors = {name: getattr(self, _constant(name)) for name in self._graphs.tensors if name not in self._places}
        tensors |= self._used()
        if self._is_settled and not norms:
            tensors |= self._steps().used(tensors, self._scales(self._steps()))
        return graph.arguments(tensors, inputs, at_sites, norms, training=self.training)

    def _compressed(self, steps: BiasSteps | None) -> CompressedModel:
        quantizers = self._planned_quantizers()
        floats = {name: self._places[name].weight().detach() for name in quantizers}
        tensors = floats | {name: place.used() for name, place in self._places.items() if name not in quantizers}
        weights = {name: quantizer.weight_artifact(floats[name]) for name, quantizer in quantizers.items()}
        grids = [q.activation_grid(s.key) for q, s in zip(self._activations, self.parts.sites, strict=True)]
        remarks = [
            f"{name}: {said}." for name, q in quantizers.items() if (said := q.remark(weights[name])) is not None
        ]
        biases, notes = {}, [*self._method_notes(), *drop_notes(self.drops()), *remarks]
        if steps is not None:
            biases = steps.stored(tensors, self._scales(steps))
            notes += left_out_notes(steps.left_out)
        return compressed(self.parts, tensors, weights, grids, biases, tuple(notes))

    def _steps(self) -> BiasSteps:
        """Returns the biases that are kept at whole steps; found once, in what training would end with now."""
        if self._bias_steps is None:
            self._bias_steps = BiasSteps.of(self.parts.program, self._compressed(None))
        return self._bias_steps

    def _scales(self, steps: BiasSteps) -> Scales:
        places = {bias.weight: self._places[bias.weight] for bias in steps.biases}
        quantizers = self._attached
        weights = {name: quantizers[name].weight_scale(place.weight()) for name, place in places.items()}
        return Scales(weights, [quantizer.activation_scale() for quantizer in self._activations])

    def _used(self) -> dict[str, Tensor]:
        """Returns the model's tensors as the forward uses them; weights whose quantizers have one class in one go."""
        by_class: dict[type[AbstractQuantizer], list[str]] = {}
        for name, quantizer in self._attached.items():
            by_class.setdefault(type(quantizer), []).append(name)
        found = {name: place.used() for name, place in self._places.items() if name not in self._attached}
        for kind, names in by_class.items():
            weights = [self._places[name].weight() for name in names]
            found.update(zip(names, kind.together([self._attached[name] for name in names], weights), strict=True))
        return found

    def _flat(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Tensor]:
        """Returns the tensors among forward's arguments, or by the program's names, in the program's order."""
        names = self.parts.program.input_names
        if not args and set(kwargs) == set(names):
            return [kwargs[name] for name in names]
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
            known = {*self.parts.arguments}, {*self.parts.program.input_names}
            return self._flat((), batch) if any(set(batch) <= names for names in known) else self._flat((batch,), {})
        return self._flat((batch,) if isinstance(batch, Tensor) else batch, {})

    def _planned_quantizers(self) -> dict[str, AbstractQuantizer]:
        """Returns the quantizers of the plan's weights: all but those of biases."""
        planned = {t.name for t in self.parts.resolved.compressed}
        return {name: quantizer for name, quantizer in self._attached.items() if name in planned}

    def _all_quantizers(self) -> list[AbstractQuantizer]:
        return [*self._attached.values(), *self._activations]


def _constant(name: str) -> str:
    return "constant_" + name.replace(".", "_")
