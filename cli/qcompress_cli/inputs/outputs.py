"""The files that `export` writes: where they go, and what must never be replaced."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from qcompress.errors import ConfigError, OutputError
from qcompress.files import check_writable
from qcompress.sources.base import Source
from qcompress_cli.inputs.project import OWN_FILE, PYPROJECT, RunOptions

if TYPE_CHECKING:
    from qcompress.deployment import Compute
    from qcompress.plan.resolve import ResolvedPlan


@dataclass(frozen=True, slots=True, kw_only=True)
class Outputs:
    """What an export writes.

    Args:
        file: the ONNX file; None where its name depends on the model and the plan.
        plan: the resolved plan; None where it is not saved.
        compressed: folder of the compressed model; None where it is not saved.
        force: whether existing files are replaced.
        inputs: files that the command reads, which are never replaced.
    """

    file: Path | None
    plan: Path | None
    compressed: Path | None
    force: bool
    inputs: tuple[Path, ...]

    def check(self) -> None:
        """Reject what cannot be written.

        Raises:
            ConfigError: two of them are the same.
            OutputError: one cannot be written.
        """
        for option, path in (("-o", self.file), ("--save-plan", self.plan)):
            if path is not None:
                check_writable(path, force=self.force, inputs=self.inputs, flag=option)
        if self.compressed is not None:
            if self.compressed.exists():
                raise OutputError(f"{self.compressed} exists: name another folder, or remove it first.")
            check_writable(self.compressed, flag="--save-compressed")
        named = [path for path in (self.file, self.plan, self.compressed) if path is not None]
        if len({path.absolute() for path in named}) < len(named):
            raise ConfigError("-o, --save-plan and --save-compressed must name different files.")

    def check_file(self, path: Path) -> None:
        """Reject an ONNX file that cannot be written; see `check`."""
        check_writable(path, force=self.force, inputs=self.inputs)


def input_files(source: Source, given: RunOptions) -> tuple[Path, ...]:
    """Return the user's files that a command reads, those in a folder one by one.

    Args:
        source: the opened MODEL.
        given: the run's options.
    """
    named = [text for text in (given.data, given.calibration, given.arch, given.transform) if text]
    texts = [*(text.rpartition(":")[0] or text for text in named), *named]
    paths = (source.path, given.plan, Path(OWN_FILE), Path(PYPROJECT), *(Path(text) for text in texts))
    found = [path for path in paths if path and path.exists()]
    return tuple(inner for path in found for inner in (sorted(path.iterdir()) if path.is_dir() else [path]))


def default_file(source: Source, resolved: "ResolvedPlan", compute: "Compute", suffix: str) -> Path:
    """Return the name of the file where -o is not given: model.w2.onnx, model.w4a8.onnx, model.mixed.onnx.

    Args:
        source: the opened MODEL.
        resolved: the plan for this model.
        compute: what layers compute in.
        suffix: of the deployment format's files.
    """
    stem = source.path.stem if source.path is not None else "model"
    widths = {(t.bits, t.activation_bits) for t in resolved.compressed}
    if len(widths) != 1:
        return Path(f"{stem}.mixed{suffix}")
    bits, activation_bits = widths.pop()
    activations = "d8" if compute == "dynamic8" else "" if activation_bits is None else f"a{activation_bits}"
    return Path(f"{stem}.w{bits}{activations}{suffix}")
