"""Training runs: an interrupted run that is resumed equals one that was not, and no file is ever half written."""

import errno
import functools
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors import safe_open
from torch import nn

from qcompress.compressed.model import CompressedModel
from qcompress.data.augment import parse_augment
from qcompress.data.dataset import Dataset
from qcompress.data.training import BatchSettings, TrainingBatches
from qcompress.errors import ConfigError, DivergenceError, OutputError, SourceError
from qcompress.finetune import recipes
from qcompress.finetune.attach import prepare
from qcompress.finetune.checkpoints import Checkpoints
from qcompress.finetune.losses import Objective
from qcompress.finetune.run import Interruption, Pace, Run
from qcompress.finetune.run_folder import start_folder
from qcompress.finetune.trainer import Trainer, TrainingState
from qcompress.graph.options import ProgramOptions
from qcompress.graph.tracing import from_module
from qcompress.metrics.result import MetricResult
from qcompress.plan.plan import Plan
from qcompress.plan.settings import Settings
from qcompress.plan.training import METHODS, Training
from tests.helpers import quick_torch

quick_torch.look_up_once()

EPOCHS, STEPS, BATCH = 3, 4, 8  # 12 steps
NEVER = Pace(steps=None, seconds=None)


class Net(nn.Module):
    """Two convolutions with BatchNorm, dropout and a linear head."""

    def __init__(self):
        super().__init__()
        self.stem, self.norm = nn.Conv2d(1, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)
        self.body, self.drop = nn.Conv2d(4, 6, 3), nn.Dropout(0.2)
        self.head = nn.Linear(6, 3)

    def forward(self, x):
        x = self.norm(self.stem(x)).relu()
        return self.head(self.drop(self.body(x).relu().mean((2, 3))))


def net():
    torch.manual_seed(0)
    return Net().eval()


def data():
    random = np.random.default_rng(0)
    x = random.standard_normal((STEPS * BATCH + 3, 1, 6, 6)).astype(np.float32)
    return Dataset(inputs={"x": x}, labels=(x.mean((1, 2, 3)) > 0).astype(np.int64) + (x[:, 0, 0, 0] > 1))


@functools.cache
def program():
    return from_module(net(), ProgramOptions(inputs={"x": data().inputs["x"][:2]}))


def run_of(folder, bits=2, activation_bits=None, *, pace=NEVER, stop=lambda: False, validation=None, **training):
    """Return a run, made as a new process makes it."""
    settings = recipes.complete(
        Training(**{"epochs": EPOCHS, "batch_size": BATCH, "augment": "flip,crop:1", "teacher": "none", **training}),
        bits,
        has_labels=True,
    )
    if settings.method == "none":
        plan = Plan(default=Settings(skip=True))
    else:
        plan = Plan.from_flags(bits=bits, activation_bits=activation_bits)
    reader = data().reader()
    batches = TrainingBatches(
        reader,
        BatchSettings(size=settings.batch_size, seed=5),
        program=program(),
        classes=3,
        augment=parse_augment(settings.augment),
    )
    torch.manual_seed(5)
    prepared = prepare(
        net(),
        plan,
        program=program(),
        example_inputs=next(batches.epoch(0))[0],
        methods=recipes.methods(settings),
        regularizers=recipes.regularizers(settings),
    )
    trainer = Trainer(
        prepared,
        recipes.loop_config(settings),
        len(batches),
        Objective(nn.functional.cross_entropy),
        forward=lambda model, inputs: model(**inputs),
    )
    folder.mkdir(exist_ok=True)
    return Run(
        trainer, batches, folder, pace, validation=validation, reestimate=settings.reestimate, stop=stop,
        saves_float=settings.method == "none",
    )  # fmt: skip


def finished(run):
    for _ in run.steps():
        pass
    return result(run)


