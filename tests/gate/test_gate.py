import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qcompress.errors import ConfigError, SourceError
from qcompress.gate.validation import Validation
from qcompress.gate.verdicts import GateLimits, Measurements, judge, parse_fraction
from qcompress.metrics.result import MetricResult
from qcompress_cli.inputs.tables import read_table

VALIDATION = {
    "format_version": 1,
    "file": {"name": "net.onnx", "digest": "abc", "nbytes": 100},
    "data": {"name": "test.npz", "digest": "def", "samples": 250, "labels": True},
    "parity": [],
    "outputs": {"output": {"sqnr_db": 20.0, "agreement": 0.98}},
    "agreement": 0.98,
    "sqnr_db": 20.0,
    "metric": {
        "name": "top1",
        "original": 0.86,
        "compressed": 0.85,
        "drop": 0.86 - 0.85,
        "interval": [-0.002, 0.014],
        "lower_is_better": False,
        "samples": 250,
    },
    "same_source": True,
}


def measured(**fields):
    return Measurements(**{"file": "net.onnx", "nbytes": 100, "is_ours": True, "original_bytes": 800, **fields})


def validated(document, **fields):
    return measured(validation=Validation.from_dict(document, "net.onnx"), **fields)


def metric(name, drop, interval, samples):
    return MetricResult(name, 0.9, 0.9 - drop, drop, interval, False, samples)


def limits(**table):
    return read_table(GateLimits, table, "gate")


def only(file, **table):
    (verdict,) = judge([file], limits(**table))
    return verdict


@pytest.mark.parametrize(("limit", "ok"), [(99, False), (100, True), ("0.1kB", True), ("101", True)])
def test_max_size(limit, ok):
    verdict = only(measured(), max_size=limit)
    assert (verdict.ok, verdict.measured, verdict.limit, verdict.unit) == (ok, 100, "max_size", "bytes")


@pytest.mark.parametrize(("limit", "ok"), [(8, True), ("8x", True), (8.001, False), ("7.5", True)])
def test_min_ratio(limit, ok):
    assert only(measured(), min_ratio=limit).ok is ok


@given(nbytes=st.integers(1, 10**9), original=st.integers(1, 10**9), size=st.integers(1, 10**9))
def test_a_larger_file_never_passes_where_a_smaller_one_failed(nbytes, original, size):
    small, large = (measured(nbytes=n, original_bytes=original, is_ours=False) for n in (nbytes, nbytes + 1))
    table = limits(max_size=size, min_ratio=2)
    for before, after in zip(judge([small], table), judge([large], table), strict=True):
        assert before.ok or not after.ok


def test_one_of_our_files_that_did_not_shrink_fails_by_itself():
    for nbytes in (800, 900):
        first, second = judge([measured(nbytes=nbytes)], limits(max_size="1kB"))
        assert (first.limit, first.ok, first.note) == ("smaller_than_original", False, "the file did not shrink")
        assert second.ok
    assert only(measured(nbytes=799), max_size="1kB").limit == "max_size"
    assert only(measured(nbytes=900, is_ours=False), max_size="1kB").ok  # somebody else's file is nobody's promise


def test_a_drop_at_the_limit_is_kept_whatever_floating_point_makes_of_it():
    assert 0.86 - 0.85 > 0.01
    file = validated(VALIDATION)
    assert only(file, max_drop="1%").ok
    assert only(file, max_drop=0.01).ok
    assert not only(file, max_drop=0.0099).ok
    assert only(file, min_agreement="98%").ok
    assert not only(file, min_agreement=0.981).ok


def test_a_limit_within_the_interval_is_called_not_decidable():
    file = validated(VALIDATION)
    verdict = only(file, max_drop="1%")
    assert verdict.note == "not decidable with 250 samples: the 95 % interval of the drop is [-0.2 %, 1.4 %]"
    assert verdict.unit == "fraction"
    for clear in (0.014, 0.5, -0.003):  # all of the interval keeps it, or none of it does
        assert only(file, max_drop=clear).note is None


def test_a_metric_in_its_own_unit_prints_plain_numbers():
    validation = Validation(metric=metric("mse", 3.0, (1.0, 5.0), 7))
    verdict = only(measured(validation=validation), max_drop=4)
    assert verdict.ok
    assert verdict.unit == "metric"
    assert verdict.note == "not decidable with 7 samples: the 95 % interval of the drop is [1, 5]"


def test_not_a_number_never_passes():
    file = measured(validation=Validation(metric=metric("top1", math.nan, None, 1), agreement=math.nan))
    assert not any(v.ok for v in judge([file], limits(max_drop=0.5, min_agreement=0)))


def test_verdicts_come_by_file_then_by_limit():
    files = [measured(file="a"), measured(file="b")]
    rows = [(v.file, v.limit) for v in judge(files, limits(min_ratio=2, max_size=10))]
    assert rows == [("a", "max_size"), ("a", "min_ratio"), ("b", "max_size"), ("b", "min_ratio")]


