"""`qcompress finetune`: what it trains and writes, how it resumes, and what it refuses."""

import json
import os
import shutil
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from sklearn.datasets import load_digits

from qcompress.compressed.model import CompressedModel
from qcompress.plan.plan import load_plan
from tests.cli.test_json_docs import check
from tests.helpers import small_models

NET = """
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.bn = nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8)
        self.left, self.right = nn.Conv2d(8, 8, 3), nn.Conv2d(8, 8, 3)
        self.drop, self.head = nn.Dropout(0.1), nn.Linear(8, 5)

    def forward(self, x):
        x = self.bn(self.stem(x)).relu()
        return self.head(self.drop((self.left(x).relu() + self.right(x)).mean((2, 3))))
"""
SHORT = ("--epochs", "2", "--batch-size", "16", "--quiet")  # 6 steps
ROOT = Path(__file__).parents[3]
BY_SEED = {"seeds[]", *(f"seeds[].{key}" for key in ("seed", "folder", "loss", "score", "drop"))}
FLOAT, FLOAT16 = onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16
LABELS = np.arange(48) % 5
OUR_FILES = {"plan.toml", "program.pt2", "report.json", "weights.safetensors", "run.json", "history.csv",
             "quantizers.csv", "curves.svg", "training"}  # fmt: skip


@pytest.fixture
def model(folder):
    (folder / "model.pt2").write_bytes(small_models.pt2())
    torch.save(small_models.net().state_dict(), folder / "state.pt")
    (folder / "net.py").write_text(NET)
    np.savez("train.npz", x=small_models.images(48), y=LABELS)
    np.savez("unlabelled.npz", x=small_models.images(48))
    np.savez("val.npz", x=small_models.images(20, seed=1), y=LABELS[:20])
    return "model.pt2"


ARCH = ("state.pt", "--arch", "net.py:Net")


@pytest.fixture
def finetune(qcompress, model):
    def run(*args, code=0):
        result = qcompress("finetune", *args)
        assert result.exit_code == code, result.output
        return result

    return run


def bytes_of(path):
    return {name: (Path(path) / name).read_bytes() for name in ("weights.safetensors", "history.csv", "quantizers.csv")}


def newest(path):
    return sorted((Path(path) / "training").iterdir())[-1].read_bytes().split(b"__metadata__")[0]


def test_from_a_state_dict_to_a_file(finetune, qcompress):
    result = finetune(
        *ARCH, "--data", "train.npz", "--val", "val.npz", "--bits", "2", "--activation-bits", "4", "--ends", "8",
        "--teacher", "none", "--augment", "flip,crop:1", "-o", "ckpt", *SHORT,
    )  # fmt: skip
    assert "\nNext: qcompress export ckpt\n" in result.stdout
    assert result.stderr == ""
    assert {p.name for p in Path("ckpt").iterdir()} == OUR_FILES
    small = CompressedModel.load(Path("ckpt"))
    assert {name: getattr(a, "bits", None) for name, a in small.artifacts.items() if name.endswith("t.weight")} == {
        "left.weight": 2, "right.weight": 2,
    }  # fmt: skip
    assert [small.plan.default.bits, *(s.bits for s in small.plan.name.values())].count(8) in (1, 2)
    assert qcompress("export", "ckpt", "-o", "net.onnx", "--quiet").exit_code == 0
    result = qcompress("validate", "ckpt", "net.onnx", "--data", "val.npz", "--no-timing", "--quiet")
    assert result.exit_code == 0, result.output
    again = finetune("ckpt", "--data", "train.npz", "--bits", "3", "-o", "next", *SHORT)
    assert "Next: qcompress export next" in again.stdout
    assert CompressedModel.load(Path("next")).plan.default.bits == 3


def test_from_a_graph_without_labels(finetune):
    result = finetune("model.pt2", "--data", "unlabelled.npz", "--bits", "2", "-o", "ckpt", *SHORT[:-1])
    assert "MODEL is a graph: BatchNorm keeps its statistics" in result.stderr
    assert "epoch 1/2: loss " in result.stderr
    assert "epoch 2/2: loss " in result.stderr
    first, *_, last = (Path("ckpt") / "history.csv").read_text().splitlines()[1:]
    assert float(last.split(",")[2]) < float(first.split(",")[2])
    assert {p.name for p in Path("ckpt").iterdir()} == OUR_FILES


