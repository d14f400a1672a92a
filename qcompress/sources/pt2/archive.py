"""Reads exported programs (.pt2) as if they were hostile.

`torch.export.load` would unpickle sample inputs, weights and constants without restriction, import modules that tree
specifications name, evaluate sizes through sympy and execute guards. So the archive is checked first, and torch reads
a new archive, which is written here from checked values only: it has no pickle of the file and no unknown member.
"""

import io
import json
import logging
import re
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, final

from qcompress.errors import QCompressError, SourceError, UnsafeFileError, missing
from qcompress.graph.options import ProgramOptions
from qcompress.graph.weights import Tensor
from qcompress.sources.arch import program_of_state_dict
from qcompress.sources.base import SourceOptions, SourceTensor
from qcompress.sources.detect import DESCRIPTIONS, content_of
from qcompress.sources.file_source import AbstractFile
from qcompress.sources.pt2.graph import checked_program
from qcompress.sources.pt2.kinds import graph_kinds
from qcompress.sources.pt2.payload import Payload, read_payload
from qcompress.sources.pt2.samples import checked_samples
from qcompress.sources.strided import Strided, lazy_view
from qcompress.user_code import one_line
from qcompress.zip_archive import ZipArchive

if TYPE_CHECKING:
    import torch

    from qcompress.graph.program import FloatProgram

_MODEL: Final = "models/model.json"
_SAMPLES: Final = "data/sample_inputs/model.pt"
_MEMBERS: Final = re.compile(
    r"(archive_format|archive_version|byteorder|version|\.data/(version|serialization_id|\.?\w+)|models/model\.json"
    r"|data/(weights|constants)/(model_(weights|constants)_config\.json|(weight|tensor)_\d+)"
    r"|data/sample_inputs/model\.pt|extra/.*)\Z"
)


@final
class ExportedSource(AbstractFile):
    """An exported program in a file: its tensors are read from the archive, its program through a checked copy.

    Args:
        path: the file.
        options: with `arch`, the tensors are loaded into that architecture instead.
        weightless: whether a program without any tensor is accepted.

    Raises:
        UnsafeFileError: it holds compiled code, pickled weights or anything else that could run.
        SourceError: it is damaged, or has a layout that is not read.
    """

    def __init__(self, path: Path, options: SourceOptions | None = None, *, weightless: bool = False) -> None:
        self.path = path
        self._options = options or SourceOptions()
        self._archive = ZipArchive(path).without_top_folder()
        _check_members(self._archive)
        self._json = _parsed(self._archive)
        self._weights = read_payload(self._archive, "weights")
        self._constants = read_payload(self._archive, "constants")
        if not weightless and not self._weights.views and not self._constants.views:
            raise SourceError(f"no tensor found in {path}: the exported program has no weights.")

    def tensors(self) -> Iterator[SourceTensor]:
        """Yield every weight and constant, tied ones once; torch is not needed, and no code in the file is run."""
        return self._tensors(self._weights, self._constants)

    def program(self, options: ProgramOptions) -> "FloatProgram":
        """Return the program; its archive is checked and rewritten before torch reads it.

        Raises:
            UnsafeFileError: something in the archive could run code.
            SourceError: this torch cannot read it.
        """
        if self._options.arch is not None:
            return program_of_state_dict(self._tensors(self._weights), self._options, options, self.label)
        exported = self.exported_program()

        from qcompress.graph.tracing import from_exported

        return from_exported(exported, options)

    def exported_program(self) -> "torch.export.ExportedProgram":
        """Load the checked archive with `torch.export.load`.

        Raises:
            UnsafeFileError: something in the archive could run code.
            SourceError: this torch cannot read it.
        """
        try:
            import torch
        except ImportError:
            raise missing("torch", "loading an exported program") from None
        checked = self._checked_archive()
        log = logging.getLogger("torch.export")
        level = log.level
        try:
            log.setLevel(logging.CRITICAL)  # torch logs a traceback; the error below says the same
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                return torch.export.load(checked)
        except QCompressError:
            raise
        except Exception as e:
            writer = self._json.get("torch_version") or "an unknown torch"
            raise SourceError(
                f"{self.label} was exported by torch {writer} and cannot be loaded by torch {torch.__version__}: "
                f"{one_line(e)}. Export it again with this torch, or pass its architecture with --arch."
            ) from e
        finally:
            log.setLevel(level)

    def _tensors(self, *payloads: Payload) -> Iterator[SourceTensor]:
        views = {name: view for payload in payloads for name, view in payload.views.items()}
        groups: dict[object, list[str]] = {}
        for name, view in views.items():
            groups.setdefault(view if view.shape and 0 not in view.shape else (name, view), []).append(name)
        tied = {
            name: Tensor(first, views[first].shape, views[first].dtype.kind not in "biuc")
            for first, *rest in groups.values()
            for name in (first, *rest)
        }
        kinds = self._kinds(tied)
        for first, *rest in groups.values():
            yield SourceTensor(first, kinds.get(first, "other"), self._lazy(views[first]), tuple(rest))

    def _lazy(self, view: Strided) -> Any:
        return lazy_view(view, lambda: self._archive.data(view.storage))

    def _kinds(self, tensors: Mapping[str, Tensor]) -> dict[str, str]:
        try:
            return graph_kinds(self._json["graph_module"], tensors)
        except (KeyError, TypeError, AttributeError, IndexError) as e:
            raise SourceError(f"{self.label} is damaged: its graph cannot be read ({type(e).__name__}: {e}).") from None

    def _checked_archive(self) -> io.BytesIO:
        program = checked_program(self._json, self.label)
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as out:
            for name, text in (("archive_format", "pt2"), ("archive_version", "0"), (".data/version", "6\n")):
                out.writestr(f"model/{name}", text)
            out.writestr("model/byteorder", "little")
            out.writestr(f"model/{_MODEL}", json.dumps(program))
            out.writestr(f"model/{_SAMPLES}", self._samples())
            for which, payload in (("weights", self._weights), ("constants", self._constants)):
                out.writestr(f"model/data/{which}/model_{which}_config.json", json.dumps(payload.config))
                for member in dict.fromkeys(view.storage for view in payload.views.values()):
                    with out.open(f"model/{member}", "w", force_zip64=True) as f:
                        f.write(self._archive.data(member).data)
        buffer.seek(0)
        return buffer

    def _samples(self) -> bytes:
        raw = self._archive.read(_SAMPLES, limit=1 << 32) if _SAMPLES in self._archive else b""
        return checked_samples(raw, self.label) if raw else b""


