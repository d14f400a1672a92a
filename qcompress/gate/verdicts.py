"""Compares measurements with limits, for CI. Pure: needs neither onnx nor torch, and reads no file.

A verdict depends on the point estimate; if the limit lies within the 95 % interval, the verdict has a note.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Final, final

import pydantic
from pydantic.dataclasses import dataclass as pydantic_dataclass

from qcompress.artifacts.size import parse_size
from qcompress.errors import ConfigError, SourceError
from qcompress.gate.validation import Validation

_NUMBER: Final = re.compile(r"\s*([+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]+)?)\s*(%?)\s*")
# In floating point, 0.86 - 0.85 is 0.010000000000000009, which must not fail a limit of 0.01.
_ROUNDING: Final = 1e-9


def parse_fraction(text: str | float) -> float:
    """Return a number, or a percentage converted to a fraction of 1.

    >>> parse_fraction("1%"), parse_fraction("0.01"), parse_fraction(0.5)
    (0.01, 0.01, 0.5)

    Raises:
        ConfigError: the text is neither a number nor a percentage.
    """
    if isinstance(text, int | float) and not isinstance(text, bool):
        text = repr(text)
    match = _NUMBER.fullmatch(text) if isinstance(text, str) else None
    if match is None:
        raise ConfigError(f"must be a number like 0.01 or a percentage like 1%, got {text!r}.")
    return float(match[1]) / (100 if match[2] else 1)


def parse_max_size(value: Any) -> int:
    """Return a size as a number of bytes, at least 1.

    >>> parse_max_size("150 kB")
    150000
    """
    nbytes = parse_size(value)
    if nbytes == 0:
        raise ConfigError(f"must be more than 0 bytes, got {value!r}.")
    return nbytes


def parse_min_ratio(value: Any) -> float:
    """Return the ratio by which a file must be smaller, such as 8 for 8 times smaller.

    >>> parse_min_ratio(8), parse_min_ratio("8x")
    (8.0, 8.0)
    """
    if isinstance(value, str) and "%" in value:
        raise ConfigError(f"must be a number like 8, got {value!r}.")
    ratio = parse_fraction(value.rstrip("xX ") if isinstance(value, str) else value)
    if ratio <= 0:
        raise ConfigError(f"must be more than 0, like 8 for a file that is 8 times smaller, got {value!r}.")
    return ratio


def parse_min_agreement(value: Any) -> float:
    """Return a share of samples as a fraction in [0, 1].

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
    """The limits for a file; None means no limit.

    Args:
        max_size: largest size of the file: `150kB`.
        min_ratio: how many times smaller than the original the file must be: `8`.
        max_drop: how much worse the metric may get, in its own unit: `0.01`, or `1%` for 0.01.
        min_agreement: smallest share of samples on which file and original agree: `0.98` or `98%`.

    >>> GateLimits(max_size="150kB", min_agreement="98%")
    GateLimits(max_size=150000, min_ratio=None, max_drop=None, min_agreement=0.98)
    """

    max_size: Annotated[int, pydantic.BeforeValidator(parse_max_size)] | None = None
    min_ratio: Annotated[float, pydantic.BeforeValidator(parse_min_ratio)] | None = None
    max_drop: Annotated[float, pydantic.BeforeValidator(parse_fraction)] | None = None
    min_agreement: Annotated[float, pydantic.BeforeValidator(parse_min_agreement)] | None = None


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Measurements:
    """The known figures of one file.

    Args:
        file: its name in messages.
        nbytes: its size in bytes.
        is_ours: whether qcompress wrote it.
        original_bytes: size of the original in bytes; None if unknown.
        validation: the measurements of `validate`; None if it was not run.
    """

    file: str
    nbytes: int
    is_ours: bool
    original_bytes: int | None = None
    validation: Validation | None = None


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """Whether one file keeps one limit.

    Args:
        file: the file's name.
        limit: a field of GateLimits; or `smaller_than_original`, `parity` or `same_source`, which are always checked.
        allowed: the limit's value.
        measured: the measured value.
        ok: whether the limit is kept.
        unit: unit of both values: `bytes`, `ratio`, `fraction`, `count`, or `metric` for the metric's own unit.
        note: one more sentence of explanation, or None.
    """

    file: str
    limit: str
    allowed: float
    measured: float
    ok: bool
    unit: str
    note: str | None = None


def judge(files: Sequence[Measurements], limits: GateLimits) -> tuple[Verdict, ...]:
    """Return a verdict for each file and limit, in that order.

    Raises:
        ConfigError: there is no file or no limit, or a limit can never fail.
        SourceError: a limit needs something that was not measured; the message names the command to run.

    >>> small = Measurements(file="net.onnx", nbytes=90, is_ours=True, original_bytes=720)
    >>> [v.ok for v in judge([small], GateLimits(max_size=100, min_ratio=9))]
    [True, False]
    """
    if not files:
        raise ConfigError("gate needs at least one file; type qcompress gate dist/*.onnx")
    require_a_limit(limits)
    return tuple(verdict for file in files for verdict in _judge_one(file, limits))