def test_a_compressed_folder_goes_on_with_its_plan(finetune, qcompress):
    assert qcompress("export", "model.pt2", "--bits", "4", "--save-compressed", "small", "--quiet").exit_code == 0
    finetune("small", "--data", "unlabelled.npz", "--method", "dkm", "-o", "ckpt", *SHORT)
    assert CompressedModel.load(Path("ckpt")).plan.default.bits == 4


def test_palettes_of_a_folder_are_trained_as_palettes(finetune, qcompress):
    assert qcompress("export", "model.pt2", "--bits", "3", "--save-compressed", "small", "--quiet").exit_code == 0
    loud = [option for option in SHORT if option != "--quiet"]
    result = finetune("small", "--data", "unlabelled.npz", "-o", "ckpt", *loud)
    assert "MODEL holds palettes, which --method dkm goes on to train" in result.stderr
    assert {a.kind for a in CompressedModel.load(Path("ckpt")).artifacts.values()} == {"palette", "float"}


def test_labels_beside_a_teacher(finetune):
    """Each weight of the teacher in the loss gives other weights; with all of it, labels do not matter."""
    np.savez("other.npz", x=small_models.images(48), y=LABELS[::-1])
    weights = {}
    for data in ("train.npz", "other.npz"):
        for weight in ("0.5", "1"):
            out = f"{data}{weight}"
            finetune("model.pt2", "--data", data, "--kd-weight", weight, "--bits", "2", "-o", out, *SHORT)
            weights[data, weight] = (Path(out) / "weights.safetensors").read_bytes()
    assert weights["train.npz", "1"] == weights["other.npz", "1"] != weights["train.npz", "0.5"]
    assert weights["train.npz", "0.5"] != weights["other.npz", "0.5"]


def test_a_float_model(finetune, qcompress):
    finetune(
        *ARCH, "--data", "train.npz", "--method", "none", "--regularizer", "range:margin", "--optimizer", "sgd",
        "--nesterov", "--from-scratch", "-o", "ckpt", *SHORT,
    )  # fmt: skip
    assert {"model.pt2", "state.pt"} <= {p.name for p in Path("ckpt").iterdir()}
    state = torch.load("ckpt/state.pt", weights_only=True)
    assert state.keys() == small_models.net().state_dict().keys()
    assert not torch.equal(state["head.weight"], small_models.net().state_dict()["head.weight"])
    assert qcompress("inspect", "ckpt").exit_code == 0
    assert qcompress("export", "ckpt", "--bits", "4", "--effort", "fast", "-o", "net.onnx", "--quiet").exit_code == 0
    result = qcompress("validate", "ckpt", "net.onnx", "--data", "val.npz", "--no-timing", "--quiet")
    assert "exporter" in result.stdout


def test_a_dry_run_writes_nothing(finetune, folder):
    before = sorted(folder.iterdir())
    command = ("model.pt2", "--data", "train.npz", "--bits", "2", *SHORT, "--epochs", "9", "-o", "ckpt", "--dry-run")
    result = finetune(*command)
    assert "4 weights: 4 at 2 bits; 9 epochs of 3 steps\n584 B of packed codes" in result.stdout
    assert result.stdout.endswith("nothing written (--dry-run)\n")
    document = json.loads(finetune(*command, "--json").stdout)
    assert document["settings"]["epochs"] == 9
    assert sorted(folder.iterdir()) == before


def test_untuned_defaults_are_named(finetune, qcompress):
    assert "untuned: other methods and widths" in " ".join(qcompress("finetune", "--help").stdout.split())
    command = ("model.pt2", "--data", "train.npz", "--bits", "2", *SHORT[:-1], "--dry-run")
    assert "The defaults of tqt at 2 bits are untuned; compare" in finetune(*command, "--method", "tqt").stderr
    assert "untuned" not in finetune(*command, "--method", "dkm").stderr


def test_a_saved_plan_gives_the_same_weights(finetune):
    given = ("--bits", "2", "--activation-bits", "2", "--ends", "8", "--method", "n2uq", "--rate", "1e-3")
    common = ("model.pt2", "--data", "train.npz", *SHORT)
    finetune(*common, *given, "-o", "one", "--save-plan", "plan.toml")
    plan = load_plan(Path("plan.toml"))
    assert (plan.training.method, plan.training.rate, plan.kind["first"].bits) == ("n2uq", 1e-3, 8)
    finetune(*common, "--plan", "plan.toml", "-o", "two")
    assert bytes_of("one") == bytes_of("two")


