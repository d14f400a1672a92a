"""The measurements of `validate`: the records behind FILE.validation.json."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from qcompress.gate.validation import Check, Validation
from qcompress.metrics.result import MetricResult
from qcompress_exporters.parity.noise import LayerNoise
from qcompress_exporters.parity.timing import Timing


@dataclass(frozen=True, slots=True, kw_only=True)
class OutputReport:
    """Comparison of one output of the file, as deployed, with the original's.

    Args:
        sqnr_db: signal to quantization noise ratio; None without noise, or if the original's output is constant.
        agreement: share of samples with the same largest entry; None unless the output holds one score per class.
        constant: whether the output, the file's or the original's, hardly varies over the data.
    """

    sqnr_db: float | None
    agreement: float | None
    constant: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class ParityReport:
    """All measurements of `validate`; `as_dict` is FILE.validation.json.

    Args:
        file: name, digest and bytes of the file.
        data: name, digest, samples and whether there are labels.
        checks: the three checks in both sessions.
        outputs: one report for each output, by name.
        metric: the user's metric; None without labels.
        layers: noise after each layer, or at each quantized activation, in the graph's order.
        runtime: shares of the noise at the outputs that come from onnxruntime's own optimizations.
        timing: latency, load time and memory, compared with the original's; None if not measured.
        activation_bits: bits at which each layer takes its activations, by its weight, None for floats; empty unless
            the file holds the grids of its activations.
        same_ops: whether onnxruntime's optimized graph of the file holds the same operators as the float file's.
        same_source: whether the file was exported from this model file; None if unknown.
        cpu: features that integer kernels depend on.
        notes: notes for the user.
    """

    file: Mapping[str, Any]
    data: Mapping[str, Any]
    checks: tuple[Check, ...]
    outputs: Mapping[str, OutputReport]
    metric: MetricResult | None
    layers: tuple[LayerNoise, ...]
    runtime: Mapping[str, float]
    timing: Timing | None
    same_ops: bool
    same_source: bool | None
    cpu: Mapping[str, bool | None]
    activation_bits: Mapping[str, int | None] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        """Whether all checks passed."""
        return all(check.ok for check in self.checks)

    @property
    def agreement(self) -> float | None:
        """Agreement of the first output that has one."""
        return next((o.agreement for o in self.outputs.values() if o.agreement is not None), None)

    @property
    def sqnr_db(self) -> float | None:
        """Lowest SQNR of all outputs, in dB; None without noise."""
        values = [o.sqnr_db for o in self.outputs.values() if o.sqnr_db is not None]
        return min(values) if values else None

    def as_dict(self) -> dict[str, Any]:
        """Return the JSON document that `gate` reads; see `qcompress.gate.validation`."""
        return Validation(
            file=self.file,
            data=self.data,
            checks=self.checks,
            outputs={name: asdict(output) for name, output in self.outputs.items()},
            agreement=self.agreement,
            sqnr_db=self.sqnr_db,
            metric=self.metric,
            layers=tuple(
                {**asdict(layer), "activation_bits": self.activation_bits.get(layer.layer)} for layer in self.layers
            ),
            activation_bits=self.activation_bits,
            runtime=self.runtime,
            timing=None if self.timing is None else asdict(self.timing),
            same_ops=self.same_ops,
            same_source=self.same_source,
            cpu=self.cpu,
            notes=self.notes,
        ).as_dict()
