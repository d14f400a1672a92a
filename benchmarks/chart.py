"""Draws accuracy over file size, ours and the best other tool's, from the JSON of posthoc.py.

    python benchmarks/chart.py [--json benchmarks/results/posthoc-resnet20.json] [--out docs/accuracy-over-size.svg]

The chart is plain SVG, written without a library. Text stays text, and the colours follow the reader's light or dark
theme. At each width, the chart shows the other tool with the highest accuracy.
"""

import argparse
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
WIDTH, HEIGHT = 860, 470
LEFT, RIGHT, TOP, BOTTOM = 66, 24, 74, 78  # margins around the plot
MOST_KB, STEP_KB = 400, 50
MOST_PERCENT, STEP_PERCENT = 100, 20
FLOAT = "float"
OURS = {"gptq": "qcompress, with 512 unlabelled images", "no data": "qcompress, without any data"}
STYLE = """
  text { font: 15px system-ui, -apple-system, "Segoe UI", Helvetica, Arial, sans-serif; fill: #1f2328 }
  .title { font-size: 19px; font-weight: 600 }
  .soft { fill: #57606a }
  .end { text-anchor: end }
  .middle { text-anchor: middle }
  .grid { stroke: #d0d7de; stroke-width: 1 }
  .float { stroke: #57606a; stroke-width: 1.5; stroke-dasharray: 2 4 }
  .line { fill: none; stroke-width: 2.5 }
  .a { stroke: #0969da } circle.a { fill: #0969da } text.a { fill: #0969da; stroke: none }
  .b { stroke: #1a7f37 } circle.b { fill: #1a7f37 } text.b { fill: #1a7f37; stroke: none }
  .c { stroke: #bc4c00 } circle.c { fill: #bc4c00 } text.c { fill: #bc4c00; stroke: none }
  @media (prefers-color-scheme: dark) {
    text { fill: #e6edf3 }
    .soft { fill: #9da7b3 }
    .grid { stroke: #30363d }
    .float { stroke: #9da7b3 }
    .a { stroke: #58a6ff } circle.a { fill: #58a6ff } text.a { fill: #58a6ff }
    .b { stroke: #3fb950 } circle.b { fill: #3fb950 } text.b { fill: #3fb950 }
    .c { stroke: #f0883e } circle.c { fill: #f0883e } text.c { fill: #f0883e }
  }"""


@dataclass(frozen=True)
class Series:
    """One line of the chart.

    Args:
        css_class: `a`, `b` or `c`, which sets the colour.
        label: its entry in the legend.
        rows: rows of the JSON, the smallest file first.
        has_widths: whether its points are labelled with their bits.
    """

    css_class: str
    label: str
    rows: Sequence[dict[str, Any]]
    has_widths: bool = False


def main() -> None:
    """Read the JSON and write the chart."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, default=ROOT / "benchmarks" / "results" / "posthoc-resnet20.json")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "accuracy-over-size.svg")
    args = parser.parse_args()
    rows = json.loads(args.json.read_text())["rows"]
    args.out.write_text(chart(rows))
    print(f"wrote {args.out}")


def chart(rows: Iterable[dict[str, Any]]) -> str:
    """Return the chart as SVG."""
    rows = sorted(rows, key=lambda row: row["nbytes"])
    (original,) = (row for row in rows if row["recipe"] == FLOAT)
    peers = best_by_width([row for row in rows if row["recipe"] not in (FLOAT, *OURS)])
    names = ", ".join(sorted({row["made_with"].partition(",")[0] for row in peers}))
    series = [
        *(
            Series(css_class, label, [row for row in rows if row["recipe"] == recipe], has_widths=css_class == "a")
            for css_class, (recipe, label) in zip("ab", OURS.items(), strict=True)
        ),
        Series("c", f"{names}, its better palettizer", peers),
    ]
    parts = [*axes(original), *(part for one in reversed(series) for part in drawn(one)), *legend(series)]
    return svg("ResNet-20, CIFAR-10: accuracy over file size, no training, default settings", parts)


def svg(title: str, parts: Iterable[str]) -> str:
    """Return an image with a title, from its elements."""
    body = "\n".join(f"  {part}" for part in parts)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{title}">\n'
        f"  <style>{STYLE}\n  </style>\n"
        f'  <text class="title" x="{LEFT - 48}" y="30">{title}</text>\n'
        f"{body}\n</svg>\n"
    )


def best_by_width(rows: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the row with the highest accuracy at each width, the smallest file first."""
    best: dict[int, dict[str, Any]] = {}
    for row in rows:
        if row["bits"] not in best or row["top1"] > best[row["bits"]]["top1"]:
            best[row["bits"]] = row
    return sorted(best.values(), key=lambda row: row["nbytes"])


