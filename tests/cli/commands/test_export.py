"""`export`, through the command line: what it writes, what it must never write, and what it refuses to run."""

import io
import json
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import tomllib
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from safetensors.torch import save_file

from qcompress.compressed.model import CompressedModel
from qcompress_exporters import auto_compute
from qcompress_exporters.onnx_format import file as onnx_file
from qcompress_exporters.parity import validate as parity
from tests.helpers import small_models
from tests.helpers.archives import Archive, Small, Trap

NETS = '''
import torch
from torch import nn

class Words(nn.Module):
    def __init__(self, width=8, as_dict=False):
        super().__init__()
        self.embed = nn.Embedding(50, width)
        self.body = nn.Linear(width, 12)
        self.as_dict = as_dict

    def logits(self, ids, mask):
        return self.body((self.embed(ids) * mask.unsqueeze(-1)).sum(1))

    def forward(self, ids, mask):
        y = self.logits(ids, mask)
        return y, y.sigmoid()

class Dicts(Words):
    def forward(self, batch):
        y = self.logits(batch["ids"], batch["mask"])
        return {"logits": y, "score": y.sigmoid()}

def words(as_dict=False, **kwargs):
    return Dicts(**kwargs) if as_dict else Words(**kwargs)
'''  # fmt: skip


@pytest.fixture(autouse=True)
def _same_import_path():
    before = list(sys.path)
    yield
    sys.path[:] = before


@pytest.fixture
def traced_once(monkeypatch):
    monkeypatch.setattr(onnx_file, "trace", small_models.trace_once)
    monkeypatch.setattr(parity, "trace", small_models.trace_once)


@pytest.fixture
def model(folder):
    """model.pt, an exported program, and test.npz with inputs and labels."""
    (folder / "model.pt").write_bytes(small_models.pt2())
    (folder / "test.npz").write_bytes(small_models.npz())
    return folder / "model.pt"


@pytest.fixture
def words(folder):
    """nets.py with a factory, and a state dict that fits it."""
    (folder / "nets.py").write_text(NETS)
    torch.manual_seed(0)
    state = {
        "embed.weight": torch.randn(50, 8),
        "body.weight": torch.randn(12, 8),
        "body.bias": torch.randn(12),
    }
    torch.save({"model_state_dict": {f"module.{k}": v for k, v in state.items()}, "epoch": 3}, "state.pt")
    save_file(state, "state.safetensors")
    return state


@pytest.fixture
def exported(qcompress):
    """Run an export that must work; its JSON."""

    def run(*args):
        result = qcompress("export", *args, "--json")
        assert result.exit_code == 0, result.output
        return json.loads(result.stdout)

    return run


@pytest.fixture
def nothing_new(folder):
    """What must leave the folder as it is, byte for byte."""

    def check(action):
        before = snapshot(folder)
        value = action()
        assert snapshot(folder) == before
        return value

    return check


