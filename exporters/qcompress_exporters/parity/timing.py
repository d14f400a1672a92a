"""Measures how fast files run, and how long they take to load.

Speed: CPU time on one thread, in rounds that run every file forwards and backwards (A B C C B A, then B C A A C B), so
that drift within a round affects all files equally. Ratios are medians over the rounds, with a control: the original's
file compared with itself. Loading: CPU time and memory of a fresh process that imports onnxruntime only.
"""

import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np
import numpy.typing as npt
import onnx

from qcompress.errors import ConfigError, SourceError
from qcompress_exporters.onnx_format.opsets import BASE_OPSET, ir_version
from qcompress_exporters.parity.sessions import Session, run, session

Floats = npt.NDArray[np.float64]
Feeds = Mapping[str, npt.NDArray[Any]]
Verdict = Literal["faster", "slower", "no difference"]

LEAST_ROUNDS: Final = 5
_WARM_UP: Final = 3
_MIDDLE_HALF: Final = (25, 75)
# On Windows, a thread's CPU time has a resolution of only 16 ms.
_clock: Final = time.perf_counter if sys.platform == "win32" else time.thread_time


@dataclass(frozen=True, slots=True, kw_only=True)
class Ratio:
    """Ratio of the speeds of two files: the median over paired rounds.

    Args:
        median: above 1 if the second file is faster.
        low: first quartile over the rounds.
        high: third quartile over the rounds.
    """

    median: float
    low: float
    high: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Latency:
    """Speed of a file, compared with the original's.

    Args:
        ratio: the original's time over ours; above 1 if ours is faster.
        control: the original's time over its time in another session; 1 except for noise.
        spread: quartiles of the control over the rounds.
        original_ms: CPU time of one run of the original, in milliseconds.
        ours_ms: the same for our file.
        rounds: number of measured rounds.
    """

    ratio: float
    control: float
    spread: tuple[float, float]
    original_ms: float
    ours_ms: float
    rounds: int

    @property
    def verdict(self) -> Verdict:
        """`faster` or `slower` if the ratio is further from 1 than the control's quartiles, else `no difference`.

        >>> noise = {"control": 0.98, "spread": (0.95, 0.99), "original_ms": 1.0, "ours_ms": 1.0, "rounds": 9}
        >>> [Latency(ratio=r, **noise).verdict for r in (1.6, 0.97, 0.9)]
        ['faster', 'no difference', 'slower']
        """
        low, high = min(*self.spread, 1.0), max(*self.spread, 1.0)
        if self.ratio > high:
            return "faster"
        return "slower" if self.ratio < low else "no difference"


@dataclass(frozen=True, slots=True, kw_only=True)
class Loading:
    """Time and memory needed to load a file in a fresh process.

    Args:
        cpu_s: CPU seconds until the session is ready.
        wall_s: elapsed seconds, with the file in the system's cache.
        resident_bytes: growth of the process's memory; None without /proc.
        peak_bytes: largest growth of its memory while it loaded; None without /proc.
    """

    cpu_s: float
    wall_s: float
    resident_bytes: int | None
    peak_bytes: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Timing:
    """Cost of running and loading a file, compared with the original's.

    Args:
        latency: speed of both files, on one thread.
        original: cost of loading the original.
        ours: cost of loading the file.
    """

    latency: Latency
    original: Loading
    ours: Loading


def measure(original: bytes, ours: bytes, feeds: Feeds, *, seconds: float = 1.0) -> Timing:
    """Return the latency and loading cost of two files; see `latency` and `loading`."""
    return Timing(
        latency=latency(original, ours, feeds, seconds=seconds), original=loading(original), ours=loading(ours)
    )


def latency(original: bytes, ours: bytes, feeds: Feeds, *, seconds: float = 1.0, rounds: int | None = None) -> Latency:
    """Time a file against its original, with the original against itself as a control in the same rounds.

    Args:
        original: the float file.
        ours: the compressed file.
        feeds: one batch of inputs by name.
        seconds: how long to measure; `LEAST_ROUNDS` rounds are made in any case.
        rounds: this many rounds, however long they take.

    Raises:
        ConfigError: fewer than one round.
        SourceError: onnxruntime does not load a file, or it does not take these inputs.
    """
    times = cpu_seconds([original, ours, original], feeds, seconds=seconds, rounds=rounds)
    ratio, control = paired(times[:, 0], times[:, 1]), paired(times[:, 0], times[:, 2])
    return Latency(
        ratio=ratio.median,
        control=control.median,
        spread=(control.low, control.high),
        original_ms=float(np.median(times[:, 0]) * 1e3),
        ours_ms=float(np.median(times[:, 1]) * 1e3),
        rounds=len(times),
    )