def load_exported(path: Path) -> "torch.export.ExportedProgram":
    """Load an untrusted file as `torch.export.load` would, but check it first and run no code in it.

    Raises:
        SourceError: it is not an exported program, is damaged, or this torch cannot read it.
        UnsafeFileError: something in it could run code.
    """
    content = content_of(path)
    if content != "exported":
        raise SourceError(f"{path} must be an exported program, but it is {DESCRIPTIONS[content]}.")
    return ExportedSource(path, weightless=True).exported_program()


def _check_members(archive: ZipArchive) -> None:
    for name in archive.names:
        if name.startswith(("data/aotinductor/", "data/executorch/")) or name.endswith((".so", ".cubin", ".cpp")):
            raise UnsafeFileError(
                f"{archive.label} is refused: it holds compiled code ({name}), which loading would run. Save the "
                "exported program itself with torch.export.save."
            )
        if name in ("data/weights/model.pt", "data/constants/model.pt"):
            raise UnsafeFileError(
                f"{archive.label} is refused: {name} is a pickle as older torch wrote it. If you trust the file, load "
                "it and save it again with torch.export.save of torch 2.9 or later."
            )
        if re.match(r"data/constants/(custom_obj|opaque_obj)", name):
            raise UnsafeFileError(
                f"{archive.label} is refused: it holds a custom object ({name}), a pickle that torch would run. Export "
                "a model of plain tensors."
            )
        if not _MEMBERS.match(name):
            raise UnsafeFileError(
                f"{archive.label} is refused: it holds {name!r}, which torch.export.save does not write for a float "
                "model."
            )
    version = archive.read("archive_version", limit=16) if "archive_version" in archive else b"0"
    if archive.read("archive_format", limit=16) != b"pt2" or version.strip() != b"0":
        raise SourceError(f"{archive.label} must be an exported program in archive version 0, got {version!r}.")
    if "byteorder" in archive and archive.read("byteorder", limit=16) != b"little":
        raise SourceError(f"{archive.label} must be in little byte order.")


def _parsed(archive: ZipArchive) -> dict[str, Any]:
    try:
        program = json.loads(archive.read(_MODEL).decode())
    except (ValueError, RecursionError) as e:
        raise SourceError(f"{archive.label} is damaged: {_MODEL} is not JSON ({one_line(e)[:120]}).") from None
    if not isinstance(program, dict) or not isinstance(program.get("graph_module"), dict):
        raise SourceError(f"{archive.label} is damaged: {_MODEL} does not hold an exported program.")
    return program