def result(run):
    """Return all that a run leaves: its state, and the bytes of its files."""
    state, folder = run._trainer.state(), run._folder
    names = ["history.csv", "quantizers.csv", "weights.safetensors"]
    files = {name: (folder / name).read_bytes() for name in names if (folder / name).exists()}
    if (folder / "state.pt").exists():
        files |= {k: v.numpy().tobytes() for k, v in torch.load(folder / "state.pt", weights_only=True).items()}
    return state, files


def assert_same(one, other):
    (state, files), (wanted, wanted_files) = one, other
    assert state.values == wanted.values
    assert state.tensors.keys() == wanted.tensors.keys()
    different = [name for name, value in wanted.tensors.items() if not torch.equal(state.tensors[name], value)]
    assert different == []
    assert files == wanted_files


def stopped_after(steps, folder, **case):
    """Run in a folder until it is asked to stop."""
    seen = iter(range(1, 100))
    run = run_of(folder, **case, stop=lambda: next(seen) == steps)
    with pytest.raises(Interruption):
        finished(run)
    assert run.step == steps


def killed_after(steps, folder, **case):
    """Run in a folder, and drop the run as a kill would."""
    records = run_of(folder, **case).steps()
    for _ in range(steps):
        next(records)


def resumed(folder, **case):
    torch.manual_seed(99)  # a new process has another state
    run = run_of(folder, **case)
    assert run.resume()
    return run


WIDTHS = {"none": (8, None), "dkm": (1, None), "n2uq": (2, 2), "bmpq": (3, 4), "tqt": (4, 4)}
CASES = {
    **{f"{m}": dict(zip(("bits", "activation_bits"), WIDTHS.get(m, (2, 2)), strict=True)) | {"method": m}
       for m in METHODS},
    "dkm W2A4": {"method": "dkm", "bits": 2, "activation_bits": 4},
    "range:margin": {"method": "none", "bits": None, "regularizer": "range:margin", "optimizer": "sgd",
                     "nesterov": True},
    "range:linf W2": {"method": "lsq", "regularizer": "range:linf"},
    "bin S3": {"method": "lsq", "regularizer": "bin", "stage": "S3"},
    "kl": {"method": "lsq", "regularizer": "kl", "stage": "S1"},
    "bfloat16": {"method": "lsq", "activation_bits": 4, "precision": "bfloat16"},
    "sgd nesterov": {"method": "lsq", "optimizer": "sgd", "nesterov": True, "clip": 1.0, "schedule": "linear"},
    "snapped": {"method": "lsq_plus", "activation_bits": 2, "snap_offsets": 0.6},
    "reestimate": {"method": "lsq", "reestimate": 2},
}  # fmt: skip


QUICK = ("none", "lsq", "n2uq", "dkm W2A4", "bin S3", "bfloat16", "snapped")


@pytest.mark.parametrize("case", [pytest.param(c, marks=() if c in QUICK else pytest.mark.slow) for c in CASES])
def test_a_resumed_run_equals_an_uninterrupted_one(case, tmp_path_factory):
    wanted = finished(run_of(tmp_path_factory.mktemp("whole"), **CASES[case]))
    tmp_path = tmp_path_factory.mktemp("interrupted")
    stopped_after(2, tmp_path, **CASES[case])  # before the first epoch's end
    run = resumed(tmp_path, **CASES[case])
    records = run.steps()
    for _ in range(5):
        next(records)  # to step 7, the last checkpoint is at the end of the first epoch, step 4
    run = resumed(tmp_path, **CASES[case])
    assert run.step == 4
    assert_same(finished(run), wanted)
    again = resumed(tmp_path, **CASES[case])
    assert again.step == again.total
    assert_same(finished(again), wanted)


def test_without_a_checkpoint_a_run_starts_over(tmp_path_factory):
    case = CASES["pact"]
    wanted = finished(run_of(tmp_path_factory.mktemp("whole"), **case))
    folder = tmp_path_factory.mktemp("killed")
    killed_after(3, folder, **case)
    run = run_of(folder, **case)
    assert not run.resume()
    assert_same(finished(run), wanted)