@pytest.mark.parametrize(
    ("fields", "table", "message"),
    [
        (
            {"is_ours": False, "original_bytes": None},
            {"min_ratio": 2},
            r"^net\.onnx: --min-ratio needs the bytes of the original, .*; add --original FILE\.$",
        ),
        ({}, {"max_drop": 0.01}, r"its validation is missing; run `qcompress validate MODEL net\.onnx --data .*labels"),
        (
            {"validation": Validation()},
            {"max_drop": 0.01},
            r"validation has no metric \(there were no labels\); run",
        ),
        ({}, {"min_agreement": 1}, r"its validation is missing; run `qcompress validate MODEL net\.onnx --data"),
        ({"validation": Validation()}, {"min_agreement": 1}, r"has no agreement \(the outputs are not class scores\)"),
        ({"original_bytes": None}, {"max_size": 1}, r"^net\.onnx: its metadata lacks the bytes of the original; exp"),
    ],
)
def test_a_limit_without_its_input_names_what_to_run(fields, table, message):
    with pytest.raises(SourceError, match=message):
        judge([measured(**fields)], limits(**table))


def test_no_limit_and_no_file():
    with pytest.raises(ConfigError, match=r"^gate has no limit to check; add --max-size, .* \[gate\] of qcompress"):
        judge([measured()], GateLimits())
    with pytest.raises(ConfigError, match=r"^gate needs at least one file"):
        judge([], limits(max_size=1))


def test_a_drop_that_a_fraction_cannot_reach_is_a_slip():
    validation = Validation(metric=metric("top1", 0.5, None, 9))
    with pytest.raises(ConfigError, match=r'^max_drop must be below 1 for top1, .* got 1\. Did you mean "1%"\?$'):
        judge([measured(validation=validation)], limits(max_drop=1))


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"min_agreement": 98}, r'^gate: min_agreement: must be a fraction in \[0, 1\] .* 98\. Did you mean "98%"\?$'),
        ({"min_agreement": "101%"}, r"got '101%'\.$"),
        ({"min_agreement": -0.5}, r"got -0\.5\.$"),
        ({"min_ratio": 0}, r"^gate: min_ratio: must be more than 0"),
        ({"min_ratio": "8%"}, r"^gate: min_ratio: must be a number like 8, got '8%'\.$"),
        ({"max_size": 0}, r"^gate: max_size: must be more than 0 bytes, got 0\.$"),
        ({"max_size": "15Mb"}, r"^gate: max_size: The unit of '15Mb' reads as bits"),
        (
            {"max_drop": "a lot"},
            r"^gate: max_drop: must be a number like 0\.01 or a percentage like 1%, got 'a lot'\.$",
        ),
        ({"max_drop": True}, r"got True\.$"),
        ({"max_drop": math.nan}, r"got 'nan'\.$"),
        ({"max_drop": math.inf}, r"got 'inf'\.$"),
        ({"max-size": 1}, r"^gate: unknown key 'max-size'\. Did you mean max_size\?$"),
        ({"max_sice": 1}, r"^gate: unknown key 'max_sice'\. Did you mean max_size"),
        ({"zzz": 1}, r"^gate: unknown key 'zzz'\. Known: max_size, min_ratio, max_drop, min_agreement\.$"),
    ],
)
def test_wrong_limits(table, message):
    with pytest.raises(ConfigError, match=message):
        limits(**table)


@given(st.floats(-1e6, 1e6))
def test_parse_fraction_reads_what_python_writes(value):
    assert parse_fraction(repr(value)) == value
    assert parse_fraction(value) == value
    assert parse_fraction(f"{value!r} %") == value / 100


@pytest.mark.parametrize(
    "broken",
    [
        {},
        {**VALIDATION, "agreement": "high"},
        {**VALIDATION, "metric": 3},
        {**VALIDATION, "parity": {"ok": True}},
        {**VALIDATION, "parity": [{"name": "graph"}]},
        {**VALIDATION, "outputs": 3},
    ],
)
def test_a_broken_validation(broken):
    with pytest.raises(SourceError, match=r"^net\.onnx: its validation cannot be read .* run `qcompress validate"):
        Validation.from_dict(broken, "net.onnx")


@pytest.mark.parametrize(("same", "ok"), [(True, True), (None, True), (False, False)])
def test_a_file_measured_against_another_original_fails_by_itself(same, ok):
    validation = {**VALIDATION, "same_source": same}
    file = validated(validation)
    first, *others = judge([file], limits(min_agreement=0.9))
    assert (first.ok, not others) == (ok, ok)
    if not ok:
        assert (first.limit, first.unit, others[0].ok) == ("same_source", "count", True)
        assert "run `qcompress validate MODEL net.onnx` with the right one" in first.note


def test_a_file_that_failed_validate_fails_by_itself():
    validation = {**VALIDATION, "parity": [{"name": "weights", "ok": False}]}
    file = validated(validation)
    verdicts = judge([file], GateLimits(min_agreement="50%"))
    assert [(v.limit, v.ok) for v in verdicts] == [("parity", False), ("min_agreement", True)]
    assert verdicts[0].note == "validate found the file wrong: weights"
