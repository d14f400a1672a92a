"""A small network, archives whose members a test can change, and objects as in a hostile pickle."""

import io
import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn


class Small(nn.Module):
    """One layer of each kind, a tied weight and a buffer that is not saved, in a user-defined class."""

    def __init__(self, classes: int = 4) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3)
        self.bn = nn.BatchNorm2d(6)
        self.dw = nn.Conv2d(6, 6, 3, groups=6)
        self.fc = nn.Linear(6, classes)
        self.fc2 = nn.Linear(6, classes)
        self.fc2.weight = self.fc.weight
        self.register_buffer("scale", torch.ones(1), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.dw(torch.relu(self.bn(self.conv(x)))).mean((2, 3)) * self.scale
        return self.fc(y) + self.fc2(y)


class Trap:
    """An object whose pickle calls a function when it is read."""

    def __init__(self, function: Callable[..., Any], *args: Any) -> None:
        self.call = function, args

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return self.call


class Archive:
    """The bytes of an exported program, and changed copies of it."""

    def __init__(self, data: bytes) -> None:
        self.data = data

    def member(self, name: str) -> bytes:
        """Return the content of a member below the top folder."""
        with zipfile.ZipFile(io.BytesIO(self.data)) as archive:
            return archive.read(f"{archive.namelist()[0].partition('/')[0]}/{name}")

    def with_members(self, members: dict[str, bytes | None]) -> "Archive":
        """Return a copy with members replaced, added or, if None, removed."""
        out = io.BytesIO()
        with zipfile.ZipFile(io.BytesIO(self.data)) as old, zipfile.ZipFile(out, "w") as new:
            root = old.namelist()[0].partition("/")[0]
            for info in old.infolist():
                if info.filename.partition("/")[2] not in members:
                    new.writestr(info.filename, old.read(info))
            for name, content in members.items():
                if content is not None:
                    new.writestr(f"{root}/{name}", content)
        return Archive(out.getvalue())

    def with_json(self, edit: Callable[[dict[str, Any]], object], name: str = "models/model.json") -> "Archive":
        """Return a copy with a JSON member that `edit` has changed in place."""
        program = json.loads(self.member(name))
        edit(program)
        return self.with_members({name: json.dumps(program).encode()})

    def with_text(self, old: str, new: str) -> "Archive":
        """Return a copy with all occurrences of a JSON string in the graph replaced."""
        text = self.member("models/model.json").decode()
        assert json.dumps(old) in text
        return self.with_members({"models/model.json": text.replace(json.dumps(old), json.dumps(new)).encode()})

    def save(self, folder: Path, name: str = "model.pt2") -> Path:
        """Write the archive to a file and return its path."""
        (folder / name).write_bytes(self.data)
        return folder / name