@pytest.mark.parametrize("steps", [pytest.param(n, marks=() if n == 7 else pytest.mark.slow) for n in (3, 4, 7, 11)])
def test_a_run_that_is_killed_anywhere_goes_on(steps, tmp_path_factory):
    case = CASES["dkm W2A4"]
    wanted = finished(run_of(tmp_path_factory.mktemp("whole"), **case))
    folder, pace = tmp_path_factory.mktemp("killed"), Pace(steps=3, seconds=None)
    killed_after(steps, folder, pace=pace, **case)
    run = resumed(folder, pace=pace, **case)
    assert run.step in (3, 4, 6, 9)
    assert_same(finished(run), wanted)


def test_the_kept_model_is_that_of_the_best_epoch(tmp_path_factory):
    """Also after an interruption, and with BatchNorm's statistics computed anew, which score and file share."""

    def scored(scores, folder, **more):
        def score(prepared):
            assert not prepared.training
            with torch.no_grad():
                seen.append(prepared(torch.tensor(data().inputs["x"])).numpy())
            loss = scores[len(seen) - 1]
            return MetricResult("loss", 0.1, loss, loss - 0.1, (loss - 0.2, loss), lower_is_better=True, samples=3)

        return run_of(folder, validation=score, reestimate=2, **more)

    seen: list[np.ndarray] = []
    folder = tmp_path_factory.mktemp("whole")
    run = scored([0.3, 0.1, 0.2], folder)
    wanted = finished(run)
    assert (run.best_epoch, [row.score for row in run.rows]) == (2, [0.3, 0.1, 0.2])
    outputs = CompressedModel.load(folder).to_module()(torch.tensor(data().inputs["x"]))
    np.testing.assert_allclose(outputs.detach().numpy(), seen[1], atol=1e-5)
    folder = tmp_path_factory.mktemp("killed")
    seen.clear()
    records = scored([0.3, 0.1], folder).steps()
    for _ in range(8):
        next(records)
    seen.clear()
    run = scored([0.2], folder)
    assert run.resume()
    assert_same(finished(run), wanted)
    assert (run.best_epoch, run.best.compressed, run.best.interval) == (2, 0.1, (-0.1, 0.1))


def test_soft_weights_are_scored_beside_those_that_are_stored(tmp_path_factory):
    """Scoring them leaves training as it is."""
    weights = []

    def score(prepared):
        with torch.no_grad():
            outputs = prepared(torch.tensor(data().inputs["x"]))
        weights.append(prepared.model.body.weight.detach().clone())
        loss = float(outputs.square().mean())
        return MetricResult("loss", 0.0, loss, loss, None, lower_is_better=True, samples=3)

    wanted = finished(run_of(tmp_path_factory.mktemp("alone"), method="dkm"))
    run = run_of(tmp_path_factory.mktemp("scored"), method="dkm", validation=score)
    state, _ = finished(run)
    assert all(torch.equal(value, wanted[0].tensors[name]) for name, value in state.tensors.items())
    assert len(weights) == 2 * EPOCHS
    assert all(not torch.equal(weights[i], weights[i + 1]) for i in range(0, len(weights), 2))
    assert all(row.trained_score != row.score for row in run.rows)
    lsq = run_of(tmp_path_factory.mktemp("lsq"), validation=score)
    finished(lsq)
    assert [row.trained_score for row in lsq.rows] == [None] * EPOCHS


def test_divergence_leaves_a_good_checkpoint(tmp_path):
    run = run_of(tmp_path, pace=Pace(steps=2, seconds=None))
    take = run._trainer.take

    def break_at_step_7(inputs, labels):
        if run.step == 7:
            inputs = {name: values * torch.nan for name, values in inputs.items()}
        return take(inputs, labels)

    run._trainer.take = break_at_step_7
    with pytest.raises(DivergenceError, match=r"^Step 7: the loss is nan"):
        finished(run)
    run = resumed(tmp_path)
    assert run.step == 6
    assert all(v.isfinite().all() for v in run._trainer.state().tensors.values() if v.is_floating_point())
    CompressedModel.load(tmp_path)


