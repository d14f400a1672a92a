import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qcompress.artifacts import FloatWeight, PalettizedWeight
from qcompress.artifacts.size import SizeReport, format_size, ideal_nbytes, nbytes_at, palettized_nbytes, parse_size
from qcompress.errors import ConfigError


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [
        ("150kB", 150_000),
        ("150 kB", 150_000),
        (" 150kb ", 150_000),
        ("150KB", 150_000),
        ("1.5 MiB", 1_572_864),
        ("1.5mib", 1_572_864),
        ("2KiB", 2048),
        ("1000", 1000),
        ("1000 B", 1000),
        ("1e", None),
        (".5kB", 500),
        ("0.1 kB", 100),
        ("1.0015kB", 1001),
        ("3GB", 3_000_000_000),
        ("1GiB", 1 << 30),
        (0, 0),
        (12, 12),
    ],
)
def test_parse_size(text, nbytes):
    if nbytes is None:
        with pytest.raises(ConfigError):
            parse_size(text)
    else:
        assert parse_size(text) == nbytes


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("15Mb", r"^The unit of '15Mb' reads as bits; write 15MB for bytes\.$"),
        ("15Kb", r"write 15kB for bytes"),
        ("150k", r"^The unit of '150k' can mean 1000 or 1024; write 150kB or 150KiB\.$"),
        ("2M", r"write 2MB or 2MiB"),
        ("15 qB", r"^A size must be in B, kB, MB, GB, KiB, MiB or GiB, got '15 qB'\.$"),
        ("-1kB", r"^A size must read like 150kB, 1\.5 MiB or 1000 \(bytes\), got '-1kB'\.$"),
        ("1,000", r"must read like"),
        ("", r"must read like"),
        ("kB", r"must read like"),
        ("１kB", r"must read like"),
        (-1, r"^A size must be at least 0 bytes, got -1\.$"),
        (True, r"must read like"),
        (1.5, r"must read like"),
        (None, r"must read like"),
    ],
)
def test_parse_size_refuses(text, message):
    with pytest.raises(ConfigError, match=message):
        parse_size(text)


@given(st.integers(0, 10**15))
def test_a_formatted_size_reads_back_within_its_rounding(nbytes):
    text = format_size(nbytes)
    half_a_digit = {"B": 0, "kB": 50, "MB": 5_000, "GB": 5_000_000}[text.split()[1]]
    assert abs(parse_size(text) - nbytes) <= half_a_digit
    assert float(text.split()[0]) < 1000 or text.endswith("GB")


@given(st.integers(0, 5000), st.integers(1, 8), st.integers(1, 4))
def test_palettized_nbytes_is_what_an_artifact_takes(count, bits, groups):
    count -= count % groups
    rows = count // groups
    entries = min(1 << bits, rows)
    weight = PalettizedWeight(
        codes=np.zeros((groups, rows), np.uint8), lut=np.zeros((groups, entries), np.float32), bits=bits, rows_per_lut=1
    )
    assert palettized_nbytes(count, bits, groups=groups) == weight.nbytes


def test_palettized_nbytes_of_vectors_and_scales():
    assert palettized_nbytes(10, 2, vector_dim=4) == 1 + 3 * 4 * 4  # 3 codes, so 3 entries of 4 floats
    assert palettized_nbytes(64, 4, scales=8) == 32 + 64 + 32
    with pytest.raises(ConfigError, match=r"^bits must be in \[1, 8\], got 9\.$"):
        palettized_nbytes(1, 9)


@given(st.integers(0, 2000), st.integers(1, 8), st.sampled_from([2, 4, 8]))
def test_no_width_costs_more_than_float(count, bits, itemsize):
    assert nbytes_at(count, bits, count * itemsize) <= count * itemsize


def test_size_report():
    report = SizeReport(ideal=100, payload=120, file=200, original=1600, count=240)
    assert (report.ratio, report.bits_per_weight, report.overhead) == (8.0, 4.0, 100)
    assert SizeReport(ideal=0, payload=0, file=0, original=0, count=0).ratio == 0


def test_ideal_is_the_sum_of_the_artifacts():
    bias = FloatWeight(values=np.zeros(4, np.float32), reason="not a weight")
    weight = PalettizedWeight(codes=np.zeros((4, 8), np.uint8), lut=np.zeros((1, 2), np.float32), bits=1)
    assert ideal_nbytes([weight, bias]) == 4 + 8 + 16
