"""The page docs/zoo.md, from the zoo's records."""

import textwrap
from collections.abc import Mapping, Sequence

from _zoo import BATCHES, OK, REASONS, TOLERANCE, W4, W8A8, Record, modes
from zoo_nets.net import Net


def page(records: Sequence[Record], nets: Mapping[str, Net]) -> str:
    """Return the page: verdict, table by family, failures, reasons, and how to repeat it."""
    head = HEAD.format(verdict=textwrap.fill(verdict(records, nets), 120))
    return "\n\n".join([head, *tables(records, nets), failures(records), TAIL]) + "\n"


def verdict(records: Sequence[Record], nets: Mapping[str, Net]) -> str:
    """Return how many nets go through, the largest share left float, and the time."""
    done = {(r.net, r.mode) for r in records}
    failed = {r.net for r in records if r.outcome != OK}
    measured = failed | {net.name for net in nets.values() if all((net.name, mode) in done for mode in modes(net))}
    missing = len(nets) - len(measured)
    more = f"{missing} more are not measured in all modes yet. " if missing else ""
    worst = max(records, key=lambda r: r.left_float)
    seconds = sum(r.seconds for r in records)
    slowest = max(records, key=lambda r: r.seconds)
    return (
        f"**{len(measured) - len(failed)} of {len(measured)} nets go through.** {more}"
        f"The largest share of a file that stays float is {worst.left_float:.1%} ({worst.net}, {worst.mode}). "
        f"All {len(records)} exports took {seconds / 60:.0f} minutes of CPU time, the longest {slowest.seconds:.0f} s "
        f"({slowest.net}, {slowest.mode})."
    )


def tables(records: Sequence[Record], nets: Mapping[str, Net]) -> list[str]:
    """Return a table per family; in each, nets that fail come first, then those that leave most float."""
    by_key = {(r.net, r.mode): r for r in records}
    texts = []
    for family in dict.fromkeys(net.family for net in nets.values()):
        members = [net for net in nets.values() if net.family == family and (net.name, W4) in by_key]
        members.sort(key=lambda net: _badness(by_key[net.name, W4], by_key.get((net.name, W8A8))))
        if members:
            rows = [_row(net, by_key[net.name, W4], by_key.get((net.name, W8A8))) for net in members]
            texts.append("\n".join([f"## {family[0].upper()}{family[1:]}\n", *COLUMNS, *rows]))
    return texts


COLUMNS = (
    "| net | from | weights | W4 file | over ideal | float | difference | length "
    "| W8A8 file | SQNR | int8 | between | s |",
    "|---|---|---|---|---|---|---|---|---|---|---|---|---|",
)


def _badness(w4: Record, w8: Record | None) -> tuple[bool, float]:
    return all(r.outcome == OK for r in (w4, w8) if r is not None), -w4.left_float


def _row(net: Net, w4: Record, w8: Record | None) -> str:
    cells = [net.name, net.package or "drawn"]
    if w4.outcome == OK:
        cells += [
            f"{max(w4.parameters, 0) / 1e6:.2f} M", f"{w4.nbytes / 1000:,.1f} kB",
            f"{(w4.nbytes - w4.ideal) / 1000:.1f} kB", f"{w4.left_float:.1%}", f"{w4.difference:.0e}", w4.lengths,
        ]  # fmt: skip
    else:
        cells += ["", f"*{w4.outcome}*", "", "", "", ""]
    if w8 is None:
        cells += ["", "", "", ""]
    elif w8.outcome == OK:
        sqnr = "exact" if w8.sqnr is None else f"{w8.sqnr:.0f} dB"
        cells += [f"{w8.nbytes / 1000:,.1f} kB", sqnr, f"{w8.int8}", f"{w8.float_between}"]
    else:
        cells += [f"*{w8.outcome}*", "", "", ""]
    seconds = w4.seconds + (0.0 if w8 is None else w8.seconds)
    return f"| {' | '.join([*cells, f'{seconds:.0f}'])} |"


def failures(records: Sequence[Record]) -> str:
    """Return what keeps nets out, and the fixed list of outcomes."""
    failed = [r for r in records if r.outcome != OK]
    details = [textwrap.shorten(r.detail, 250, placeholder=" …") for r in failed]
    lines = [f"- {r.net}, {r.mode}: *{r.outcome}*. {text}" for r, text in zip(failed, details, strict=True)]
    reasons = [f"| {name} | {meaning} |" for name, meaning in REASONS.items()]
    return "\n".join(
        ["## What keeps nets out\n", *(lines or ["Nothing."]), "", "| outcome | means |", "|---|---|", *reasons]
    )


HEAD = f"""# The zoo

Popular nets with random weights, exported and run. Written by `benchmarks/zoo.py` from
[zoo.json](../benchmarks/results/zoo.json).

{{verdict}}

Each net is compressed to 4-bit weights with `--effort fast` (W4); convolutional nets also to 8-bit weights and
activations (W8A8), calibrated on the {sum(BATCHES)} inputs that they are run on. The files run in onnxruntime at
batches of {", ".join(map(str, BATCHES))}, and at two lengths other than the traced one where the inputs have one. Names
say where a net is smaller than the published one; images are mostly of 64 x 64 pixels.

- *over ideal*: bytes of the file beyond packed codes, tables, scales, and tensors left in float: the graph.
- *float*: share of the W4 file that is tensors left in float.
- *difference*: the largest one over the outputs' spread, of the file from the module with the decoded weights, and of
  the traced program from the user's module; at most {TOLERANCE:g}, or float32's rounding where the spread is small.
- *length*: `any` if the file takes other lengths, `fixed` if it takes only the traced one.
- *SQNR*: of the W8A8 file against the float module, without the saturation of CPUs that lack VNNI. Random weights are
  hard: trained nets lose less. What decides is `validate`, which compares activations with the float program's, rounded
  alike.
- *int8*, *between*: operators that compute in 8-bit integers in onnxruntime, and operators that compute in float on a
  path between two of these.
- *s*: CPU seconds on one thread for both modes, without importing the packages."""

TAIL = """## Repeat it

`make zoo` sets up the packages in a separate venv, measures what `benchmarks/results/zoo.json` lacks, and writes this
page. Delete the file to measure everything, or name nets:

```
build/zoo/bin/python benchmarks/zoo.py --json benchmarks/results/zoo.json --docs docs/zoo.md --nets "ResNet-18"
```"""