def test_a_damaged_checkpoint_is_passed_over(tmp_path_factory):
    wanted = finished(run_of(tmp_path_factory.mktemp("whole")))
    folder, pace = tmp_path_factory.mktemp("damaged"), Pace(steps=1, seconds=None)
    stopped_after(6, folder, pace=pace)
    newest, _ = sorted((folder / "training").iterdir(), reverse=True)
    newest.write_bytes(newest.read_bytes()[:-100])
    run = resumed(folder)
    assert run.step == 5
    assert_same(finished(run), wanted)
    for path in (folder / "training").iterdir():
        path.write_bytes(b"\x00" * 20)
    with pytest.raises(SourceError, match=r"damaged, and so are older checkpoints; start over in another folder\.$"):
        run_of(folder).resume()


def test_a_checkpoint_of_another_model_is_refused(tmp_path):
    stopped_after(2, tmp_path)
    with pytest.raises(ConfigError, match=r"belongs to another model or plan; resume with the command that made it\.$"):
        run_of(tmp_path, method="dkm").resume()


def test_what_a_killed_run_left_is_swept_and_nothing_else(tmp_path):
    identity = {"version": 1}
    start_folder(tmp_path / "run", identity)
    folder = tmp_path / "run"
    (folder / ".model.abc").mkdir()
    (folder / ".model.abc" / "model").mkdir()
    (folder / "training").mkdir()
    left = [".run.json.x", ".history.csv.x", ".quantizers.csv.x", ".curves.svg.x", "training/.step-000000003.x"]
    for name in left:
        (folder / name).write_text("half")
    (folder / ".gitignore").write_text("*")
    start_folder(folder, identity)
    assert {p.name for p in folder.iterdir()} == {"run.json", "training", ".gitignore"}
    assert list((folder / "training").iterdir()) == []


def test_checkpoints_hold_no_pickle_and_the_last_ones_stay(tmp_path):
    stopped_after(7, tmp_path, pace=Pace(steps=1, seconds=None, keep=3))
    paths = sorted((tmp_path / "training").iterdir())
    assert [p.name for p in paths] == [f"step-00000000{n}.safetensors" for n in (5, 6, 7)]
    with safe_open(paths[-1], "pt") as file:
        values = json.loads(file.metadata()["qcompress"])
        assert {"random.cpu", "model.model.norm.weight", "optimizer.0.exp_avg", "run.sums"} <= set(file.keys())
    assert (values["step"], values["total"]) == (7, 12)
    for path in tmp_path.rglob("*"):
        assert not path.is_file() or path.suffix in (".safetensors", ".json", ".csv", ".toml", ".pt2")


def test_a_full_disk_keeps_the_last_checkpoint(tmp_path, monkeypatch):
    state = TrainingState({"w": torch.zeros(3)}, {"step": 1, "total": 9})
    checkpoints = Checkpoints(tmp_path / "training")
    checkpoints.write(state)

    def full(handle):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("qcompress.files.os.fsync", full)
    with pytest.raises(OutputError, match=r"step-000000002\.safetensors cannot be written: No space left on device\.$"):
        checkpoints.write(replace(state, values={"step": 2, "total": 9}))
    assert [p.name for p in (tmp_path / "training").iterdir()] == ["step-000000001.safetensors"]
    found = checkpoints.latest()
    assert found is not None
    assert found.values == {"step": 1, "total": 9}


def test_a_limit_of_time_ends_the_schedule(tmp_path):
    run = run_of(tmp_path, epochs=1000, batch_size=8, pace=Pace(steps=None, seconds=None, most_seconds=0.5))
    finished(run)
    assert 20 <= run.step == run.total < 4000
    assert len(run.rows) == -(-run.step // STEPS)
    assert run.rows[-1].rate < 0.05