def test_ends_of_16_bits_train_as_floats_and_are_stored_as_float16(finetune, qcompress, folder):
    """A saved plan and the run's folder hold them too."""
    bits = ("--bits", "2", "--activation-bits", "4")
    common = (*ARCH, "--data", "train.npz", *SHORT)
    finetune(*common, *bits, "--ends", "16", "--save-plan", "plan.toml", "-o", "half")
    assert {end: load_plan(Path("plan.toml")).kind[end].skip for end in ("first", "last")} == {
        "first": "float16", "last": "float16",
    }  # fmt: skip
    finetune(*common, *bits, "--ends", "float", "-o", "float")
    finetune(*common, "--plan", "plan.toml", "-o", "again")
    finetune("half", "--data", "train.npz", "-o", "further", *SHORT)
    written = {}
    for name in ("half", "float", "again", "further"):
        result = qcompress("export", name, "-o", f"{name}.onnx")
        assert "bit for bit" in result.stdout, result.output
        assert (", as float16: " in result.stdout) == (name != "float")
        graph = onnx.load(f"{name}.onnx").graph
        weights = [t for t in graph.initializer if np.prod(t.dims) > 8 and t.data_type in (FLOAT, FLOAT16)]
        written[name] = {tuple(t.dims): t.data_type for t in weights}  # longer than biases and scales
    assert qcompress("validate", "half", "half.onnx", "--data", "val.npz", "--no-timing").exit_code == 0
    half = {(8, 3, 3, 3): FLOAT16, (5, 8): FLOAT16}
    assert written == {"half": half, "float": dict.fromkeys(half, FLOAT), "again": half, "further": half}
    assert (folder / "half.onnx").read_bytes() == (folder / "again.onnx").read_bytes()
    assert (folder / "half.onnx").stat().st_size < (folder / "float.onnx").stat().st_size - 256
    one, other = (CompressedModel.load(folder / name).artifacts for name in ("half", "float"))
    for name in ("stem.weight", "head.weight"):
        assert (one[name].values == other[name].values.astype(np.float16)).all()


def test_the_document(finetune):
    command = ("model.pt2", "--data", "train.npz", "--val", "val.npz", "--bits", "2", "--json")
    result = finetune(*command, "-o", "ckpt", *SHORT[:-1])
    assert check("finetune", result.stdout) == BY_SEED
    document = json.loads(result.stdout)
    assert [row["epoch"] for row in document["history"]] == [1, 2]
    assert document["folder"] == "ckpt"
    without = finetune(*command[:3], *command[5:], "-o", "other", *SHORT).stdout
    assert check("finetune", without) == {"drop_interval[]", *BY_SEED}
    assert "history[]" in check("finetune", finetune(*command, "--dry-run", *SHORT).stdout)


def test_the_best_epoch_is_kept(finetune):
    (Path("metric.py")).write_text(
        "calls = []\ndef worse(outputs, y):\n    calls.append(0)\n    return float(len(calls)) ** 2\n"
    )
    result = finetune(
        "model.pt2", "--data", "train.npz", "--val", "val.npz", "--bits", "2", "--metric", "metric.py:worse",
        "--lower-is-better", "-o", "ckpt", *SHORT,
    )  # fmt: skip
    assert "with the weights of epoch 1 as stored" in result.stdout
    assert "1 *" in result.stdout


