import json
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from qcompress.analysis import WIDTHS, analyze, report_of, totals_of, walk
from qcompress.errors import SourceError
from qcompress.sources.base import LazyArray, SourceTensor


@dataclass
class InMemory:
    """A source of given tensors that counts how often each is read."""

    entries: list[tuple[str, str, np.ndarray]]
    aliases: dict[str, tuple[str, ...]] = field(default_factory=dict)
    reads: list[str] = field(default_factory=list)
    label: str = "net"
    path: Path | None = None
    original_bytes: int = 12345
    sha256: str = "0" * 64

    def tensors(self):
        for name, kind, values in self.entries:

            def read(name=name, values=values):
                self.reads.append(name)
                return values

            lazy = LazyArray(values.shape, str(values.dtype), read)
            yield SourceTensor(name, kind, lazy, self.aliases.get(name, ()))

    def program(self, options):
        raise AssertionError("analyze runs nothing")


def noise(*shape, dtype=np.float32):
    return np.random.default_rng(0).standard_normal(shape).astype(dtype)


def test_bytes_at_each_width():
    source = InMemory([("conv.weight", "conv", noise(16, 16, 3, 3)), ("conv.bias", "other", noise(16))])
    report = analyze(source)
    weight, bias = report.tensors
    n = 16 * 16 * 9
    assert weight.nbytes == 4 * n
    assert weight.nbytes_at == {bits: -(-n * bits // 8) + 4 * 2**bits for bits in WIDTHS}
    assert weight.stays is None
    assert bias.nbytes_at == dict.fromkeys(WIDTHS, 64)
    assert bias.stays == "not a weight"
    assert report.totals.nbytes_at[2] == weight.nbytes_at[2] + 64
    assert (report.totals.weights, report.totals.tensors, report.totals.count) == (1, 2, n + 16)
    assert totals_of([]).nbytes == 0


@pytest.mark.parametrize(
    ("kind", "values", "stays"),
    [
        ("linear", noise(40, 40, dtype=np.float16), None),
        ("unknown", noise(40, 40), None),
        ("unknown", noise(1600), "not a weight"),
        ("unknown", noise(1600, 1), "not a weight"),
        ("other", noise(40, 40), "not a weight"),
        ("recurrent", noise(40, 40), None),
        ("parameter", noise(40, 40), None),
        ("linear", np.zeros((40, 40), np.int8), "int8 is not compressed"),
        ("linear", noise(1, 1), "too small: codes and table would not save bytes"),
        ("linear", np.zeros((0, 3), np.float32), "too small: codes and table would not save bytes"),
    ],
)
def test_what_stays_has_its_reason(kind, values, stays):
    (tensor,) = analyze(InMemory([("w", kind, values)])).tensors
    assert tensor.stays == stays
    assert all((nbytes < tensor.nbytes) == (stays is None) for nbytes in tensor.nbytes_at.values())


def test_a_width_that_saves_nothing_costs_the_float_bytes():
    (tensor,) = analyze(InMemory([("w", "linear", noise(10, 1))])).tensors
    assert tensor.nbytes_at == {2: 19, 3: 36, 4: 40, 8: 40}
    assert tensor.stays is None


def test_tensors_are_read_one_at_a_time_and_once():
    source = InMemory([(name, "linear", noise(8, 8)) for name in "abc"])
    reports = walk(source)
    assert source.reads == []
    assert next(reports).name == "a"
    assert source.reads == ["a"]
    report_of(source, reports)
    assert source.reads == ["a", "b", "c"]


def test_tied_tensors_count_once():
    source = InMemory([("enc.weight", "embedding", noise(64, 8))], aliases={"enc.weight": ("dec.weight",)})
    report = analyze(source)
    assert report.tensors[0].aliases == ("dec.weight",)
    assert report.totals.count == 512


def test_no_tensor_is_an_error():
    with pytest.raises(SourceError, match=r"^No tensor found in net: a model file holds at least one\.$"):
        analyze(InMemory([]))


def test_non_finite_is_counted_and_json_stays_json():
    values = noise(4, 4)
    values[0] = np.nan
    report = analyze(InMemory([("w", "linear", values), ("b", "other", np.full(2, np.inf, np.float32))]))
    assert report.totals.non_finite == 6
    document = json.loads(json.dumps(report.as_dict(), allow_nan=False))
    assert document["tensors"][1]["mean"] is None


def test_a_module_a_state_dict_and_its_file_agree(tmp_path):
    import torch

    torch.manual_seed(0)
    module = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8), torch.nn.Linear(8, 64))
    state = {name: value.numpy() for name, value in module.state_dict().items()}
    save_file(state, tmp_path / "model.safetensors")
    reports = [analyze(model) for model in (module, module.state_dict(), state, str(tmp_path / "model.safetensors"))]
    seen = [{t.name: (t.statistics, t.nbytes) for t in report.tensors} for report in reports]
    assert all(each == seen[0] for each in seen)
    assert [report.totals.weights for report in reports] == [2, 2, 2, 2]


def test_a_safetensors_file_needs_no_torch(tmp_path):
    save_file({"w": noise(8, 8)}, tmp_path / "model.safetensors")
    code = (
        "import sys; from qcompress.analysis import analyze; analyze(sys.argv[1]); "
        "sys.exit(', '.join({'torch', 'onnx', 'scipy'} & set(sys.modules)) or 0)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "model.safetensors")], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