def require_a_limit(limits: GateLimits) -> None:
    """Raise ConfigError if no limit is set."""
    if limits == GateLimits():
        raise ConfigError(
            "gate has no limit to check; add --max-size, --min-ratio, --max-drop or --min-agreement, or write them "
            "into [tool.qcompress.gate] of pyproject.toml or [gate] of qcompress.toml."
        )


def _judge_one(file: Measurements, limits: GateLimits) -> list[Verdict]:
    verdicts = [*_did_not_shrink(file), *_is_wrong(file), *_has_another_source(file)]
    if limits.max_size is not None:
        verdicts.append(_size(file, limits.max_size))
    if limits.min_ratio is not None:
        verdicts.append(_ratio(file, limits.min_ratio))
    if limits.max_drop is not None:
        verdicts.append(_drop(file, limits.max_drop))
    if limits.min_agreement is not None:
        verdicts.append(_agreement(file, limits.min_agreement))
    return verdicts


def _did_not_shrink(file: Measurements) -> list[Verdict]:
    if not file.is_ours:
        return []
    if file.original_bytes is None:
        raise SourceError(f"{file.file}: its metadata lacks the bytes of the original; export it again.")
    if file.nbytes < file.original_bytes:
        return []
    return [
        Verdict(
            file=file.file,
            limit="smaller_than_original",
            allowed=file.original_bytes,
            measured=file.nbytes,
            ok=False,
            unit="bytes",
            note="the file did not shrink",
        )
    ]


def _is_wrong(file: Measurements) -> list[Verdict]:
    failed = () if file.validation is None else file.validation.failed
    if not failed:
        return []
    note = f"validate found the file wrong: {', '.join(failed)}"
    return [Verdict(file=file.file, limit="parity", allowed=0, measured=len(failed), ok=False, unit="count", note=note)]


def _has_another_source(file: Measurements) -> list[Verdict]:
    if file.validation is None or file.validation.same_source is not False:
        return []
    note = (
        "validate compared it with another model than it was exported from; run `qcompress validate MODEL "
        f"{file.file}` with the right one, or export it again"
    )
    return [Verdict(file=file.file, limit="same_source", allowed=0, measured=1, ok=False, unit="count", note=note)]


def _size(file: Measurements, allowed: int) -> Verdict:
    ok = file.nbytes <= allowed
    return Verdict(file=file.file, limit="max_size", allowed=allowed, measured=file.nbytes, ok=ok, unit="bytes")


def _ratio(file: Measurements, allowed: float) -> Verdict:
    if file.original_bytes is None:
        raise SourceError(
            f"{file.file}: --min-ratio needs the bytes of the original, which a file carries if qcompress wrote it; "
            "add --original FILE."
        )
    ratio = file.original_bytes / max(1, file.nbytes)
    ok = ratio >= allowed
    return Verdict(file=file.file, limit="min_ratio", allowed=allowed, measured=ratio, ok=ok, unit="ratio")


def _drop(file: Measurements, allowed: float) -> Verdict:
    from qcompress.metrics.metric import unit_of  # imports numpy, which no other limit needs

    metric = None if file.validation is None else file.validation.metric
    if metric is None:
        why = "is missing" if file.validation is None else "has no metric (there were no labels)"
        raise SourceError(
            f"{file.file}: --max-drop needs a metric, but its validation {why}; run `qcompress validate MODEL "
            f"{file.file} --data DATA.npz --metric top1`, with labels `y` in DATA.npz."
        )
    is_fraction = unit_of(metric.name) == "fraction"
    if is_fraction and allowed >= 1:
        raise ConfigError(
            f"max_drop must be below 1 for {metric.name}, which is a fraction and cannot drop further, got "
            f'{allowed:g}. Did you mean "{allowed:g}%"?'
        )
    note = None
    if metric.interval is not None and metric.undecidable(allowed):
        low, high = (percent(value) if is_fraction else f"{value:.4g}" for value in metric.interval)
        note = f"not decidable with {metric.samples} samples: the 95 % interval of the drop is [{low}, {high}]"
    return Verdict(
        file=file.file,
        limit="max_drop",
        allowed=allowed,
        measured=metric.drop,
        ok=metric.drop <= allowed + _ROUNDING,
        unit="fraction" if is_fraction else "metric",
        note=note,
    )


def _agreement(file: Measurements, allowed: float) -> Verdict:
    agreement = None if file.validation is None else file.validation.agreement
    if agreement is None:
        why = "is missing" if file.validation is None else "has no agreement (the outputs are not class scores)"
        raise SourceError(
            f"{file.file}: --min-agreement needs a measured agreement, but its validation {why}; run `qcompress "
            f"validate MODEL {file.file} --data DATA.npz`."
        )
    return Verdict(
        file=file.file,
        limit="min_agreement",
        allowed=allowed,
        measured=agreement,
        ok=agreement >= allowed - _ROUNDING,
        unit="fraction",
    )


def percent(fraction: float, digits: int = 4) -> str:
    """Return a fraction as text in percent.

    >>> percent(0.014), percent(-0.002)
    ('1.4 %', '-0.2 %')
    """
    return f"{100 * fraction:.{digits}g} %"
