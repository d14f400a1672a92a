"""The part of `export`'s report on integer compute: how each layer computes, and the grids of activations."""

from collections.abc import Collection, Iterable
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, final

from rich.table import Table

from qcompress.artifacts import SiteGrid
from qcompress.plan.resolve import ResolvedPlan
from qcompress_cli.terminal.console import new_table
from qcompress_cli.terminal.numbers import counted, number, share
from qcompress_cli.terminal.text import printable

if TYPE_CHECKING:
    from qcompress.compressed.model import CompressedModel
    from qcompress_exporters.auto_compute import AutoCompute
    from qcompress_exporters.report import ExportReport, LayerReport

_NAMED = 3


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class ComputeReport:
    """How the layers of a file compute.

    Args:
        small: the compressed model.
        report: the report of its file.
        format: how int8 compute is written; None for other compute.
        widened: the grids that have more bits than the plan asks for.
        asked: the widths of activations that the plan asks for.
        auto: what --compute auto measured; None with other compute.
    """

    small: "CompressedModel"
    report: "ExportReport"
    format: str | None
    widened: Collection[SiteGrid]
    asked: Collection[int] = ()
    auto: "AutoCompute | None" = None

    @classmethod
    def of(
        cls,
        small: "CompressedModel",
        report: "ExportReport",
        resolved: ResolvedPlan,
        format: str | None,
        auto: "AutoCompute | None" = None,
    ) -> "ComputeReport":
        """Return the report of a file whose plan is known."""
        from qcompress.posthoc.activations import widened

        asked = {t.name: t.activation_bits for t in resolved.compressed if t.activation_bits is not None}
        wider = widened(small.program, list(small.activations.values()), asked) if small.compute == "int8" else []
        return cls(small=small, report=report, format=format, widened=wider, asked=set(asked.values()), auto=auto)

    def as_dict(self) -> dict[str, Any]:
        """Return its part of the JSON document."""
        wide = {grid.site for grid in self.widened}
        return {
            "compute": self.report.compute,
            "format": self.format,
            "auto": None if self.auto is None else asdict(self.auto),
            "float_operators": dict(self.report.float_operators),
            "layers": [
                {**asdict(layer), "snapped": self.small.snapped.get(layer.weight)} for layer in self.report.layers
            ],
            "activations": [
                {
                    "site": _site(grid),
                    "bits": grid.bits,
                    "widened": grid.site in wide,
                    "scale": float(grid.scale),
                    "zero_point": grid.zero_point,
                    "offset": float(grid.offset),
                    "saturation": self.small.saturation.get(grid.site),
                }
                for grid in self.small.activations.values()
            ],
        }

    def lines(self) -> list[str]:
        """Return lines for people; nothing where all layers compute in float."""
        from qcompress_exporters.onnx_format.int8.layers import PADDED, SHARED

        layers = self.report.layers
        measured = [] if self.auto is None else _measured(self.auto)
        if self.report.compute == "float":
            return measured
        integer = sum(layer.compute != "float" for layer in layers)
        first = f"{integer:,} of {counted(len(layers), 'layer')} compute in int8"
        if self.report.compute == "dynamic8":
            lines = [f"{first}, their inputs quantized at run time (dynamic8)."]
        else:
            from qcompress.graph.widths import widths_text

            widths = widths_text({layer.weight: layer.activation_bits for layer in layers}, self.asked)
            lines = [*measured, f"{first} (format {self.format}); {widths}."]
        if self.report.float_operators:
            each = ", ".join(f"{count:,} {name}" for name, count in self.report.float_operators.items())
            total = counted(sum(self.report.float_operators.values()), "operator")
            lines.append(f"computed in float between int8 layers: {total} ({each})")
        if self.widened:
            lines.append(
                f"{counted(len(self.widened), 'activation')} at 8 bits although the plan asks for fewer: sums, "
                "pooling, outputs or layers of another width read them too"
            )
        for reason, found in _grouped(layers, "why"):
            lines.append(f"computed in float, {reason}: {_names(found)}")
            if reason in (PADDED, SHARED):
                lines.append("  --offsets snap lets them compute in int8; at 2 bits that can cost accuracy")
        for offset, found in _grouped(layers, "offset"):
            if offset in _OFFSETS:
                lines.append(f"{_OFFSETS[offset]}: {_names(found)}")
        snapped = [layer for layer in layers if layer.weight in self.small.snapped]
        if snapped:
            most = max(self.small.snapped[layer.weight] for layer in snapped)
            lines.append(
                f"offset of the input moved onto its grid, at most {share(most)} % of the output's spread: "
                f"{_names(snapped)}"
            )
        return lines

    def tables(self) -> list[Table]:
        """Return the tables of --explain: every layer, and every activation with the share that its grid clips."""
        if self.report.compute == "float":
            return []
        layers = new_table("layer", ["compute", "offset", "pairs %", "why"], left=["compute", "offset", "why"])
        for layer in self.report.layers:
            pairs = "" if layer.compute == "float" else share(layer.saturation)
            layers.add_row(printable(layer.weight), layer.compute, layer.offset, pairs, layer.why)
        layers.caption = "pairs %: weights whose products can saturate on CPUs without VNNI; --reduce-range avoids them"
        layers.caption_justify = "left"
        if not self.small.activations:
            return [layers]
        grids = new_table("activation", ["bits", "scale", "zero", "clipped %"])
        for grid in self.small.activations.values():
            zero = "–" if grid.zero_point is None else str(grid.zero_point)
            clipped = share(self.small.saturation.get(grid.site))
            grids.add_row(printable(_site(grid)), str(grid.bits), number(float(grid.scale)), zero, clipped)
        return [layers, grids]


# What becomes of offsets that are not zero points.
_OFFSETS = {
    "folded": "offset of the input folded into the bias, exactly",
    "added": "offset of the input added in float, exactly",
}


def _measured(auto: "AutoCompute") -> list[str]:
    """Return what --compute auto picked, and how fast each candidate was."""
    from qcompress_exporters.auto_compute import NONE

    low, high = auto.spread
    found = sorted(auto.candidates, key=lambda c: (c.name != auto.picked, -c.speed))
    speeds = ", ".join(f"for {c.name} {c.speed:.2f} x" for c in found if c.name != NONE)
    picked = "float" if auto.picked == NONE else f"int8 for {auto.picked}"
    return [
        f"--compute auto picked {picked}: over the float file's speed here, batch 1, one thread, int8 has {speeds} "
        f"(noise: {low:.2f} to {high:.2f} x)"
    ]


def _site(grid: SiteGrid) -> str:
    """Return the name of the value that a grid quantizes, or of the layer whose input it is."""
    name, index = grid.site
    return name if index < 0 else f"input of {name}"


def _grouped(layers: "Iterable[LayerReport]", by: str) -> "list[tuple[str, list[LayerReport]]]":
    groups: dict[str, list[LayerReport]] = {}
    for layer in layers:
        if getattr(layer, by):
            groups.setdefault(getattr(layer, by), []).append(layer)
    return list(groups.items())


def _names(layers: "list[LayerReport]") -> str:
    names = ", ".join(printable(layer.weight) for layer in layers[:_NAMED]) + (" …" if len(layers) > _NAMED else "")
    return f"{counted(len(layers), 'layer')} ({names})"