def snapshot(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def graph_of(path):
    return onnx.load(path).graph


def axes(value):
    return [d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim]


def test_names_force_and_the_same_bytes_twice(qcompress, refused, nothing_new, model, folder):
    result = qcompress("export", "model.pt", "--bits", "2", "--effort", "fast")
    assert (result.exit_code, result.stderr) == (0, "")
    assert "written: model.w2.onnx (opset " in result.stdout
    assert "4 weights compressed (4 at 2 bits)." in result.stdout
    assert re.search(r"left in float, not a weight: 4 tensors, 116 B \([a-z]+\.bias, .*\)\nwritten: ", result.stdout)
    assert "stay float" not in result.stdout
    assert "decodes 8 tensors bit for bit" in result.stdout
    data = (folder / "model.w2.onnx").read_bytes()
    assert f"{len(data):,}" in result.stdout
    for word in (b"pkg.torch", str(folder).encode(), b"model.pt", b".py"):
        assert word not in data

    message = nothing_new(lambda: refused("export", "model.pt", "--bits", "2"))
    assert message == "model.w2.onnx exists: name another file with -o, or replace it with --force.\n"
    (folder / "model.w2.onnx").write_bytes(b"old")
    again = qcompress("export", "model.pt", "--bits", "2", "--effort", "fast", "--force", "--quiet")
    assert (again.exit_code, again.stderr) == (0, "")
    assert (folder / "model.w2.onnx").read_bytes() == data
    assert {p.name for p in folder.iterdir()} == {"model.pt", "test.npz", "model.w2.onnx"}


@pytest.mark.usefixtures("traced_once")
def test_plans_dry_runs_and_saved_plans(qcompress, exported, refused, nothing_new, model, folder):
    (folder / "plan.toml").write_text(
        'version = 1\n[default]\nbits = 3\n[kind.last]\nbits = 5\n[name."right.*"]\nskip = "float16"\n'
    )
    dry = nothing_new(lambda: exported("model.pt", "--plan", "plan.toml", "--bits", "2", "--dry-run"))
    assert dry["file"] is None
    table = nothing_new(lambda: qcompress("export", "model.pt", "--plan", "plan.toml", "--bits", "2", "--dry-run"))
    assert "nothing written (--dry-run); the file would be model.mixed.onnx" in table.stdout
    assert "bits: --bits" in table.stdout
    assert "bits: plan.toml:5 [kind.last]" in table.stdout
    assert "by plan (plan.toml:7 " in table.stdout
    assert "float16" in next(line for line in table.stdout.splitlines() if "right.weight" in line)

    real = exported("model.pt", "--plan", "plan.toml", "--bits", "2", "--save-plan", "saved.toml")
    assert real == dry | {"file": "model.mixed.onnx"}
    file = folder / "model.mixed.onnx"
    assert file.stat().st_size == dry["bytes"]["file"]
    assert sum(onnx.numpy_helper.to_array(t).nbytes for t in graph_of(file).initializer) == dry["bytes"]["payload"]
    assert {t["name"]: t["bits"] for t in real["tensors"] if t["artifact"] == "palette"} == {
        "stem.weight": 2, "left.weight": 2, "head.weight": 5,
    }  # fmt: skip
    assert tomllib.loads((folder / "saved.toml").read_text())["default"]["bits"] == 2
    exported("model.pt", "--plan", "saved.toml", "-o", "again.onnx")
    assert (folder / "again.onnx").read_bytes() == file.read_bytes()

    args = ("export", "model.pt", "--bits", "2", "-o", "x.onnx", "--save-plan", "x.onnx")
    message = nothing_new(lambda: refused(*args))
    assert message == "-o, --save-plan and --save-compressed must name different files.\n"


@pytest.mark.usefixtures("traced_once")
def test_rows_per_lut_explanation_and_float16_leftovers(qcompress, exported, model, folder):
    fast = ("model.pt", "--bits", "4", "--effort", "fast")
    native = ("--target", "onnxruntime==1.24")
    one = exported(*fast, *native, "-o", "one.onnx")
    rows = exported(*fast, *native, "--rows-per-lut", "4", "-o", "rows.onnx")
    tables = [next(t["nbytes"] for t in r["tensors"] if t["name"] == "left.weight") for r in (one, rows)]
    assert tables == [288 + 64, 288 + 2 * 64]
    portable = exported(*fast, "-o", "portable.onnx")
    why = {(t["encoding"], t["why"]) for t in portable["tensors"] if t["artifact"] == "palette"}
    assert why == {("words", "portable allows no type of 4 bits")}
    half = qcompress("export", *fast, *native, "--float-leftovers", "float16", "--explain", "-o", "half.onnx")
    assert half.exit_code == 0
    lines = {line.split()[0]: line.split() for line in half.stdout.splitlines() if "x" in line and ".weight" in line}
    assert lines["stem.weight"][1:4] == ["8x3x3x3", "4", "native"]
    assert "native types (opset 21) save" in half.stdout
    assert {t.data_type for t in graph_of("half.onnx").initializer if t.name.endswith("bias")} <= {1}
    # Biases of 8 values are too short to pay for the Cast that narrower ones would need.
    assert (folder / "half.onnx").stat().st_size == one["bytes"]["file"]


@pytest.mark.usefixtures("traced_once")
def test_a_saved_model_exports_to_the_same_bytes(qcompress, exported, refused, nothing_new, model, folder):
    exported("model.pt", "--bits", "3", "--save-compressed", "small")
    (folder / "locked").mkdir(0o555)
    assert sorted(p.name for p in (folder / "small").iterdir()) == [
        "plan.toml", "program.pt2", "report.json", "weights.safetensors",
    ]  # fmt: skip
    report = exported("small", "-o", "again.onnx")
    assert report["plan"] is None
    assert (folder / "again.onnx").read_bytes() == (folder / "model.w3.onnx").read_bytes()
    assert nothing_new(lambda: refused("export", "small", "--bits", "2")) == (
        "small is compressed already; remove --bits, or pass the original model as MODEL.\n"
    )
    for args in (["--rows-per-lut", "2"], ["--plan", "small/plan.toml"]):
        assert nothing_new(lambda a=args: refused("export", "small", *a)).startswith(
            f"small is compressed already; remove {args[0]}, or pass"
        )
    for name in ("program.pt2", "weights.safetensors"):
        message = nothing_new(lambda n=name: refused("export", "small", "-o", f"small/{n}", "--force"))
        assert "is an input of this command and is never replaced" in message
    message = nothing_new(lambda: refused("export", "model.pt", "--bits", "2", "--save-compressed", "small"))
    assert message == "small exists: name another folder, or remove it first.\n"
    message = nothing_new(lambda: refused("export", "model.pt", "--bits", "2", "--save-compressed", "no/such"))
    assert "the folder no does not exist" in message
    for flag in ("--save-plan", "--save-compressed"):
        message = nothing_new(lambda f=flag: refused("export", "model.pt", "--bits", "2", f, "locked/x"))
        assert message.endswith(f"is read-only. Name another place with {flag}.\n")


INTEGER = ("--bits", "4", "--activation-bits", "4", "--calibration", "test.npz")


@pytest.mark.usefixtures("traced_once")
def test_integer_compute_through_the_command_line(qcompress, exported, nothing_new, model, folder):
    dry = nothing_new(lambda: exported("model.pt", *INTEGER, "--dry-run"))
    result = qcompress("export", "model.pt", *INTEGER, "--explain", "--save-compressed", "small")
    assert (result.exit_code, result.stderr) == (0, "")
    data = (folder / "model.w4a4.onnx").read_bytes()
    assert len(data) == dry["bytes"]["file"]
    assert re.search(
        r"^4 of 4 layers compute in int8 \(format qdq\); 4 of 4 layers take activations at 4 bits\.",
        result.stdout,
        re.M,
    )
    assert sorted(layer["activation_bits"] for layer in dry["layers"]) == [4, 4, 4, 4]
    wide = sum(a["widened"] for a in dry["activations"])
    assert wide == sum(a["bits"] == 8 for a in dry["activations"]) > 0
    assert f"{wide} activations at 8 bits although the plan asks for fewer: sums, pooling, " in result.stdout
    assert re.search(r"^activation +bits +scale +zero +clipped %", result.stdout, re.M)
    assert re.search(r"^x +4 +0\.\d+ +\d+ +\d", result.stdout, re.M)
    assert "biases as int32: 4 tensors" in result.stdout

    again = exported("small", "-o", "again.onnx")
    assert (folder / "again.onnx").read_bytes() == data
    assert [a["saturation"] for a in again["activations"]] == [None] * len(dry["activations"])
    assert again["activations"] == [a | {"saturation": None} for a in dry["activations"]]
    operators = exported("small", "--format", "integer")
    assert (operators["format"], operators["file"]) == ("integer", "small.w4a4.onnx")
    assert "QLinearConv" in {n.op_type for n in graph_of("small.w4a4.onnx").node}


@pytest.mark.usefixtures("traced_once", "all_cores")
def test_calibration_data_solve_the_weights(qcompress, exported, refused, nothing_new, model, folder):
    plain = exported("model.pt", "--bits", "2", "-o", "plain.onnx", "--no-synthetic")
    fast = exported("model.pt", "--bits", "2", "-o", "fast.onnx", "--calibration", "test.npz", "--effort", "fast")
    assert (plain["solved"], fast["solved"]) == ([], [])
    assert (folder / "fast.onnx").read_bytes() == (folder / "plain.onnx").read_bytes()
    result = qcompress("export", "model.pt", "--bits", "2", "--calibration", "test.npz", "--explain")
    assert result.exit_code == 0
    assert re.search(r"^layer, SQNR dB at its output +nearest +solved$", result.stdout, re.M)
    assert re.search(
        r"^4 layers solved on 60 samples of test.npz; the noisiest, .*, from .* to .* dB SQNR", result.stdout, re.M
    )
    solved = exported("model.pt", "--bits", "2", "-o", "solved.onnx", "--calibration", "test.npz")["solved"]
    assert [gain["weight"] for gain in solved] == [f"{name}.weight" for name in small_models.LAYERS]
    assert all(gain["solved_db"] > gain["nearest_db"] for gain in solved)
    assert (folder / "solved.onnx").read_bytes() == (folder / "model.w2.onnx").read_bytes()
    sqnr = {}
    for name in ("plain", "solved"):
        result = qcompress("validate", "model.pt", f"{name}.onnx", "--data", "test.npz", "--no-timing", "--json")
        sqnr[name] = json.loads(result.stdout)["outputs"]["output"]["sqnr_db"]
    assert sqnr["solved"] > sqnr["plain"] + 6


@pytest.mark.usefixtures("traced_once")
def test_without_calibration_data_inputs_are_synthesised(qcompress, exported, refused, nothing_new, model, folder):
    result = qcompress("export", "model.pt", "--bits", "2")
    assert result.exit_code == 0
    assert "4 layers solved on 128 inputs synthesised from BatchNorm statistics; the noisiest" in result.stdout
    assert "85.1 % against 84.1 % on synthesised inputs" in result.stderr
    assert result.stderr.endswith("qcompress export model.pt --bits 2 --calibration inputs.npz --force\n")
    assert qcompress("export", "model.pt", "--bits", "8", "-o", "wide.onnx").stderr == ""
    plain = qcompress("export", "model.pt", "--bits", "2", "--no-synthetic", "-o", "plain.onnx")
    assert "solved" not in plain.stdout
    wanted = "qcompress export model.pt --bits 2 -o plain.onnx --calibration inputs.npz --force\n"
    assert plain.stderr.endswith(wanted)
    shutil.copy("test.npz", "inputs.npz")
    assert qcompress(*wanted.split()[1:]).exit_code == 0
    assert (
        "no calibration data, and synthesising inputs is switched off: each weight is rounded to its nearest level"
        in plain.stderr
    )
    assert "85.1 % against 21.3 % without any" in plain.stderr
    told = exported("model.pt", "--bits", "2", "-o", "again.onnx")
    assert told["solved_on"] == "128 inputs synthesised from BatchNorm statistics"
    assert (folder / "again.onnx").read_bytes() == (folder / "model.w2.onnx").read_bytes()
    for name, seed in (("seed0.onnx", 0), ("seed1.onnx", 1)):
        exported("model.pt", "--bits", "2", "-o", name, "--seed", seed)
    assert (folder / "seed0.onnx").read_bytes() == (folder / "model.w2.onnx").read_bytes()
    assert (folder / "seed1.onnx").read_bytes() != (folder / "model.w2.onnx").read_bytes()
    message = nothing_new(lambda: refused("export", "model.pt", "--bits", "2", "--seed", "-1", "-o", "x.onnx"))
    assert message == "seed must be at least 0 and below 2**63, got -1.\n"
    assert exported("model.pt", "--bits", "2", "-o", "none.onnx", "--no-synthetic")["solved_on"] is None
    for flags, message in (
        (
            ["--effort", "balanced"],
            'effort "balanced" needs inputs to solve weights on, but synthesising inputs is switched off; ',
        ),
        (["--calibration", "test.npz"], "--no-synthetic has no effect with --calibration; remove one of the two.\n"),
    ):
        said = nothing_new(lambda flags=flags: refused("export", "model.pt", "--bits", "4", "--no-synthetic", *flags))
        assert said == message + ("pass --calibration.\n" if "balanced" in flags else "")


@pytest.mark.usefixtures("traced_once")
def test_names_and_reports_of_other_ways_to_compute(qcompress, exported, model, folder):
    result = qcompress("export", "model.pt", "--bits", "2", "--compute", "dynamic8")
    assert result.exit_code == 0
    assert "written: model.w2d8.onnx" in result.stdout
    assert "1 of 4 layers compute in int8, their inputs quantized at run time (dynamic8)." in result.stdout
    why = "only inputs of matrix products can be quantized at run time"
    assert f"computed in float, {why}: 3 layers (stem.weight, left.weight, right.weight)" in result.stdout
    dynamic = exported("model.pt", "--bits", "2", "--compute", "dynamic8", "--dry-run")
    assert [layer["activation_bits"] for layer in dynamic["layers"]].count(8) == 1
    (folder / "plan.toml").write_text("version = 1\n[default]\nbits = 4\n[kind.last]\nactivation_bits = 8\n")
    mixed = exported("model.pt", "--plan", "plan.toml", "--scheme", "uniform", "--calibration", "test.npz")
    assert (mixed["file"], mixed["compute"]) == ("model.mixed.onnx", "int8")
    # The layer that computes in integers has a grid with finer steps for its bias, which its palette holds.
    assert {t["artifact"] for t in mixed["tensors"]} == {"uniform", "palette", "float"}
    assert {layer["weight"]: layer["compute"] for layer in mixed["layers"]}["head.weight"] == "int8"
    assert [a["widened"] for a in mixed["activations"]] == [False] * len(mixed["activations"])


@pytest.mark.usefixtures("traced_once")
def test_what_is_fastest_is_measured_and_the_saved_plan_repeats_it(qcompress, exported, model, monkeypatch, folder):
    monkeypatch.setattr(auto_compute, "_SECONDS", 0.2)
    asked = ("--bits", "8", "--calibration", "test.npz", "--effort", "fast")
    made = exported("model.pt", *asked, "--compute", "auto", "--save-plan", "plan.toml", "-o", "a.onnx")
    in_int8 = next(c["weights"] for c in made["auto"]["candidates"] if c["name"] == made["auto"]["picked"])
    assert [layer["weight"] for layer in made["layers"] if layer["compute"] == "int8"] == list(in_int8)
    assert made["compute"] == ("int8" if in_int8 else "float")
    exported("model.pt", *asked[2:], "--plan", "plan.toml", "-o", "b.onnx")
    assert (folder / "a.onnx").read_bytes() == (folder / "b.onnx").read_bytes()
    result = qcompress("export", "model.pt", *asked, "--compute", "auto", "--dry-run")
    assert re.search(r"^--compute auto picked .*, int8 has for .* x", result.stdout, re.M)


@pytest.mark.usefixtures("traced_once")
@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--compute", "auto"], "activation_bits needs calibration data to find the ranges of activations; add "),
        (["--compute", "auto", "--format", "integer", "--calibration", "test.npz"],
         "--compute auto measures files of --format qdq; remove --format integer, or use --compute int8.\n"),
        (["--activation-bits", "8"], "activation_bits needs calibration data to find the ranges of activations; add "),
        (["--compute", "int8"], "compute int8 needs activation_bits for at least one layer; add --activation-bits"),
        (["--format", "qdq"], "format qdq applies to compute int8 only, but this is compute float; remove format, or "),
        (["--placement", "paper"], "--placement applies to compute int8 only, but this is compute float; remove it"),
        (["--reduce-range"], "--reduce-range applies to compute int8 or dynamic8 only, but this is compute float; "),
        (["--percentile", "99"], "--percentile applies to compute int8 only, but this is compute float; remove it"),
        (["--activation-bits", "8", "--calibration", "test.npz", "--percentile", "99"],
         "--percentile applies to --calibration-method percentile only; add that option, or remove --percentile.\n"),
        (["--activation-bits", "8", "--calibration", "wrong.npz"], "Input x must have shape [any, 3, 8, 8], got "),
        (["--activation-bits", "8", "--calibration", "wrong.npz", "--data", "test.npz"],
         "Input x must have shape [any, 3, 8, 8], got [1, 3, 9, 9]"),
        (["--activation-bits", "8", "--calibration", "nan.npz"], "--calibration nan.npz: "),
        (["--activation-bits", "8", "--calibration", "none.npz"], "--calibration none.npz: "),
        (["--activation-bits", "8", "--calibration", "missing.npz"], "--calibration missing.npz: "),
    ],
)  # fmt: skip
def test_integer_compute_refused(refused, nothing_new, model, args, message):
    np.savez("wrong.npz", x=np.zeros((4, 3, 9, 9), np.float32))
    np.savez("nan.npz", x=np.full((4, 3, 8, 8), np.nan, np.float32))
    np.savez("none.npz", x=np.zeros((0, 3, 8, 8), np.float32))
    assert message in nothing_new(lambda: refused("export", "model.pt", "--bits", "4", *args))