def test_several_seeds(finetune, refused):
    common = ("model.pt2", "--data", "train.npz", "--val", "val.npz", "--bits", "2", "--metric", "top1", *SHORT)
    result = finetune(*common, "--seed", "3", "--seeds", "2", "-o", "ckpt", "--json")
    document = json.loads(result.stdout)
    assert check("finetune", result.stdout) == set()
    drops = {run["seed"]: run["drop"] for run in document["seeds"]}
    assert list(drops) == [3, 4]
    assert document["drop"] == pytest.approx(sum(drops.values()) / 2)
    low, high = document["drop_interval"]  # Student's t with one degree of freedom: 12.706
    assert high - low == pytest.approx(12.706 * abs(drops[3] - drops[4]), rel=1e-4)
    best = min(drops, key=drops.get)
    assert (document["folder"], document["kept_epoch"] is None) == (f"ckpt/seed-{best}", False)
    finetune(*common, "--seed", "4", "-o", "alone")
    assert bytes_of("ckpt/seed-4") == bytes_of("alone")
    shutil.rmtree("ckpt/seed-4")
    table = finetune(*common, "--seed", "3", "--seeds", "2", "-o", "ckpt", "--resume").stdout
    assert bytes_of("ckpt/seed-4") == bytes_of("alone")
    assert f"Next: qcompress export ckpt/seed-{best}\n" in table
    assert "over 2 seeds, " in table
    wrong = ("--data", "unlabelled.npz", "--teacher", "none", "--seeds", "2", "-o", "wrong")
    assert "Training needs labels or a teacher" in refused("finetune", *common, *wrong)
    assert not Path("wrong").exists()
    assert "net.py must be a folder" in refused("finetune", *common, "--seeds", "2", "-o", "net.py")
    again = (*common, "--seeds", "2", "-o", "ckpt")
    assert "ckpt/seed-3 holds a training run: add --resume" in refused("finetune", *again, "--seed", "3")
    assert "ckpt holds other files than the runs of these seeds" in refused("finetune", *again)


def test_several_seeds_without_validation_data(finetune):
    table = finetune("model.pt2", "--data", "train.npz", "--bits", "2", "--seeds", "2", "-o", "ckpt", *SHORT).stdout
    assert "trained 2 times: ckpt; the lowest loss (*): ckpt/seed-" in table


def test_a_limit_of_time(finetune):
    command = ("model.pt2", "--data", "train.npz", "--bits", "2", "--batch-size", "16", "--quiet")
    finetune(*command, "--epochs", "10000", "--max-time", "1s", "-o", "ckpt")
    steps = int((Path("ckpt") / "history.csv").read_text().splitlines()[-1].split(",")[1])
    assert 20 <= steps < 3000


# How a run resumes.

RUN = (*ARCH, "--data", "train.npz", "--bits", "2", "--activation-bits", "2", "--teacher", "none", "--augment",
       "flip,crop:1", "--epochs", "4", "--batch-size", "16", "--checkpoint-every", "1")  # fmt: skip


def started(*args):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    code = "from qcompress_cli.main import main; main()"
    command = [sys.executable, "-c", code, "finetune", *args]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def stopped(process, folder, number, wanted, delay):
    """Send a signal when there are checkpoints up to a step, and a little later; return the exit code and stderr.

    Without a delay the signal waits until the next checkpoint is half written.
    """
    training = Path(folder, "training")
    while process.poll() is None:
        steps = [int(p.stem.removeprefix("step-")) for p in training.glob("step-*")]
        if max(steps, default=0) >= wanted and (delay is not None or any(training.glob(".*"))):
            time.sleep(delay or 0)
            process.send_signal(number)
            break
        time.sleep(0.001)
    _, err = process.communicate()
    return process.returncode, err


def killed_and_resumed(finetune, kills, seed, command=RUN, steps=11):
    """Kill a run again and again, then let it end; it must equal one that was never interrupted.

    Every other kill falls into the writing of a checkpoint.
    """
    finetune(*command, "-o", "whole")
    random = np.random.default_rng(seed)
    for i, step in enumerate(sorted(random.choice(steps, kills, replace=False))):
        process = started(*command, "-o", "ckpt", "--resume")
        code, _ = stopped(process, "ckpt", signal.SIGKILL, int(step), None if i % 2 else random.uniform(0, 0.05))
        assert code == -signal.SIGKILL
    finetune(*command, "-o", "ckpt", "--resume")
    assert bytes_of("ckpt") == bytes_of("whole")
    assert newest("ckpt")[8:] == newest("whole")[8:]
    assert not list(Path("ckpt").rglob(".*"))


def test_a_killed_run_equals_an_uninterrupted_one(finetune):
    killed_and_resumed(finetune, 2, seed=1)


