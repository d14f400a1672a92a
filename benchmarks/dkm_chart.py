"""Draws the time of a DKM step per weight over the number of weights, and writes its table, from the JSON of dkm.py.

    python benchmarks/dkm_chart.py [--json benchmarks/results/dkm.json] [--out docs/dkm.svg] [--table docs/training.md]

Both show weights with outliers in the middle of the schedule of τ. The table replaces what is between two marks in the
document. The chart is SVG in the style of chart.py.
"""

import argparse
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from _dkm_tools import AUTO, COREML, HARD, LSQ, OURS, TORCH
from chart import BOTTOM, HEIGHT, LEFT, RIGHT, ROOT, TOP, WIDTH, svg

LEAST_COUNT, MOST_COUNT = 8e4, 2.5e7
LEAST_NS, MOST_NS = 10.0, 1e5
COUNTS = {10**5: "100,000", 10**6: "1 million", 4 * 10**6: "4 million", 16 * 10**6: "16 million"}
COLOURS = {4: "b", 16: "a", 256: "c"}
DASHES = {OURS: "", COREML: "9 6", TORCH: "2 5"}
TABLE_OF = (OURS, AUTO, COREML, TORCH, HARD, LSQ)
BEGIN, END = "<!-- dkm table -->", "<!-- end of dkm table -->"


@dataclass(frozen=True)
class Line:
    """The figures of one tool and palette size, the smallest tensor first.

    Args:
        tool: its name.
        centroids: K.
        points: numbers of weights, with the nanoseconds per weight.
    """

    tool: str
    centroids: int
    points: Sequence[tuple[int, float]]


def main() -> None:
    """Read the JSON; write the chart and the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, default=ROOT / "benchmarks" / "results" / "dkm.json")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "dkm.svg")
    parser.add_argument("--table", type=Path, default=ROOT / "docs" / "training.md")
    args = parser.parse_args()
    sections = json.loads(args.json.read_text())
    found = [row for name in ("time", "memory") for row in sections[name]["found"] if is_shown(row)]
    args.out.write_text(chart(lines(found)))
    before, _, rest = args.table.read_text().partition(BEGIN)
    args.table.write_text(f"{before}{BEGIN}\n{table(found)}\n{END}{rest.partition(END)[2]}")
    print(f"wrote {args.out} and {args.table}")


def is_shown(row: dict[str, Any]) -> bool:
    """Return whether a figure belongs to the chart and the table."""
    return bool(row["case"]["place"] == "middle" and row["case"]["outliers"])


def lines(found: Sequence[dict[str, Any]]) -> list[Line]:
    """Return the lines of the chart."""
    made = []
    for tool in DASHES:
        for centroids in COLOURS:
            rows = [r for r in found if r["tool"] == tool and r["case"]["centroids"] == centroids and r["cpu_s"]]
            counts = {r["case"]["count"]: 1e9 * middle(r["cpu_s"]) for r in rows if r["case"]["dim"] == 1}
            made.append(Line(tool, centroids, [(count, ns / count) for count, ns in sorted(counts.items())]))
    return [line for line in made if line.points]


def chart(shown: Sequence[Line]) -> str:
    """Return the chart as SVG."""
    parts = [*axes(), *(part for line in reversed(shown) for part in drawn(line)), *legend()]
    return svg("A DKM step: time per weight over their number, on one CPU core", parts)


def axes() -> list[str]:
    """Return grid lines and the numbers at both axes."""
    parts = []
    for power in range(round(math.log10(LEAST_NS)), round(math.log10(MOST_NS)) + 1):
        height = y(10**power)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{height}" y2="{height}"/>')
        label = f"{10**power} ns" if power < 3 else f"{10 ** (power - 3)} µs"
        parts.append(f'<text class="soft end" x="{LEFT - 8}" y="{height + 5}">{label}</text>')
    below = HEIGHT - BOTTOM + 22
    parts += [f'<text class="soft middle" x="{x(count)}" y="{below}">{text}</text>' for count, text in COUNTS.items()]
    return parts


def drawn(line: Line) -> list[str]:
    """Return a line with its points."""
    colour, places = COLOURS[line.centroids], [(x(count), y(ns)) for count, ns in line.points]
    path = " ".join(f"{left},{height}" for left, height in places)
    parts = [f'<polyline class="line {colour}" stroke-dasharray="{DASHES[line.tool]}" points="{path}"/>']
    for (left, height), (count, ns) in zip(places, line.points, strict=True):
        tip = f"{line.tool}, K={line.centroids}, {count:,} weights: {ns:.1f} ns per weight"
        parts.append(f'<circle class="{colour}" cx="{left}" cy="{height}" r="4"><title>{tip}</title></circle>')
    return parts


def legend() -> list[str]:
    """Return the names of tools and palette sizes, below the plot."""
    parts, height, left = [], HEIGHT - 18, LEFT
    for tool, dash in DASHES.items():
        parts.append(
            f'<line class="line" stroke="#57606a" stroke-dasharray="{dash}" x1="{left}" x2="{left + 40}" '
            f'y1="{height - 5}" y2="{height - 5}"/>'
        )
        parts.append(f'<text x="{left + 48}" y="{height}">{tool}</text>')
        left += 172
    for centroids, colour in COLOURS.items():
        parts.append(f'<circle class="{colour}" cx="{left}" cy="{height - 5}" r="5"/>')
        parts.append(f'<text x="{left + 11}" y="{height}">K = {centroids}</text>')
        left += 86
    return parts


def table(found: Sequence[dict[str, Any]]) -> str:
    """Return the table in Markdown."""
    cases: dict[tuple[int, int, int], dict[str, dict[str, Any]]] = {}
    for row in found:
        key = row["case"]["dim"], row["case"]["count"], row["case"]["centroids"]
        known = cases.setdefault(key, {}).setdefault(row["tool"], {})
        known.update({name: value for name, value in row.items() if value})
    text = ["| weights | K | d | form | " + " | ".join(TABLE_OF) + " |", "|---" * (4 + len(TABLE_OF)) + "|"]
    for (dim, count, centroids), tools in sorted(cases.items()):
        cells = [figure(tools.get(tool, {})) for tool in TABLE_OF]
        text.append(f"| {COUNTS[count]} | {centroids} | {dim} | {tools[OURS].get('form', '')} | {' | '.join(cells)} |")
    return "\n".join(text)


def figure(row: dict[str, Any]) -> str:
    """Return the time and memory of a tool, or why it did not run."""
    if row.get("expected"):
        return f"not run (expected {row['expected'] / 1e9:.0f} GB)"
    parts = [f"{1e3 * middle(row['cpu_s']):,.0f} ms"] if row.get("cpu_s") else []
    return ", ".join([*parts, f"{row['memory'] / 1e6:,.0f} MB"] if row.get("memory") else parts)


def middle(values: Sequence[float]) -> float:
    """Return the median."""
    return sorted(values)[len(values) // 2]


def x(count: float) -> float:
    """Return the horizontal position of a number of weights."""
    share = math.log(count / LEAST_COUNT) / math.log(MOST_COUNT / LEAST_COUNT)
    return round(LEFT + (WIDTH - LEFT - RIGHT) * share, 1)


def y(ns: float) -> float:
    """Return the vertical position of a time per weight."""
    share = math.log(ns / LEAST_NS) / math.log(MOST_NS / LEAST_NS)
    return round(HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * share, 1)


if __name__ == "__main__":
    main()