@pytest.mark.usefixtures("traced_once")
def test_what_is_settled_in_a_compressed_folder(refused, nothing_new, exported, model):
    exported("model.pt", "--bits", "4", "--save-compressed", "small")
    for args in (
        ("--scheme", "uniform"), ("--activation-bits", "8"), ("--compute", "dynamic8"), ("--calibration", "test.npz"),
        ("--calibration-method", "minmax"), ("--percentile", "99"), ("--placement", "paper"), ("--reduce-range",),
    ):  # fmt: skip
        message = nothing_new(lambda a=args: refused("export", "small", *a))
        assert message.startswith(f"small is compressed already; remove {args[0]}, or pass the original model")
    message = nothing_new(lambda: refused("export", "small", "--format", "integer"))
    assert message.startswith("format integer applies to compute int8 only, but this is compute float")


class Padded(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = torch.nn.Conv2d(3, 6, 3, padding=1), torch.nn.Conv2d(6, 4, 3)
        self.third, self.head = torch.nn.Conv2d(4, 4, 3, padding=1), torch.nn.Linear(4, 5)

    def forward(self, x):
        x = self.third(self.second(self.first(x).relu()).relu())
        return self.head(x.relu().mean((2, 3)))


@pytest.mark.usefixtures("traced_once")
def test_learned_offsets_are_added_exactly_or_moved_onto_their_grids(exported, refused, nothing_new, qcompress, model):
    torch.manual_seed(0)
    batch = ({0: torch.export.Dim("batch")},)
    padded = torch.export.export(Padded().eval(), (torch.zeros(2, 3, 8, 8),), dynamic_shapes=batch)
    torch.export.save(padded, "padded.pt2")
    exported("padded.pt2", *INTEGER, "--save-compressed", "whole")
    small = CompressedModel.load("whole")
    moved = {site: replace(g, offset=np.float32(g.offset + 0.4 * g.scale)) for site, g in small.activations.items()}
    replace(small, activations=moved).save("learned")
    calibration = ("--calibration", "test.npz")

    exact = exported("learned")
    padded = {layer["weight"] for layer in exact["layers"] if layer["offset"] == "added"}
    assert padded == {"first.weight", "third.weight"}
    assert {layer["weight"] for layer in exact["layers"] if layer["offset"] == "folded"} == {
        "second.weight",
        "head.weight",
    }
    result = qcompress("export", "learned", "--dry-run")
    assert "--offsets snap lets them compute in int8" in result.stdout
    assert "--offsets snap" not in qcompress("export", "whole", "--dry-run").stdout
    snapped = exported("learned", "-o", "snapped.onnx", "--offsets", "snap", *calibration)
    assert {layer["compute"] for layer in snapped["layers"]} == {"int8"}
    assert {layer["weight"] for layer in snapped["layers"] if layer["snapped"] is not None} == padded
    assert all(layer["snapped"] < 0.2 for layer in snapped["layers"] if layer["snapped"] is not None)
    result = qcompress("export", "learned", "--offsets", "snap", *calibration, "--dry-run")
    assert re.search(r"offset of the input moved onto its grid, at most \d.* % of the output's spread", result.stdout)
    result = qcompress("export", "whole", "--offsets", "snap", *calibration, "--dry-run")
    assert "no offset was moved" in result.stderr

    for args, message in (
        (("learned", "--offsets", "snap"), "--offsets snap needs calibration data to correct the biases; add "),
        (("learned", *calibration), "learned is compressed already; remove --calibration, or pass"),
        (("model.pt", *INTEGER, "--offsets", "exact"), "--offsets applies to compressed folders only, which can "),
    ):
        assert nothing_new(lambda a=args: refused("export", *a, "--dry-run")).startswith(message)


@pytest.mark.usefixtures("traced_once")
def test_a_constant_calibration_is_legal_and_told(qcompress, folder, model):
    np.savez("zeros.npz", x=np.zeros((3, 3, 8, 8), np.float32))
    result = qcompress("export", "model.pt", "--bits", "4", "--activation-bits", "8", "--calibration", "zeros.npz")
    assert result.exit_code == 0, result.output
    note = (
        "calibration data zeros.npz: all 3 samples have identical values for input x; the activation ranges will be "
        "wrong for other data\n"
    )
    assert result.stderr == note


class Fixed(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = torch.nn.Linear(12, 12)

    def forward(self, x):
        return self.fc(x.reshape(4, 12))


class Log(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = torch.nn.Linear(12, 12)

    def forward(self, x):
        return self.fc(x.log())


@pytest.mark.usefixtures("traced_once")
def test_an_activation_that_is_not_finite(qcompress, nothing_new, folder):
    torch.export.save(torch.export.export(Log().eval(), (torch.ones(4, 12),)), "log.pt2")
    np.savez("negative.npz", x=np.full((4, 12), -1, np.float32))
    args = ("--bits", "4", "--activation-bits", "8", "--calibration", "negative.npz")
    result = nothing_new(lambda: qcompress("export", "log.pt2", *args))
    assert result.stderr.endswith(
        "error: the activation log must be finite in float32 on calibration data, but 48 of 48 values are not; "
        "remove the samples that cause them.\n"
    )


@pytest.mark.usefixtures("traced_once")
def test_fewer_calibration_samples_than_a_fixed_batch(qcompress, nothing_new, folder):
    torch.export.save(torch.export.export(Fixed().eval(), (torch.zeros(4, 12),)), "fixed.pt2")
    np.savez("few.npz", x=np.ones((3, 12), np.float32))
    args = ("export", "fixed.pt2", "--bits", "4", "--activation-bits", "8", "--calibration", "few.npz")
    result = nothing_new(lambda: qcompress(*args))
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr.endswith("error: The model needs batches of 4 samples, but few.npz has 3; add samples.\n")


@pytest.mark.parametrize("through", ["itself", "symlink", "hard link"])
def test_an_input_is_never_replaced(refused, nothing_new, model, folder, through):
    (folder / "plan.toml").write_text("version = 1\n[default]\nbits = 2\n")
    (folder / "qcompress.toml").write_text('data = "test.npz"\n')
    for name in ("model.pt", "test.npz", "plan.toml", "qcompress.toml"):
        out = folder / (name if through == "itself" else f"link.{name}")
        if through == "symlink":
            out.symlink_to(name)
        elif through == "hard link":
            out.hardlink_to(folder / name)
        for data in ("test.npz", "test.npz:x,y"):
            args = ("export", "model.pt", "--plan", "plan.toml", "--data", data, "--force", "-o", out)
            message = nothing_new(lambda a=args: refused(*a))
            assert message == (f"{out} is an input of this command and is never replaced: name another file with -o.\n")


def test_code_that_is_named_is_an_input_too(refused, nothing_new, model, words):
    args = ("export", "state.pt", "--arch", "nets.py:words", "--bits", "2", "--force", "-o", "nets.py")
    assert "nets.py is an input of this command and is never replaced" in nothing_new(lambda: refused(*args))


def test_places_that_cannot_be_written(refused, nothing_new, model, folder):
    locked = folder / "locked"
    locked.mkdir()
    locked.chmod(0o555)
    try:
        message = nothing_new(lambda: refused("export", "model.pt", "--bits", "2", "-o", "locked/a.onnx"))
        assert message == (
            "locked/a.onnx cannot be written: the folder locked is read-only. Name another place with -o.\n"
        )
        message = nothing_new(lambda: refused("export", "model.pt", "--bits", "2", "--save-compressed", "locked/a"))
        assert "the folder locked is read-only" in message
    finally:
        locked.chmod(0o755)
    message = nothing_new(lambda: refused("export", "model.pt", "--bits", "2", "-o", "no/a.onnx"))
    assert message == "no/a.onnx cannot be written: the folder no does not exist. Create it first.\n"
    message = nothing_new(lambda: refused("export", "model.pt", "--bits", "2", "-o", "locked"))
    assert message == "locked is a folder, a file name is needed: name a file in it with -o.\n"


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--bits", "9"], "Invalid value for '--bits': must be an integer in [1, 8], got 9.\n"),
        (["--bits", "0"], "Invalid value for '--bits': must be an integer in [1, 8], got 0.\n"),
        (["--bits", "2", "--rows-per-lut", "0"], "must be 'auto' or an integer of at least 1, got 0.\n"),
        (
            ["--bits", "2", "--target", "tensorrt"],
            "target must be portable, onnxruntime==1.16 or later, openvino or web, got 'tensorrt'.\n",
        ),
        ([], "stem.weight and 3 more weights: bits is unset; add --bits N (1 to 8), or set bits in a plan"),
        (["--plan", "no.toml"], "no.toml: the plan cannot be read: No such file or directory.\n"),
        (["--bits", "2", "--dynamic", "y:0=batch"], "--dynamic: the model has no input 'y'; it has x.\n"),
        (["--bits", "2", "--output-names", "a,b"], "must be 1 different names (the outputs: output), got a,b.\n"),
        (["--bits", "2", "--data", "none.npz"], "--data none.npz: "),
        (["--bits", "2", "--data", "wrong.npz"], "Input x must have shape [any, 3, 8, 8], got [2, 3, 9, 9].\n"),
        (["--bits", "2", "--calibration", "wrong.npz"], "Input x must have shape [any, 3, 8, 8], got [2, 3, 9, 9].\n"),
        (["--bits", "2", "--data", "other.npz"], "Input x must have shape [any, 3, 8, 8], got [2, 4].\n"),
        (["--bits", "2", "--input-shape", "y=1,3,8,8"], "--input-shape: the model has no input 'y'; it has x.\n"),
        (["--bits", "2", "--input-shape", "1,3,9,9"], "Input x must have shape [any, 3, 8, 8], got [1, 3, 9, 9].\n"),
    ],
)  # fmt: skip
def test_refused_before_anything_is_written(refused, nothing_new, model, args, message):
    np.savez("wrong.npz", x=np.zeros((4, 3, 9, 9), np.float32))
    np.savez("other.npz", x=np.zeros((5, 4), np.float32))
    assert message in nothing_new(lambda: refused("export", "model.pt", *args))


def test_a_pattern_that_matches_nothing(refused, nothing_new, model, folder):
    (folder / "plan.toml").write_text('version = 1\n[default]\nbits = 3\n[name."heads.*"]\nbits = 5\n')
    message = nothing_new(lambda: refused("export", "model.pt", "--plan", "plan.toml"))
    assert message == (
        'plan.toml:4 [name."heads.*"] matches no tensor of this model. Did you mean head.*? '
        "`qcompress inspect MODEL` lists the legal names.\n"
    )


@pytest.mark.usefixtures("traced_once")
def test_without_model_the_files_here_are_named_and_a_config_is_enough(refused, exported, nothing_new, model, folder):
    (folder / "notes.txt").write_text("no model")
    message = nothing_new(lambda: refused("export", "--bits", "2"))
    assert "model files here: model.pt.\n" in message
    assert "Type: qcompress export model.pt --bits 2\n" in message
    (folder / "qcompress.toml").write_text('model = "model.pt"\ndata = "test.npz"\noutput = "small.onnx"\n')
    assert exported("--bits", "2")["file"] == "small.onnx"


def test_a_weight_with_nan_names_the_layer(refused, nothing_new, folder):
    program = small_models.program()
    value = program.state()["left.weight"].detach().numpy().copy()
    value[0, 0, 0, :2] = np.nan, np.inf
    torch.export.save(program.with_state({"left.weight": value}).exported, "nan.pt2")
    assert nothing_new(lambda: refused("export", "nan.pt2", "--bits", "2")) == (
        "left.weight must be finite, but 2 of its 576 values are NaN or Inf: `qcompress analyze MODEL` counts them for "
        "each tensor; repair or retrain the model.\n"
    )


@pytest.mark.usefixtures("traced_once")
def test_nothing_that_gets_smaller_is_a_warning_and_strict_fails(qcompress, folder):
    net = torch.nn.Linear(2, 2).eval()
    torch.export.save(torch.export.export(net, (torch.zeros(2, 2),)), "tiny.pt2")
    result = qcompress("export", "tiny.pt2", "--bits", "8")
    assert result.exit_code == 0
    assert result.stderr.endswith("warning: no tensor got smaller.\n")
    assert re.search(r"\b\d\.\d\dx larger, ", result.stdout)
    assert "smaller" not in result.stdout
    assert "left in float, not a weight: 1 tensor, " in result.stdout
    assert (folder / "tiny.w8.onnx").exists()
    assert qcompress("export", "tiny.pt2", "--bits", "8", "--strict", "-o", "b.onnx").exit_code == 1
    assert (folder / "b.onnx").read_bytes() == (folder / "tiny.w8.onnx").read_bytes()


@pytest.mark.usefixtures("traced_once")
def test_names_of_input_shapes_are_the_models_own_even_where_others_are_given(exported, refused, words):
    arch = ("state.pt", "--arch", "nets.py:words", "--bits", "4", "--input-names", "a,b")
    shapes = ("--input-shape", "ids=1,6:int64", "--input-shape", "mask=1,6")
    report = exported(*arch, *shapes)
    assert [v.name for v in graph_of(report["file"]).input] == ["a", "b"]


@pytest.mark.usefixtures("traced_once")
def test_stdout_is_json_alone_whatever_the_users_code_prints(qcompress, words, folder):
    with (folder / "nets.py").open("a") as f:
        f.write("\nprint('imported')\ndef loud(**kwargs):\n    print('built')\n    return words(**kwargs)\n")
        f.write("def halved(x):\n    print('transformed')\n    return x\n")
    np.savez("in.npz", ids=np.zeros((2, 6), np.int64), mask=np.ones((2, 6), np.float32))
    args = ("state.pt", "--arch", "nets.py:loud", "--data", "in.npz", "--transform", "nets.py:halved", "--bits", "4")
    result = qcompress("export", *args, "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["file"] == "state.w4.onnx"
    assert {"imported", "built", "transformed"} <= set(result.stderr.split())
    assert "built" in qcompress("export", *args, "--dry-run").stdout


@pytest.mark.usefixtures("traced_once")
def test_a_state_dict_with_its_factory_names_and_dynamic_axes(exported, words, folder):
    shapes = ("--input-shape", "ids=1,6:int64", "--input-shape", "mask=1,6")
    arch = ("--arch", "nets.py:words", "--arch-kwargs", "width=8")
    report = exported("state.pt", *arch, *shapes, "--bits", "4")
    graph = graph_of(report["file"])
    lengths = ["batch", "sequence"]
    assert [(v.name, axes(v)) for v in graph.input] == [("ids", lengths), ("mask", lengths)]
    assert [(v.name, axes(v)) for v in graph.output] == [("output", ["batch", 12]), ("output_1", ["batch", 12])]
    assert graph.input[0].type.tensor_type.elem_type == onnx.TensorProto.INT64

    named = ("--input-names", "a,b", "--output-names", "c,d", "-o", "named.onnx")
    exported("state.safetensors", *arch, *shapes, "--bits", "4", *named)
    graph = graph_of("named.onnx")
    assert [v.name for v in (*graph.input, *graph.output)] == ["a", "b", "c", "d"]


@pytest.mark.usefixtures("traced_once")
def test_dicts_in_and_out_and_a_dynamic_axis(qcompress, exported, words, folder):
    args = ("state.pt", "--arch", "nets.py:words", "--arch-kwargs", "width=8", "as_dict=true")
    shapes = ("--input-shape", "ids=1,6:int64", "--input-shape", "mask=1,6")
    report = exported(*args, *shapes, "--bits", "4", "--dynamic", "ids:1=words", "--dynamic", "mask:1=words")
    graph = graph_of(report["file"])
    assert [(v.name, axes(v)) for v in graph.input] == [("ids", ["batch", "words"]), ("mask", ["batch", "words"])]
    assert [v.name for v in graph.output] == ["logits", "score"]
    # validate takes names and axes from the file: sentences of 9 words, where the example had 6.
    random = np.random.default_rng(0)
    np.savez("test.npz", ids=random.integers(0, 50, (7, 9)), mask=np.ones((7, 9), np.float32))
    result = qcompress("validate", *args, report["file"], "--data", "test.npz", "--no-timing", "--json")
    assert result.exit_code == 0, result.output
    assert set(json.loads(result.stdout)["outputs"]) == {"logits", "score"}


def test_a_fixed_batch_is_that_of_the_example_and_validate_reads_it(qcompress, exported, refused, words, folder):
    args = ("state.pt", "--arch", "nets.py:words")
    shapes = ("--input-shape", "ids=3,6:int64", "--input-shape", "mask=3,6")
    message = refused("export", *args, *shapes, "--bits", "4", "--fixed-batch", "--dynamic", "ids:1=words")
    assert message == "--fixed-batch makes no axis dynamic, but --dynamic names one; remove one of the two.\n"
    result = qcompress("export", *args, *shapes, "--bits", "4", "--fixed-batch", "-o", "fixed.onnx")
    assert result.exit_code == 0, result.output
    assert "Exported with a fixed batch: ids [3, 6], mask [3, 6]." in result.stderr
    assert [axes(v) for v in graph_of("fixed.onnx").input] == [[3, 6], [3, 6]]
    random = np.random.default_rng(0)
    np.savez("test.npz", ids=random.integers(0, 50, (9, 6)), mask=np.ones((9, 6), np.float32))
    result = qcompress("validate", *args, "fixed.onnx", "--data", "test.npz", "--no-timing", "--json")
    assert result.exit_code == 0, result.output


def test_what_a_state_dict_lacks(refused, nothing_new, words):
    message = nothing_new(lambda: refused("export", "state.pt", "--bits", "2"))
    assert "state.pt" in message
    assert "--arch" in message
    message = nothing_new(lambda: refused("export", "state.pt", "--arch", "nets.py:words", "--bits", "2"))
    assert message.startswith("Tracing the model needs an example input: pass --input-shape")
    args = ("export", "state.pt", "--arch", "nets.py:words", "--arch-kwargs", "width=9", "--bits", "2")
    message = nothing_new(lambda: refused(*args, "--input-shape", "ids=1,6:int64", "--input-shape", "mask=1,6"))
    assert "embed.weight" in message
    message = nothing_new(lambda: refused(*args, "--input-shape", "1,6:int64", "--input-shape", "mask=1,6"))
    assert message.startswith("Each of several --input-shape must have a name")


def pickled(value, path="model.pt"):
    torch.save(value, path)


def in_sample_inputs(trap):
    buffer = io.BytesIO()
    torch.save(((torch.zeros(2, 3, 8, 8), trap), {}), buffer)
    Archive(small_models.pt2()).with_members({"data/sample_inputs/model.pt": buffer.getvalue()}).save(
        Path(), "model.pt"
    )


def in_weights(trap):
    buffer = io.BytesIO()
    torch.save(trap, buffer)

    def use_pickle(config):
        next(iter(config["config"].values()))["use_pickle"] = True

    changed = Archive(small_models.pt2()).with_members({"data/weights/weight_0": buffer.getvalue()})
    changed.with_json(use_pickle, "data/weights/model_weights_config.json").save(Path(), "model.pt")


HOSTILE = {
    "a truncated program": (
        lambda trap: Path("model.pt").write_bytes(small_models.pt2()[:-900]),
        "truncated or damaged archive",
    ),
    "text": (lambda trap: Path("model.pt").write_text("hello, I am a model\n"), "must be a model, but it is"),
    "nothing": (lambda trap: Path("model.pt").write_bytes(b""), "must be a model, but it is"),
    "a pickle": (lambda trap: Path("model.pt").write_bytes(pickle.dumps(trap)), "is a plain Python pickle that names"),
    "a checkpoint": (pickled, "Its pickle names"),
    "a checkpoint with weights": (lambda trap: pickled({"w": torch.zeros(9, 9), "x": trap}), "holds no program"),
    "sample inputs": (in_sample_inputs, "its sample inputs are a pickle of more than tensors and plain values"),
    "weights": (in_weights, "among its weights is a pickle or a custom object"),
    "a module of one's own": (lambda trap: pickled(Small()), "tests.helpers.archives.Small"),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_and_broken_files(refused, nothing_new, folder, name):
    make, says = HOSTILE[name]
    sprung = folder / "sprung"
    make(Trap(os.system, f"touch '{sprung}'"))
    message = nothing_new(lambda: refused("export", "model.pt", "--bits", "2", "--input-shape", "1,3,8,8"))
    assert says in message
    assert not sprung.exists()
    if "own" in name:
        assert all(way in message for way in ("--arch", "--allow-class", "--trust-pickle", "torch.export.save"))


# Kills itself at one moment of an export; SIGKILL cannot be caught.
KILLED = """
import os, signal, sys
import qcompress.files

def die(*args):
    os.kill(os.getpid(), signal.SIGKILL)

class HalfWritten:
    def __init__(self, f):
        self.f = f
    def __enter__(self):
        return self
    def __exit__(self, *args):
        pass
    def write(self, data):
        self.f.write(data[: len(data) // 2])
        self.f.flush()
        die()

moment = sys.argv.pop()
if moment == "half written":
    fdopen = os.fdopen
    os.fdopen = lambda handle, mode: HalfWritten(fdopen(handle, mode))
elif moment == "before the rename":
    os.replace = die
else:
    qcompress.files.sync = die
from qcompress_cli.main import main
main()
"""
SLOW = [pytest.param(moment, marks=pytest.mark.slow) for moment in ("before the rename", "after the rename")]


def test_the_verdict_says_what_stays_float(qcompress, model, folder):
    (folder / "p.toml").write_text('version = 1\n[default]\nbits = 2\n[name."stem.weight"]\nskip = true\n')
    result = qcompress("export", "model.pt", "--plan", "p.toml", "--effort", "fast", "--dry-run", "--json")
    done = json.loads(result.stdout)
    floats = sum(t["nbytes"] for t in done["tensors"] if t["artifact"] == "float")
    percent = round(100 * floats / done["bytes"]["file"])
    assert percent > 10
    result = qcompress("export", "model.pt", "--plan", "p.toml", "--effort", "fast", "--dry-run")
    *_, by_plan, verdict = result.stdout.splitlines()
    assert re.search(r"by plan \(.*stem\.weight.*\(stem\.weight\)$", by_plan)
    assert f"; {percent} % of its bytes stay float: stem.weight, " in verdict


@pytest.mark.parametrize("moment", ["half written", *SLOW])
def test_killed_while_writing(qcompress, shell, traced_once, model, folder, moment):
    (folder / "model.w2.onnx").write_bytes(b"old")
    args = ("export", "model.pt", "--bits", "2", "--effort", "fast", "--force")
    result = shell(*args, moment, code=KILLED)
    assert result.returncode == -signal.SIGKILL, result.stderr
    left = (folder / "model.w2.onnx").read_bytes()
    # What may be left beside is hidden, and in nobody's way.
    beside = {p.name for p in folder.iterdir()} - {"model.pt", "test.npz", "model.w2.onnx"}
    assert all(name.startswith(".model.w2.onnx.") for name in beside)
    assert qcompress(*args).exit_code == 0
    assert left == ((folder / "model.w2.onnx").read_bytes() if moment == "after the rename" else b"old")


@pytest.mark.slow
@pytest.mark.parametrize("seconds", [1, 3, 5, 7])
def test_killed_from_outside(model, folder, seconds):
    (folder / "model.w2.onnx").write_bytes(b"old")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    command = [sys.executable, "-m", "qcompress_cli.main", "export", "model.pt", "--bits", "2", "--force"]
    with subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL) as child:
        try:
            child.wait(seconds)
        except subprocess.TimeoutExpired:
            child.kill()
    data = (folder / "model.w2.onnx").read_bytes()
    assert data == b"old" or onnx.load_from_string(data).graph.node