@pytest.mark.slow
def test_a_run_that_is_killed_often_equals_an_uninterrupted_one(finetune, digits):
    pixels, labels = load_digits(return_X_y=True)
    np.savez("digits.npz", x=(pixels / 16).astype(np.float32).reshape(-1, 1, 8, 8), y=labels)
    shutil.copy(ROOT / "samples" / "digits" / "net.py", "digits_net.py")
    command = (digits / "state.pt", "--arch", "digits_net.py:DigitsNet", "--data", "digits.npz", *RUN[5:])
    killed_and_resumed(finetune, 20, seed=0, command=tuple(map(str, command)), steps=440)


def test_a_terminated_run_writes_a_checkpoint_and_says_what_to_type(finetune):
    process = started(*RUN, "--checkpoint-every", "1h", "--epochs", "4000", "-o", "ckpt")
    code, err = stopped(process, "ckpt", signal.SIGTERM, 1, 0)
    assert code == 130
    *_, said, typed = err.splitlines()
    assert said.startswith("interrupted: ckpt is at step ")
    assert typed.startswith("Next: qcompress finetune state.pt --arch net.py:Net --data train.npz")
    assert typed.endswith("-o ckpt --resume")
    assert CompressedModel.load(Path("ckpt"))
    at = int(said.split("step ")[1].split(" ")[0].replace(",", ""))
    assert f"step-{at:09d}.safetensors" in {p.name for p in Path("ckpt/training").iterdir()}


# What is refused: exit 2, one message, nothing lost.


def test_all_missing_options_are_in_one_message(refused, model):
    assert refused("finetune", model) == (
        "finetune needs bits per weight: --bits N (or --plan FILE, or --method none); training data: --data train.npz "
        "(x, and y where there are labels); a folder for the run: -o ckpt.\n"
    )


def saved(**arrays):
    np.savez("bad.npz", **arrays)
    return "bad.npz"


X = small_models.images(48)
BAD_DATA = {
    "wrong shape": (lambda: saved(x=X[:, :2], y=LABELS), r"3"),
    "wrong dtype": (lambda: saved(x=np.full((48,), "text"), y=LABELS), r"x"),
    "labels out of range": (lambda: saved(x=X, y=LABELS + 1), r"labels must be from 0 to 4 for the model's 5 outputs"),
    "one class": (lambda: saved(x=X, y=0 * LABELS), r"labels must hold at least two classes, but all 48 are 0"),
    "NaN": (lambda: saved(x=X * np.nan, y=LABELS), r"must be finite, but 48 of 48 samples hold NaN or Inf"),
    "too few": (lambda: saved(x=X[:9], y=LABELS[:9]), r"A batch needs 16 samples, but .* has 9: use a batch size of"),
    "different lengths": (lambda: saved(x=X, y=LABELS[:9]), r"48"),
    "no samples": (lambda: saved(x=X[:0], y=LABELS[:0]), r"sample"),
    "missing key": (lambda: saved(x=X, y=LABELS) + ":images,y", r"images"),
    "missing file": (lambda: "nowhere.npz", r"nowhere\.npz"),
    "empty file": (lambda: Path("bad.npz").touch() or "bad.npz", r"bad\.npz"),
    "no labels": (lambda: "unlabelled.npz", r"Training needs labels or a teacher, but the data has no labels"),
}


@pytest.mark.parametrize("case", BAD_DATA)
def test_bad_data(case, refused, model, folder):
    make, message = BAD_DATA[case]
    data = make()
    before = sorted(folder.iterdir())
    said = refused("finetune", model, "--data", data, "--bits", "2", "--teacher", "none", "-o", "ckpt", *SHORT)
    assert said.count("\n") == 1
    with pytest.raises(AssertionError, match=message):
        raise AssertionError(said)
    assert sorted(folder.iterdir()) == before


