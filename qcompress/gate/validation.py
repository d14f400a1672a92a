"""The measurements of one file: the document that `validate` writes and `gate` reads.

This is the only place that knows its keys; docs/json.md explains them to users. Imports neither numpy nor onnx.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Final, final

from qcompress.errors import SourceError
from qcompress.metrics.result import MetricResult

FORMAT: Final = 1


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """The result of one of the three parity checks.

    Args:
        name: `weights`, `graph` or `exporter`.
        session: `exact` or `deployed`.
        ok: whether it passed.
        error: largest difference of an output over its spread; None for weights, or if there is no spread.
        limit: the largest `error` that passes.
        detail: a one-line explanation.
    """

    name: str
    session: str
    ok: bool
    error: float | None
    limit: float
    detail: str


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Validation:
    """The measurements of `validate` on one file.

    Args:
        file: name, digest and bytes of the file.
        data: name, digest and samples of the data, and whether it has labels.
        checks: the three checks in both sessions.
        outputs: SQNR, agreement and `constant` by name of the output.
        agreement: agreement of the first output that has one.
        sqnr_db: lowest SQNR of all outputs, in dB; None without noise.
        metric: result of the user's metric; None without labels.
        layers: SQNR after each layer, or at each quantized activation, and the bits at which the layer takes its own.
        activation_bits: bits at which each layer takes its activations, by its weight; None: it takes floats.
        runtime: shares of the noise that come from onnxruntime's own optimizations.
        timing: latency, load time and memory, compared with the original's; None if not measured.
        same_ops: whether onnxruntime's optimized graphs of file and original hold the same operators; None if unknown.
        same_source: whether the file was exported from the model that it was compared with; None if unknown.
        cpu: features of the CPU that integer kernels depend on.
        notes: notes for the user.
    """

    file: Mapping[str, Any] = field(default_factory=dict)
    data: Mapping[str, Any] = field(default_factory=dict)
    checks: tuple[Check, ...] = ()
    outputs: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    agreement: float | None = None
    sqnr_db: float | None = None
    metric: MetricResult | None = None
    layers: tuple[Mapping[str, Any], ...] = ()
    activation_bits: Mapping[str, int | None] = field(default_factory=dict)
    runtime: Mapping[str, float] = field(default_factory=dict)
    timing: Mapping[str, Any] | None = None
    same_ops: bool | None = None
    same_source: bool | None = None
    cpu: Mapping[str, bool | None] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        """Whether all checks passed."""
        return not self.failed

    @property
    def failed(self) -> tuple[str, ...]:
        """The names of the checks that failed, each once."""
        return tuple(dict.fromkeys(check.name for check in self.checks if not check.ok))

    def as_dict(self) -> dict[str, Any]:
        """Return the JSON document."""
        return {
            "format_version": FORMAT,
            "ok": self.ok,
            "file": dict(self.file),
            "data": dict(self.data),
            "parity": [asdict(check) for check in self.checks],
            "outputs": {name: dict(output) for name, output in self.outputs.items()},
            "agreement": self.agreement,
            "sqnr_db": self.sqnr_db,
            "metric": None if self.metric is None else asdict(self.metric),
            "layers": [dict(layer) for layer in self.layers],
            "activation_bits": dict(self.activation_bits),
            "runtime": dict(self.runtime),
            "timing": None if self.timing is None else dict(self.timing),
            "same_ops": self.same_ops,
            "same_source": self.same_source,
            "cpu": dict(self.cpu),
            "notes": list(self.notes),
        }

    @classmethod
    def from_dict(cls, document: Mapping[str, Any], file: str) -> "Validation":
        """Return the measurements from a JSON document; keys that no verdict depends on may be missing.

        Args:
            document: from `as_dict`.
            file: the file's name in messages.

        Raises:
            SourceError: the document lacks a key, or a value has the wrong type.

        >>> document = Validation(agreement=0.9, notes=("a note",)).as_dict()
        >>> Validation.from_dict(document, "net.onnx").as_dict() == document
        True
        """
        try:
            agreement, metric, same_source = document["agreement"], document["metric"], document["same_source"]
            return cls(
                file=dict(document.get("file", {})),
                data=dict(document.get("data", {})),
                checks=tuple(_check(entry) for entry in document["parity"]),
                outputs=dict(document.get("outputs", {})),
                agreement=None if agreement is None else float(agreement),
                sqnr_db=document.get("sqnr_db"),
                metric=None if metric is None else MetricResult.from_dict(metric),
                layers=tuple(document.get("layers", ())),
                activation_bits=dict(document.get("activation_bits", {})),
                runtime=dict(document.get("runtime", {})),
                timing=document.get("timing"),
                same_ops=document.get("same_ops"),
                same_source=None if same_source is None else bool(same_source),
                cpu=dict(document.get("cpu", {})),
                notes=tuple(document.get("notes", ())),
            )
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as e:
            raise SourceError(
                f"{file}: its validation cannot be read ({type(e).__name__}: {e}); run `qcompress validate MODEL "
                f"{file}` again."
            ) from None


def _check(entry: Mapping[str, Any]) -> Check:
    return Check(
        name=str(entry["name"]),
        session=str(entry.get("session", "")),
        ok=bool(entry["ok"]),
        error=entry.get("error"),
        limit=entry.get("limit", 0.0),
        detail=str(entry.get("detail", "")),
    )
