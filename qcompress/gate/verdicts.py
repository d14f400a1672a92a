"""Limits against measurements: pure verdicts, for CI. Knows neither onnx nor torch, and reads no file.

Every verdict is taken by the point estimate; where the 95 % interval holds both answers, its note says so.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Final, final

import pydantic
from pydantic.dataclasses import dataclass as pydantic_dataclass

from qcompress.artifacts.size import parse_size
from qcompress.errors import ConfigError, SourceError

# Metrics that are fractions of 1, whose drop people read in percent.
FRACTION_METRICS: Final = ("top1", "top5", "auc")

_NUMBER: Final = re.compile(r"\s*([+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]+)?)\s*(%?)\s*")
# 0.86 - 0.85 is 0.010000000000000009 in floating point, and that is no reason to fail a limit of 0.01.
_ROUNDING: Final = 1e-9


def parse_fraction(text: str | float) -> float:
    """A number, or a percentage of 1.

    >>> parse_fraction("1%"), parse_fraction("0.01"), parse_fraction(0.5)
    (0.01, 0.01, 0.5)

    Raises:
        ConfigError: neither.
    """
    if isinstance(text, int | float) and not isinstance(text, bool):
        text = repr(text)
    match = _NUMBER.fullmatch(text) if isinstance(text, str) else None
    if match is None:
        raise ConfigError(f"must be a number like 0.01 or a percentage like 1%, got {text!r}.")
    return float(match[1]) / (100 if match[2] else 1)


def parse_max_size(value: Any) -> int:
    """Bytes, more than 0.

    >>> parse_max_size("150 kB")
    150000
    """
    nbytes = parse_size(value)
    if nbytes == 0:
        raise ConfigError(f"must be more than 0 bytes, got {value!r}.")
    return nbytes


def parse_min_ratio(value: Any) -> float:
    """How many times smaller, more than 0.

    >>> parse_min_ratio(8), parse_min_ratio("8x")
    (8.0, 8.0)
    """
    if isinstance(value, str) and "%" in value:
        raise ConfigError(f"must be a number of times, as in 8, got {value!r}.")
    ratio = parse_fraction(value.rstrip("xX ") if isinstance(value, str) else value)
    if ratio <= 0:
        raise ConfigError(f"must be more than 0, as in 8 for a file 8 times smaller, got {value!r}.")
    return ratio


def parse_min_agreement(value: Any) -> float:
    """A share of samples.

    >>> parse_min_agreement("98%"), parse_min_agreement(1)
    (0.98, 1.0)
    """
    fraction = parse_fraction(value)
    if not 0 <= fraction <= 1:
        percent = f' Did you mean "{fraction:g}%"?' if 1 < fraction <= 100 and "%" not in str(value) else ""
        raise ConfigError(f"must be a fraction in [0, 1] or a percentage, got {value!r}.{percent}")
    return fraction


@final
@pydantic_dataclass(frozen=True, kw_only=True, config=pydantic.ConfigDict(extra="forbid"))
class GateLimits:
    """What a file must keep to; None: no limit.

    Args:
        max_size: bytes of the file, `150kB`.
        min_ratio: how many times smaller than the original the file must be, `8`.
        max_drop: by how much the metric may get worse, in its own unit, `0.01`, or `1%` for 0.01.
        min_agreement: share of samples on which the file and the original agree, `0.98` or `98%`.

    >>> GateLimits(max_size="150kB", min_agreement="98%")
    GateLimits(max_size=150000, min_ratio=None, max_drop=None, min_agreement=0.98)
    """

    max_size: Annotated[int, pydantic.BeforeValidator(parse_max_size)] | None = None
    min_ratio: Annotated[float, pydantic.BeforeValidator(parse_min_ratio)] | None = None
    max_drop: Annotated[float, pydantic.BeforeValidator(parse_fraction)] | None = None
    min_agreement: Annotated[float, pydantic.BeforeValidator(parse_min_agreement)] | None = None


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class MetricDrop:
    """How a metric fared, as `validate` measured it.

    Args:
        name: the metric.
        drop: by how much it got worse, in its own unit; negative: it got better.
        interval: the drop's 95 % interval, where one was taken.
        samples: samples that it was measured on.
    """

    name: str
    drop: float
    interval: tuple[float, float] | None
    samples: int


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Measurements:
    """What is known of one file.

    Args:
        file: what a user calls it.
        nbytes: its bytes.
        is_ours: whether qcompress wrote it.
        original_bytes: bytes of the original, where they are known.
        validated: whether there is a validation.
        failed: the checks of parity that it failed.
        same_source: whether it was validated against the very model that it was exported from; None: not known.
        agreement: share of samples on which it agrees with the original, where it was measured.
        metric: how the metric fared, where it was measured.
    """

    file: str
    nbytes: int
    is_ours: bool
    original_bytes: int | None = None
    validated: bool = False
    failed: tuple[str, ...] = ()
    same_source: bool | None = None
    agreement: float | None = None
    metric: MetricDrop | None = None

    @classmethod
    def of(
        cls,
        file: str,
        *,
        nbytes: int,
        is_ours: bool,
        original_bytes: int | None = None,
        validation: Mapping[str, Any] | None = None,
    ) -> "Measurements":
        """From the document that `validate` writes.

        Raises:
            SourceError: the document lacks what it must hold.
        """
        if validation is None:
            return cls(file=file, nbytes=nbytes, is_ours=is_ours, original_bytes=original_bytes)
        try:
            agreement, metric, same_source = validation["agreement"], validation["metric"], validation["same_source"]
            return cls(
                file=file,
                nbytes=nbytes,
                is_ours=is_ours,
                original_bytes=original_bytes,
                validated=True,
                failed=tuple(dict.fromkeys(str(c["name"]) for c in validation["parity"] if not c["ok"])),
                same_source=None if same_source is None else bool(same_source),
                agreement=None if agreement is None else float(agreement),
                metric=None if metric is None else _metric_drop(metric),
            )
        except (KeyError, TypeError, ValueError) as e:
            raise SourceError(
                f"{file}: its validation cannot be read ({type(e).__name__}: {e}): run `qcompress validate MODEL "
                f"{file}` again."
            ) from None


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """One limit on one file.

    Args:
        file: the file.
        limit: the limit's name, a field of GateLimits; or what fails by itself, `smaller_than_original`, `parity` or
            `same_source`.
        allowed: the limit's value.
        measured: what was measured.
        ok: whether the limit is kept.
        unit: of both values: `bytes`, `ratio`, `fraction`, `count`, or `metric` for a metric in its own unit.
        note: what else to know, or None.
    """

    file: str
    limit: str
    allowed: float
    measured: float
    ok: bool
    unit: str
    note: str | None = None


def judge(files: Sequence[Measurements], limits: GateLimits) -> tuple[Verdict, ...]:
    """One verdict for each file and limit, in that order.

    Raises:
        ConfigError: no file, no limit, or a limit that could never fail.
        SourceError: a limit needs what was not measured; the message names what to run.

    >>> small = Measurements(file="net.onnx", nbytes=90, is_ours=True, original_bytes=720)
    >>> [v.ok for v in judge([small], GateLimits(max_size=100, min_ratio=9))]
    [True, False]
    """
    if not files:
        raise ConfigError("gate needs at least one file: qcompress gate dist/*.onnx")
    require_a_limit(limits)
    return tuple(verdict for file in files for verdict in _judge_one(file, limits))


def require_a_limit(limits: GateLimits) -> None:
    """Raise ConfigError where there is nothing to check."""
    if limits == GateLimits():
        raise ConfigError(
            "gate has no limit to check: give --max-size, --min-ratio, --max-drop or --min-agreement, or write them "
            "into [tool.qcompress.gate] of pyproject.toml or [gate] of qcompress.toml."
        )


def _judge_one(file: Measurements, limits: GateLimits) -> list[Verdict]:
    verdicts = []
    if file.is_ours and file.original_bytes is None:
        raise SourceError(f"{file.file}: its metadata lacks the bytes of the original: export it again.")
    if file.is_ours and file.original_bytes is not None and file.nbytes >= file.original_bytes:
        verdicts.append(
            Verdict(
                file=file.file,
                limit="smaller_than_original",
                allowed=file.original_bytes,
                measured=file.nbytes,
                ok=False,
                unit="bytes",
                note="the file did not shrink",
            )
        )
    if file.failed:
        verdicts.append(
            Verdict(
                file=file.file,
                limit="parity",
                allowed=0,
                measured=len(file.failed),
                ok=False,
                unit="count",
                note=f"validate found the file wrong: {', '.join(file.failed)}",
            )
        )
    if file.same_source is False:
        verdicts.append(
            Verdict(
                file=file.file,
                limit="same_source",
                allowed=0,
                measured=1,
                ok=False,
                unit="count",
                note="validate measured it against another model than it was exported from: run `qcompress validate "
                f"MODEL {file.file}` with that one, or export it again",
            )
        )
    if limits.max_size is not None:
        verdicts.append(
            Verdict(
                file=file.file,
                limit="max_size",
                allowed=limits.max_size,
                measured=file.nbytes,
                ok=file.nbytes <= limits.max_size,
                unit="bytes",
            )
        )
    if limits.min_ratio is not None:
        verdicts.append(_ratio(file, limits.min_ratio))
    if limits.max_drop is not None:
        verdicts.append(_drop(file, limits.max_drop))
    if limits.min_agreement is not None:
        verdicts.append(_agreement(file, limits.min_agreement))
    return verdicts


def _ratio(file: Measurements, allowed: float) -> Verdict:
    if file.original_bytes is None:
        raise SourceError(
            f"{file.file}: --min-ratio needs the bytes of the original, which this file does not carry (qcompress did "
            "not write it): name the original with --original FILE."
        )
    ratio = file.original_bytes / max(1, file.nbytes)
    ok = ratio >= allowed
    return Verdict(file=file.file, limit="min_ratio", allowed=allowed, measured=ratio, ok=ok, unit="ratio")


def _drop(file: Measurements, allowed: float) -> Verdict:
    if file.metric is None:
        why = "has no metric (there were no labels)" if file.validated else "is missing"
        raise SourceError(
            f"{file.file}: --max-drop needs a metric, and its validation {why}: run `qcompress validate MODEL "
            f"{file.file} --data DATA.npz --metric top1`, with labels `y` in DATA.npz."
        )
    metric = file.metric
    if metric.name in FRACTION_METRICS and allowed >= 1:
        raise ConfigError(
            f"max_drop must be below 1 for {metric.name}, which is a fraction and cannot drop further, got "
            f'{allowed:g}. Did you mean "{allowed:g}%"?'
        )
    note = None
    if metric.interval is not None and metric.interval[0] <= allowed < metric.interval[1]:
        is_fraction = metric.name in FRACTION_METRICS
        low, high = (percent(value) if is_fraction else f"{value:.4g}" for value in metric.interval)
        note = f"not decidable with {metric.samples} samples: the 95 % interval of the drop is [{low}, {high}]"
    return Verdict(
        file=file.file,
        limit="max_drop",
        allowed=allowed,
        measured=metric.drop,
        ok=metric.drop <= allowed + _ROUNDING,
        unit="fraction" if metric.name in FRACTION_METRICS else "metric",
        note=note,
    )


def _agreement(file: Measurements, allowed: float) -> Verdict:
    if file.agreement is None:
        why = "has no agreement (the outputs are no class scores)" if file.validated else "is missing"
        raise SourceError(
            f"{file.file}: --min-agreement needs a measured agreement, and its validation {why}: run `qcompress "
            f"validate MODEL {file.file} --data DATA.npz`."
        )
    return Verdict(
        file=file.file,
        limit="min_agreement",
        allowed=allowed,
        measured=file.agreement,
        ok=file.agreement >= allowed - _ROUNDING,
        unit="fraction",
    )


def percent(fraction: float, digits: int = 4) -> str:
    """A fraction as people read it.

    >>> percent(0.014), percent(-0.002)
    ('1.4 %', '-0.2 %')
    """
    return f"{100 * fraction:.{digits}g} %"


def _metric_drop(metric: Mapping[str, Any]) -> MetricDrop:
    interval = metric["interval"]
    if interval is not None:
        low, high = interval
        interval = (float(low), float(high))
    return MetricDrop(
        name=str(metric["name"]), drop=float(metric["drop"]), interval=interval, samples=int(metric["samples"])
    )