def axes(original: dict[str, Any]) -> list[str]:
    """Return grid lines, the numbers at both axes, and the accuracy of the float file."""
    parts = []
    for percent in range(0, MOST_PERCENT + 1, STEP_PERCENT):
        height = y(percent / 100)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{height}" y2="{height}"/>')
        parts.append(f'<text class="soft end" x="{LEFT - 8}" y="{height + 5}">{percent} %</text>')
    middle, below = (LEFT + WIDTH - RIGHT) / 2, HEIGHT - BOTTOM + 22
    parts += [
        f'<text class="soft middle" x="{x(1000 * kb)}" y="{below}">{kb}</text>' for kb in range(0, MOST_KB + 1, STEP_KB)
    ]
    parts.append(f'<text class="soft middle" x="{middle}" y="{below + 22}">file size, kB</text>')
    note = "File size of the other tool: the least that a file of its palettes would take; it writes none here."
    parts.append(f'<text class="soft" x="{LEFT - 48}" y="{HEIGHT - 10}" style="font-size: 13px">{note}</text>')
    height = y(original["top1"])
    text = f"float: {original['top1']:.1%}, {original['nbytes'] / 1000:,.0f} kB".replace("%", " %")
    parts.append(f'<line class="float" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{height}" y2="{height}"/>')
    parts.append(f'<text class="soft end" x="{WIDTH - RIGHT}" y="{height - 9}">{escape(text)}</text>')
    return parts


def drawn(series: Series) -> list[str]:
    """Return the line of a series with its points."""
    points = [(x(row["nbytes"]), y(row["top1"])) for row in series.rows]
    path = " ".join(f"{left},{height}" for left, height in points)
    parts = [f'<polyline class="line {series.css_class}" points="{path}"/>']
    for (left, height), row in zip(points, series.rows, strict=True):
        tip = f"{series.label}, {row['bits']} bits: {row['top1']:.2%}, {row['nbytes']:,} B"
        circle = f'<circle class="{series.css_class}" cx="{left}" cy="{height}" r="5">'
        parts.append(f"{circle}<title>{escape(tip)}</title></circle>")
        if series.has_widths:
            width = "1 bit" if row["bits"] == 1 else f"{row['bits']} bits"
            parts.append(f'<text class="{series.css_class} middle" x="{left}" y="{height - 13}">{width}</text>')
    return parts


def legend(series: Sequence[Series]) -> list[str]:
    """Return one legend entry per line, in the empty lower right of the plot."""
    left, top = x(175_000), y(0.52)
    parts = []
    for i, one in enumerate(series):
        height = top + 27 * i
        parts.append(f'<line class="line {one.css_class}" x1="{left}" x2="{left + 30}" y1="{height}" y2="{height}"/>')
        parts.append(f'<circle class="{one.css_class}" cx="{left + 15}" cy="{height}" r="5"/>')
        parts.append(f'<text x="{left + 42}" y="{height + 5}">{escape(one.label)}</text>')
    return parts


def x(nbytes: float) -> float:
    """Return the horizontal position of a file size."""
    return round(LEFT + (WIDTH - LEFT - RIGHT) * nbytes / (1000 * MOST_KB), 1)


def y(share: float) -> float:
    """Return the vertical position of an accuracy between 0 and 1."""
    return round(HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * 100 * share / MOST_PERCENT, 1)


if __name__ == "__main__":
    main()