BAD_OPTIONS = {
    "an unknown method": (("--method", "lsqplus"), r"must be 'lsq', .* got 'lsqplus'\. Did you mean lsq_plus or lsq"),
    "a method by another name": (("--method", "kmeans"), r"got 'kmeans'\. Did you mean dkm\?"),
    "a regularizer by another name": (("--regularizer", "KURE"), r"got 'KURE'\. Did you mean kurtosis\?"),
    "a width that the method lacks": (("--method", "ternary", "--bits", "3"), r"ternary quantizes weights at 2 bits"),
    "a teacher that is missing": (("--teacher", "no.pt2"), r"must be self, none or a model file, but no\.pt2"),
    "a fixed offset without offsets": (("--fixed-offset",), r"--fixed-offset applies to activations that LSQ"),
    "a scale per tensor": (("--per-tensor", "--method", "n2uq"), r"--per-tensor does not apply to n2uq"),
    "an unknown function": (("--loss", "nowhere:fn"), r"nowhere"),
    "no time": (("--max-time", "soon"), r"must be a time such as 90s, 30m or 8h, got 'soon'"),
    "no steps": (("--checkpoint-every", "0"), r"must be at least 1 step, got 0"),
    "none with bits": (("--method", "none"), r"--method none trains the float model: remove --bits"),
    "nesterov": (("--nesterov",), r"--nesterov applies to the optimizer sgd only, but this is adamw; add"),
    "a graph from scratch": (("--from-scratch",), r"--from-scratch needs the architecture of the model: add --arch"),
    "unlabelled validation": (("--val", "unlabelled.npz"), r"--val unlabelled\.npz needs labels"),
    "augmentation": (("--augment", "spin"), r"spin"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_OPTIONS)
def test_bad_options(case, refused, model, folder):
    options, message = BAD_OPTIONS[case]
    before = sorted(folder.iterdir())
    said = refused("finetune", model, "--data", "train.npz", "--bits", "2", "-o", "ckpt", *SHORT, *options)
    with pytest.raises(AssertionError, match=message):
        raise AssertionError(said)
    assert sorted(p for p in folder.iterdir() if p.name != "__pycache__") == before


def test_a_teacher_with_other_inputs_or_outputs(refused, model):
    def saved(net, example):
        batch = ({0: torch.export.Dim("batch")},)
        torch.export.save(torch.export.export(net.eval(), (example,), dynamic_shapes=batch), "teacher.pt2")

    command = ("finetune", model, "--data", "train.npz", "--bits", "2", "-o", "ckpt", "--teacher", "teacher.pt2")
    saved(torch.nn.Conv2d(1, 5, 3), torch.ones(2, 1, 8, 8))  # its input has another name, which does not matter
    assert "--teacher teacher.pt2 must take the inputs of the model: " in refused(*command, *SHORT)
    saved(torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(192, 4)), torch.ones(2, 3, 8, 8))
    assert (
        "--teacher teacher.pt2 must have outputs of the model's shape, [2, 5], but they have shape [2, 4]"
        in refused(*command, *SHORT)
    )


def test_losses(finetune, refused, model):
    Path("loss.py").write_text("def half(x, y):\n    return x.sum() / 0 * y.nothing\ndef wide(x, y):\n    return x\n")
    command = ("finetune", model, "--data", "train.npz", "--bits", "2", "--teacher", "none", *SHORT)
    assert "--loss loss.py:half failed with the model's outputs and the labels: AttributeError" in refused(
        *command, "-o", "a", "--loss", "loss.py:half"
    )
    assert "--loss loss.py:wide must return a tensor of shape [] that depends on the outputs, got [16, 5]." in refused(
        *command, "-o", "b", "--loss", "loss.py:wide"
    )
    assert "--loss mse failed with the model's outputs and the labels" in refused(*command, "-o", "c", "--loss", "mse")
    np.savez("regression.npz", x=X, y=np.ones((48, 5), np.float32))
    finetune(model, "--data", "regression.npz", "--bits", "2", "--loss", "mse", "--kd-weight", "0.5", "-o", "d", *SHORT)


def test_a_model_with_one_output_needs_another_loss(refused, model):
    net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(192, 1))
    batch = ({0: torch.export.Dim("batch")},)
    torch.export.save(torch.export.export(net, (torch.ones(2, 3, 8, 8),), dynamic_shapes=batch), "one.pt2")
    said = refused("finetune", "one.pt2", "--data", "unlabelled.npz", "--bits", "2", "-o", "ckpt", *SHORT)
    assert "--loss cross_entropy needs a score for each class, but the model's first output has shape [2, 1]" in said


