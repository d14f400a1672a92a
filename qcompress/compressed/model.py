"""A compressed model: the float program and one artifact per tensor; saved as a folder without pickles of our own."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, final, get_args

from qcompress.artifacts import Artifact, SiteGrid
from qcompress.artifacts.base import bits_per_weight
from qcompress.compressed.folder import (
    FORMAT_VERSION,
    PLAN,
    activations_of,
    pack_artifacts,
    read_artifacts,
    read_program,
    write_folder,
)
from qcompress.deployment import Compute
from qcompress.errors import ConfigError
from qcompress.plan.plan import Plan, load_plan

if TYPE_CHECKING:
    import torch

    from qcompress.graph.program import FloatProgram


@dataclass(frozen=True, slots=True)
class LayerGain:
    """The gain from solving a layer's weight on calibration data, measured on that data with earlier layers compressed.

    Args:
        weight: qualified name.
        nearest_db: output over noise with each weight rounded to the nearest level, in dB; None without noise.
        solved_db: the same with the solved weight and the corrected bias.
    """

    weight: str
    nearest_db: float | None
    solved_db: float | None


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class CompressedModel:
    """The result of compressing a whole model by any method.

    Args:
        program: the float program that the artifacts belong to (BatchNorm folded).
        artifacts: one per tensor of the program's state, by qualified name.
        plan: the plan that made them.
        source_digest: short digest of the original model.
        plan_digest: digest of the resolved plan.
        notes: notes for the user on how it was made.
        activations: the grids of quantized activations, by site.
        compute: the arithmetic of the layers: `float`, `int8` or `dynamic8`.
        saturation: share of the calibration data that each grid clips, by site; not saved.
        snapped: by the weight of each layer whose input's offset was moved onto the grid: the resulting error of the
            layer's output over its spread; see `posthoc.offsets`.
        gains: one for each solved layer; not saved.
        solved_on: description of the inputs that layers were solved on; empty if no layer was; not saved.

    Raises:
        ConfigError: `compute` is unknown, or a grid is stored under another site than its own.
    """

    program: "FloatProgram"
    artifacts: Mapping[str, Artifact]
    plan: Plan
    source_digest: str
    plan_digest: str
    notes: tuple[str, ...] = ()
    activations: Mapping[tuple[str, int], SiteGrid] = field(default_factory=dict)
    compute: Compute = "float"
    saturation: Mapping[tuple[str, int], float] = field(default_factory=dict)
    snapped: Mapping[str, float] = field(default_factory=dict)
    gains: tuple[LayerGain, ...] = ()
    solved_on: str = ""

    def __post_init__(self) -> None:
        if self.compute not in get_args(Compute):
            raise ConfigError(
                f"CompressedModel.compute must be one of {', '.join(get_args(Compute))}, got {self.compute!r}."
            )
        for site, grid in self.activations.items():
            if site != grid.site:
                raise ConfigError(
                    f"CompressedModel.activations must hold each grid under its site, {grid.site}, got {site}."
                )

    @property
    def nbytes(self) -> int:
        """Ideal size in bytes: packed codes, tables, scales, tensors left in float and activation grids."""
        return sum(a.nbytes for a in self.artifacts.values()) + sum(g.nbytes for g in self.activations.values())

    def to_module(self) -> "torch.nn.Module":
        """Return a plain float module with the dequantized weights."""
        return self.program.with_state({name: a.dequantize() for name, a in self.artifacts.items()}).module()

    def report(self) -> dict[str, Any]:
        """Return the content of `report.json`: a record of each tensor and of each grid, and the notes."""
        return {
            "format_version": FORMAT_VERSION,
            "nbytes": self.nbytes,
            "tensors": [
                {
                    "name": name,
                    "artifact": a.kind,
                    "shape": list(a.shape),
                    "nbytes": a.nbytes,
                    "bits_per_weight": round(bits_per_weight(a), 4),
                    "reason": a.reason or None,
                }
                for name, a in self.artifacts.items()
            ],
            "compute": self.compute,
            "activations": [
                {**grid.as_dict(), "zero_point": grid.zero_point, "offset": float(grid.offset)}
                for grid in self.activations.values()
            ],
            "notes": list(self.notes),
        }

    def save(self, folder: str | Path) -> None:
        """Write the folder, whole or not at all.

        Args:
            folder: must not exist.

        Raises:
            OutputError: the folder exists, or cannot be written.
        """
        header = {
            "source_digest": self.source_digest,
            "plan_digest": self.plan_digest,
            "input_names": list(self.program.input_names),
            "output_names": list(self.program.output_names),
            "dynamic": [[name, axis, label] for (name, axis), label in self.program.dynamic.items()],
            "notes": list(self.notes),
            "activations": [grid.as_dict() for grid in self.activations.values()],
            "compute": self.compute,
            "snapped": dict(self.snapped),
        }
        write_folder(
            Path(folder),
            weights=pack_artifacts(self.artifacts, header),
            plan=self.plan.to_toml(),
            report=self.report(),
            program=self.program.without_origins(),
        )

    @classmethod
    def load(cls, folder: str | Path) -> "CompressedModel":
        """Read a folder that `save` wrote. Nothing in it is executed.

        Args:
            folder: the folder.

        Raises:
            SourceError: the folder was not written by `save`, is damaged, or has a newer format.
        """
        folder = Path(folder)
        header, artifacts = read_artifacts(folder)
        program = read_program(folder, header, artifacts)
        return cls(
            program=program,
            artifacts={name: artifacts[name] for name in program.state()},
            plan=load_plan(folder / PLAN),
            source_digest=header["source_digest"],
            plan_digest=header["plan_digest"],
            notes=tuple(header["notes"]),
            activations=activations_of(header),
            compute=header["compute"],
            snapped=header["snapped"],
        )
