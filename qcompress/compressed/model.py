"""A compressed model: the float program and one artifact per tensor; saved as a folder without any pickle of ours."""

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
    """What solving a layer's weight on calibration data gained, on that data and in the net compressed so far.

    Args:
        weight: qualified name.
        nearest_db: output over noise with each weight at the nearest level, dB; None: no noise.
        solved_db: the same with what was solved, and the bias corrected.
    """

    weight: str
    nearest_db: float | None
    solved_db: float | None


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class CompressedModel:
    """What every method ends in, for a whole model.

    Args:
        program: the float program that the artifacts belong to (BatchNorm folded).
        artifacts: one per tensor of the program's state, by qualified name.
        plan: the plan that made them.
        source_digest: short digest of the model that came in.
        plan_digest: digest of the plan as it was resolved.
        notes: what a user should be told of how it was made.
        activations: the grids that values between layers are quantized to, by their sites.
        compute: what layers compute in: `float`, `int8` or `dynamic8`.
        saturation: share of the calibration data that each grid clips, as it was found; not saved.
        snapped: error at the output of each layer whose input's offset was moved onto the grid, over the output's
            spread, by the layer's weight; see `posthoc.offsets`.
        gains: of the layers that were solved; not saved.
        solved_on: what inputs they were solved on; empty: none; not saved.

    Raises:
        ConfigError: another `compute`, or a grid under a site that is not its own.
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
        """Ideal bytes: packed codes, tables, scales, float leftovers and activation grids."""
        return sum(a.nbytes for a in self.artifacts.values()) + sum(g.nbytes for g in self.activations.values())

    def to_module(self) -> "torch.nn.Module":
        """A plain float module that holds the dequantized weights."""
        return self.program.with_state({name: a.dequantize() for name, a in self.artifacts.items()}).module()

    def report(self) -> dict[str, Any]:
        """Return the content of `report.json`: each tensor with its artifact, bytes and reason; each grid; notes."""
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
            OutputError: it exists, or cannot be written.
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
            SourceError: it is not such a folder, is damaged, or has a newer format.
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
