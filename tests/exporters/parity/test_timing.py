"""What timing measures and how it ends; never how fast anything is."""

import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from qcompress.errors import ConfigError, SourceError
from qcompress_exporters.parity import timing
from qcompress_exporters.parity.timing import LEAST_ROUNDS, Loading, cpu_seconds, latency, loading, paired

FEEDS = {"x": np.ones((2, 8), np.float32)}


def linear(width: int = 8) -> bytes:
    """One MatMul."""
    weight = numpy_helper.from_array(np.ones((8, width), np.float32), "w")
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"])],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 8])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", width])],
        [weight],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)
    onnx.checker.check_model(model)
    data: bytes = model.SerializeToString()
    return data


def test_latency_has_a_control_from_the_same_rounds() -> None:
    result = latency(linear(), linear(4), FEEDS, rounds=7)
    assert result.rounds == 7
    assert min(result.ratio, result.control, result.original_ms, result.ours_ms) > 0
    assert 0 < result.spread[0] <= result.control <= result.spread[1]


def test_at_least_a_few_rounds_whatever_the_time() -> None:
    assert latency(linear(), linear(), FEEDS, seconds=0).rounds == LEAST_ROUNDS


def test_time_ends_the_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = iter(range(1000))
    monkeypatch.setattr(timing.time, "perf_counter", lambda: next(ticks))
    assert latency(linear(), linear(), FEEDS, seconds=3).rounds == LEAST_ROUNDS + 2


def test_rounds_must_be_positive() -> None:
    with pytest.raises(ConfigError, match=r"^The number of rounds must be at least 1, got 0\.$"):
        latency(linear(), linear(), FEEDS, rounds=0)


def test_every_file_runs_forward_and_back_after_an_untimed_run(monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[str] = []

    class Fake:
        def __init__(self, name: str) -> None:
            self.name = name

        def run(self, names: object, feeds: object) -> None:
            ran.append(self.name)

    monkeypatch.setattr(timing, "session", lambda data, mode, one_thread: Fake(data.decode()))
    monkeypatch.setattr(timing, "run", lambda active, feeds: None)
    times = cpu_seconds([b"a", b"b", b"c"], FEEDS, rounds=2)
    assert times.shape == (2, 3)
    assert "".join(ran) == "aabbccccbbaa" + "bbccaaaaccbb"


def test_the_median_of_ratios_and_their_middle_half() -> None:
    ratio = paired(np.array([1.0, 2.0, 3.0, 4.0, 100.0]), np.ones(5))
    assert (ratio.low, ratio.median, ratio.high) == (2.0, 3.0, 4.0)


def test_inputs_that_do_not_fit_are_an_error() -> None:
    with pytest.raises(SourceError, match=r"does not run on the model's inputs"):
        latency(linear(), linear(), {"x": np.ones((2, 3), np.float32)})


@pytest.mark.parametrize("files", [(b"no model", linear()), (linear(), b"no model")])
def test_a_file_that_does_not_load_is_an_error(files: tuple[bytes, bytes]) -> None:
    with pytest.raises(SourceError, match=r"^onnxruntime [\d.]+ cannot load the file: "):
        latency(*files, FEEDS)


def test_loading_is_measured_in_another_process() -> None:
    result = loading(linear())
    assert result.cpu_s > 0
    assert result.wall_s > 0
    if Path("/proc/self/status").exists():
        assert result.resident_bytes is not None
        assert result.peak_bytes is not None
        assert 0 <= result.resident_bytes <= result.peak_bytes
    else:
        assert result.resident_bytes is result.peak_bytes is None


def test_loading_gives_medians_of_its_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    loads = [Loading(cpu_s=s, wall_s=-s, resident_bytes=None, peak_bytes=int(s)) for s in (3.0, 1.0, 2.0)]
    monkeypatch.setattr(timing, "_load", lambda path, first: loads.pop())
    assert loading(linear()) == Loading(cpu_s=2.0, wall_s=-2.0, resident_bytes=None, peak_bytes=2)


def test_loading_needs_a_process() -> None:
    with pytest.raises(ConfigError, match=r"^The number of processes must be at least 1, got 0\.$"):
        loading(linear(), processes=0)


def test_loading_takes_nothing_from_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "onnxruntime.py").write_text("raise SystemExit('not this one')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv("PYTHONSTARTUP", str(tmp_path / "onnxruntime.py"))
    monkeypatch.chdir(tmp_path)
    assert loading(linear(), processes=1).cpu_s > 0


def test_loading_without_proc_tells_times_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "_LOAD", timing._LOAD.replace("/proc/self/", "/no/such/folder/"))
    result = loading(linear(), processes=1)
    assert result.cpu_s > 0
    assert result.resident_bytes is result.peak_bytes is None


def test_loading_says_in_one_line_why_it_failed() -> None:
    with pytest.raises(SourceError, match=r"^onnxruntime [\d.]+ cannot load the file: .*[^\n]$"):
        loading(b"no model")


@pytest.mark.parametrize(
    ("script", "message"),
    [
        ("import no_such_package", r"^ModuleNotFoundError: No module named 'no_such_package'$"),
        ("import os; os.kill(os.getpid(), 9)", r"^The process that loads the file ended with -9\.$"),
    ],
)
def test_a_process_that_fails_is_an_error(monkeypatch: pytest.MonkeyPatch, script: str, message: str) -> None:
    monkeypatch.setattr(timing, "_LOAD", script)
    with pytest.raises(SourceError, match=message):
        loading(linear())


def test_a_process_that_cannot_start_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/no/such/python")
    with pytest.raises(SourceError, match=r"^Cannot start a process to load the file: No such file"):
        loading(linear())