def test_folders(refused, finetune, folder):
    command = ("model.pt2", "--data", "train.npz", "--bits", "2", *SHORT)
    for where, message in {
        "net.py": "-o net.py must be a folder, but it is a file",
        "missing/ckpt": "missing does not exist. Create it first.",
    }.items():
        assert message in refused("finetune", *command, "-o", where)
    (folder / "full").mkdir()
    (folder / "full" / "notes.txt").write_text("mine")
    assert "full holds other files than those of a training run: name" in refused("finetune", *command, "-o", "full")
    assert [p.name for p in (folder / "full").iterdir()] == ["notes.txt"]
    (folder / "locked").mkdir()
    (folder / "locked").chmod(stat.S_IRUSR | stat.S_IXUSR)
    assert "locked is read-only" in refused("finetune", *command, "-o", "locked")
    assert "locked is read-only" in refused("finetune", *command, "-o", "locked/ckpt")
    (folder / "locked").chmod(stat.S_IRWXU)
    assert "plan.toml exists: name another" in refused(
        "finetune", *command, "-o", "ckpt", "--save-plan", (folder / "plan.toml").touch() or "plan.toml"
    )


def test_a_run_is_only_resumed_by_its_own_command(refused, finetune, folder):
    command = ("--data", "train.npz", "--val", "val.npz", "--bits", "2", "--save-plan", "plan.toml", *SHORT)
    finetune("model.pt2", *command, "-o", "ckpt")
    wanted = bytes_of("ckpt")
    (folder / "other.pt2").write_bytes(small_models.pt2(1))
    np.savez("other.npz", x=small_models.images(48, seed=7), y=LABELS)
    assert "ckpt holds a training run: add --resume to go on with it" in refused(
        "finetune", "model.pt2", *command, "-o", "ckpt", "--force"
    )
    (folder / "teacher.pt2").write_bytes(small_models.pt2(1))
    for changed, message in {
        ("model.pt2", "--teacher", "teacher.pt2"): "teacher was null, now it is ",
        ("model.pt2", "--bits", "3"): "plan was bits = 2, now it is bits = 3. Use the same,",
        ("model.pt2", "--rate", "0.5"): "plan was rate = 0.002, now it is rate = 0.5.",
        ("model.pt2", "--data", "other.npz"): "data was",
        ("model.pt2", "--val", "train.npz"): "val was",
        ("model.pt2", "--seed", "1"): "seed was 0, now it is 1.",
        ("other.pt2",): "model was",
    }.items():
        said = refused("finetune", changed[0], *command, *changed[1:], "-o", "ckpt", "--resume")
        assert said.startswith("--resume needs the command that started the run in ckpt: ")
        assert message in said
    assert bytes_of("ckpt") == wanted
    finetune("model.pt2", *command, "-o", "ckpt", "--resume")
    assert bytes_of("ckpt") == wanted


def test_divergence_names_a_way_out(finetune):
    command = ("model.pt2", "--data", "train.npz", "--bits", "2", "--optimizer", "sgd", "--checkpoint-every", "1")
    result = finetune(*command, "--teacher", "none", "--rate", "1e30", "-o", "ckpt", *SHORT, code=1)
    assert "try a lower learning rate" in result.stderr
    assert (
        "The checkpoint in ckpt is good: export it" in result.stderr or "There was no checkpoint yet" in result.stderr
    )


@pytest.mark.slow  # tests/finetune/test_run.py has a quick one
def test_a_full_disk_keeps_the_last_checkpoint(shell, finetune):
    """RLIMIT_FSIZE stands for a full disk: the checkpoints of AdamW's first steps are larger than the model."""
    limited = (
        "import resource, signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "from qcompress.finetune.checkpoints import Checkpoints\n"
        "write = Checkpoints.write\n"
        "def limit(self, state):\n"
        "    if state.values['step'] == 3: resource.setrlimit(resource.RLIMIT_FSIZE, (2000, resource.RLIM_INFINITY))\n"
        "    write(self, state)\n"
        "Checkpoints.write = limit\n"
        "from qcompress_cli.main import main; main()"
    )
    result = shell("finetune", *RUN, "-o", "ckpt", code=limited)
    assert result.returncode == 2, result.stderr
    assert "step-000000003.safetensors cannot be written: File too large." in result.stderr
    assert sorted(p.name for p in Path("ckpt/training").iterdir()) == [f"step-00000000{n}.safetensors" for n in (1, 2)]
    finetune(*RUN, "-o", "whole")
    finetune(*RUN, "-o", "ckpt", "--resume")
    assert bytes_of("ckpt") == bytes_of("whole")