def cpu_seconds(files: Sequence[bytes], feeds: Feeds, *, seconds: float = 1.0, rounds: int | None = None) -> Floats:
    """Return the CPU seconds of one run of each file [rounds, files], interleaved, on one thread, else as deployed.

    Each timed run follows an untimed run of the same session, to reduce the effect of other files on the caches. The
    file in the middle of a round runs four times in a row, which is faster if its weights exceed a cache (by up to 20 %
    for a 9 MB Linear), so the files take turns in the middle.

    Args:
        files: the files' bytes; a file that is listed twice gets two sessions.
        feeds: one batch of inputs by name.
        seconds: how long to measure; `LEAST_ROUNDS` rounds are made in any case.
        rounds: this many rounds, however long they take.

    Raises:
        ConfigError: fewer than one round.
        SourceError: onnxruntime does not load a file, or it does not take these inputs.
    """
    if rounds is not None and rounds < 1:
        raise ConfigError(f"The number of rounds must be at least 1, got {rounds}.")
    sessions = [session(data, "deployed", one_thread=True) for data in files]
    for active in sessions:
        for _ in range(_WARM_UP):
            run(active, feeds)
    named = dict(feeds)
    order = list(range(len(sessions)))
    times: list[Floats] = []
    end = time.perf_counter() + seconds
    while len(times) < (LEAST_ROUNDS if rounds is None else rounds) or (rounds is None and time.perf_counter() < end):
        spent = np.zeros(len(sessions))
        for i in (*order, *reversed(order)):
            spent[i] += _timed(sessions[i], named) / 2
        times.append(spent)
        order = order[1:] + order[:1]
    return np.stack(times)


def paired(a: Floats, b: Floats) -> Ratio:
    """Return how many times faster `b` is than `a`, both timed in the same rounds.

    >>> paired(np.array([2.0, 2.0, 4.0]), np.array([1.0, 1.0, 2.0]))
    Ratio(median=2.0, low=2.0, high=2.0)
    """
    low, median, high = np.percentile(a / b, (_MIDDLE_HALF[0], 50, _MIDDLE_HALF[1]))
    return Ratio(median=float(median), low=float(low), high=float(high))


def loading(data: bytes, *, processes: int = 3) -> Loading:
    """Load a file in a fresh process of this Python and measure time and memory.

    The cost of onnxruntime itself (some milliseconds and 9 MB) is excluded by creating a session for a tiny file first.

    Args:
        data: the file's bytes.
        processes: number of processes, started one after the other; each figure is the median over them.

    Raises:
        ConfigError: fewer than one process.
        SourceError: onnxruntime cannot load the file, or no process can be started.
    """
    if processes < 1:
        raise ConfigError(f"The number of processes must be at least 1, got {processes}.")
    with tempfile.TemporaryDirectory() as folder:
        path, first = Path(folder) / "net.onnx", Path(folder) / "first.onnx"
        path.write_bytes(data)
        first.write_bytes(_empty())
        found = [_load(path, first) for _ in range(processes)]
    return Loading(
        cpu_s=statistics.median(f.cpu_s for f in found),
        wall_s=statistics.median(f.wall_s for f in found),
        resident_bytes=_median([f.resident_bytes for f in found]),
        peak_bytes=_median([f.peak_bytes for f in found]),
    )


def _median(values: Sequence[int | None]) -> int | None:
    known = [v for v in values if v is not None]
    return statistics.median_low(known) if known else None


def _load(path: Path, first: Path) -> Loading:
    # -I ignores the environment; the process gets the import path of this one as an argument.
    command = [sys.executable, "-I", "-c", _LOAD, str(path), str(first), json.dumps(sys.path)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError as e:
        raise SourceError(f"Cannot start a process to load the file: {e.strerror}.") from None
    if done.returncode:
        lines = done.stderr.strip().splitlines()
        raise SourceError(lines[-1] if lines else f"The process that loads the file ended with {done.returncode}.")
    return Loading(**json.loads(done.stdout.splitlines()[-1]))


_LOAD: Final = """
import json, sys, time
path, first, sys.path[:] = *sys.argv[1:3], json.loads(sys.argv[3])
import onnxruntime

def memory():
    try:
        with open("/proc/self/status", encoding="utf-8") as status:
            fields = dict(line.split(":", 1) for line in status)
        return [1024 * int(fields[name].split()[0]) for name in ("VmRSS", "VmHWM")]
    except (OSError, KeyError):
        return None

def load(path):
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])

empty = load(first)
try:
    with open("/proc/self/clear_refs", "w") as peak:
        peak.write("5")  # resets the peak
except OSError:
    pass
before, cpu, wall = memory(), time.process_time(), time.perf_counter()
try:
    session = load(path)
except Exception as e:
    sys.exit(f"onnxruntime {onnxruntime.__version__} cannot load the file: {str(e).splitlines()[0]}")
cpu, wall, after = time.process_time() - cpu, time.perf_counter() - wall, memory()
print(json.dumps({
    "cpu_s": cpu,
    "wall_s": wall,
    "resident_bytes": after and max(0, after[0] - before[0]),
    "peak_bytes": after and max(0, max(after) - before[0]),
}))
"""


def _empty() -> bytes:
    """Return the smallest valid file."""
    x, y = (onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [1]) for name in "xy")
    graph = onnx.helper.make_graph([onnx.helper.make_node("Identity", ["x"], ["y"])], "g", [x], [y])
    opset = onnx.helper.make_opsetid("", BASE_OPSET)
    model = onnx.helper.make_model(graph, opset_imports=[opset], ir_version=ir_version(BASE_OPSET))
    data: bytes = model.SerializeToString()
    return data


def _timed(active: Session, feeds: dict[str, npt.NDArray[Any]]) -> float:
    active.run(None, feeds)
    start = _clock()
    active.run(None, feeds)
    return _clock() - start
