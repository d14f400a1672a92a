"""Exports popular nets with random weights, runs the files, and writes which go through, and what keeps others out.

    make zoo                                # sets up the packages that the nets come from, in a separate venv
    python benchmarks/zoo.py --json FILE [--nets NAME ...] [--docs FILE] [--limit 120]

Each net is exported with 4-bit weights and `--effort fast`; convolutional ones also with 8-bit weights and activations.
`_zoo.py` says what is measured. Each net and mode gets a child process, which is killed after `--limit` CPU seconds.
Results that FILE holds are kept, unless `--nets` names their nets. The child processes are forked from this one, which
has imported the packages: importing them counts for no net.

The exit code is 1 if a target is missed: 95 % of the nets go through, and none leaves more than 10 % of its bytes
float.
"""

import argparse
import json
import os
import resource
import sys
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import asdict
from importlib import import_module, metadata
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported

import torch
from _common import Bar, quiet
from _zoo import MODES, OK, W4, Record, measured, modes
from _zoo_docs import page
from zoo_nets import NETS
from zoo_nets.net import SAMPLES, Example, Net
from zoo_nets.packages import declare_torchvision_operators

LEAST_OK = 0.95  # share of the nets
MOST_FLOAT = 0.1  # share of a file
LIMIT = 120  # CPU seconds of a net
WALL = 6  # times as long by the clock: other processes may be running
PACKAGES = ("torch", "onnx", "onnxruntime", "timm", "torchvision", "transformers")


def main() -> int:
    """Measure what is missing, write the results after each net, and return 1 if a target is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--nets", nargs="+", choices=NETS, metavar="NAME", help="measure these again; default: all")
    parser.add_argument("--docs", type=Path, help="page to write from the results")
    parser.add_argument("--limit", type=float, default=LIMIT, help="CPU seconds for a net in a mode")
    args = parser.parse_args()
    records = read(args.json)
    for name in args.nets or []:
        for mode in MODES:
            records.pop((name, mode), None)
    wanted = [NETS[name] for name in args.nets or NETS]
    missing = [(net, mode) for net in wanted for mode in modes(net) if (net.name, mode) not in records]
    if missing:
        warm_up()
    for net, mode in missing:
        record = in_child(net, mode, args.limit)
        records[net.name, mode] = record
        write(args.json, records.values())
        print(f"{record.outcome:20} {mode:5} {net.name:32} {record.seconds:5.0f} s  {record.detail[:120]}", flush=True)
    listed = [records[net.name, mode] for net in NETS.values() for mode in modes(net) if (net.name, mode) in records]
    if args.docs is not None:
        args.docs.write_text(page(listed, NETS))
    bars = bars_of(listed)
    print("\n".join(map(str, bars)))
    return int(any(bar.verdict == "FAIL" for bar in bars))


def warm_up() -> None:
    """Import the packages that nets come from, and what exporting imports, before the children are forked."""
    torch.set_num_threads(1)
    declare_torchvision_operators()
    for package in ("timm", "transformers", "transformers.modeling_utils"):
        with suppress(ImportError):
            import_module(package)
    tiny = Net("tiny", "", lambda: Example(torch.nn.Conv2d(1, 2, 3), {"input": torch.zeros(SAMPLES, 1, 4, 4)}))
    with quiet():
        measured(tiny, W4)


def in_child(net: Net, mode: str, limit: float) -> Record:
    """Return the record of a net from a child process, which may take so many CPU seconds."""
    context = get_context("fork")
    ours, theirs = context.Pipe(duplex=False)
    child = context.Process(target=_measure, args=(net, mode, limit, theirs))
    child.start()
    theirs.close()
    try:
        if not ours.poll(WALL * limit):
            return Record(net.name, mode, "time limit", f"no result after {WALL * limit:g} seconds by the clock")
        record: Record = ours.recv()
        return record
    except EOFError:
        child.join()
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
        if child.exitcode == -24:
            return Record(net.name, mode, "time limit", f"more than {limit:g} CPU seconds", seconds=limit)
        return Record(net.name, mode, "ended", f"exit code {child.exitcode}, {used.ru_maxrss // 1000} MB at most")
    finally:
        child.kill()
        child.join()


def _measure(net: Net, mode: str, limit: float, results: Connection) -> None:
    resource.setrlimit(resource.RLIMIT_CPU, (int(limit), int(limit) + 5))
    with quiet():
        record = measured(net, mode)
    results.send(record)


def read(path: Path) -> dict[tuple[str, str], Record]:
    """Return the records of a file by net and mode; none if there is no file."""
    if not path.exists():
        return {}
    rows = json.loads(path.read_text())["rows"]
    records = [Record(**{**row, "batches": tuple(row["batches"]), "notes": tuple(row["notes"])}) for row in rows]
    return {(record.net, record.mode): record for record in records}


def write(path: Path, records: Iterable[Record]) -> None:
    """Write the records, in the order of the table of nets, beside the versions of the packages."""
    order = list(NETS)
    listed = sorted((r for r in records if r.net in NETS), key=lambda r: (order.index(r.net), MODES.index(r.mode)))
    versions = {}
    for package in PACKAGES:
        with suppress(metadata.PackageNotFoundError):
            versions[package] = metadata.version(package).partition("+")[0]
    found = {"made_with": versions, "rows": [asdict(record) for record in listed]}
    beside = path.with_suffix(".tmp")
    beside.write_text(json.dumps(found, indent=1) + "\n")
    beside.replace(path)


def bars_of(records: list[Record]) -> list[Bar]:
    """Return the targets, of the nets that were measured."""
    nets = {record.net for record in records}
    failed = {record.net for record in records if record.outcome != OK}
    seconds = {name: sum(r.seconds for r in records if r.net == name) for name in nets}
    return [
        Bar("share of the nets that go through", 1 - len(failed) / max(1, len(nets)), LEAST_OK, at_least=True),
        Bar("largest share left float", max((r.left_float for r in records), default=0.0), MOST_FLOAT),
        Bar("most CPU seconds of a net", max(seconds.values(), default=0.0), LIMIT),
        Bar("CPU minutes in all", sum(seconds.values()) / 60, 75),
    ]


if __name__ == "__main__":
    sys.exit(main())
