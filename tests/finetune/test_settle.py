"""A settled model computes with what its file holds: biases at whole steps, BatchNorm with stored statistics."""

import copy
from functools import cache

import numpy as np
import onnx
import pytest
import torch
from torch import nn

from qcompress.compressed.model import CompressedModel
from qcompress.finetune.attach import prepare
from qcompress.finetune.loop import LoopConfig, train
from qcompress.finetune.methods import Methods
from qcompress.graph.marks import MarkedRunner, mark, rounding
from qcompress.plan.plan import Plan
from qcompress.posthoc.biases import integer_biases
from qcompress_exporters import build
from qcompress_exporters.onnx_format.int8.stepped_biases import stepped
from qcompress_exporters.onnx_format.names import code_name
from qcompress_exporters.parity.differences import outputs_of

METHODS = {
    "W2A2": (2, 2, "lsq", "lsq_plus"),
    "W4A4": (4, 4, "lsq_plus", "lsq_plus"),
    "TQT": (3, 4, "tqt", "tqt"),
    "N2UQ": (2, 2, "n2uq", "n2uq"),
    "DoReFa + PACT": (2, 3, "dorefa", "pact"),
    "DKM": (2, 4, "dkm", "lsq"),
}


class Block(nn.Module):
    """Convolutions with BatchNorm, whose γ has either sign, and a residual sum."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.stem_norm = nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.conv, self.norm = nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.down, self.down_norm = nn.Conv2d(8, 12, 3, 2, bias=False), nn.BatchNorm2d(12)
        self.head = nn.Linear(12, 4)
        with torch.no_grad():
            self.norm.weight[::2] *= -1

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        x = self.stem_norm(self.stem(image)).relu()
        x = (x + self.norm(self.conv(x))).relu()
        return self.head(self.down_norm(self.down(x)).relu().mean((2, 3)))


class MixConv(nn.Module):
    """Depthwise convolutions whose outputs are joined, and a BatchNorm behind them all."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.stem_norm = nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.small = nn.Conv2d(4, 4, 3, padding=1, groups=4, bias=False)
        self.large = nn.Conv2d(4, 6, 5, padding=2, groups=2)
        self.norm, self.head = nn.BatchNorm2d(10), nn.Linear(10, 4)
        with torch.no_grad():
            self.norm.weight[::3] *= -1

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        x = self.stem_norm(self.stem(image)).relu()
        a, b = x.split(4, 1)
        return self.head(self.norm(torch.cat([self.small(a), self.large(b)], 1)).relu().mean((2, 3)))


def plain() -> nn.Module:
    """Returns a net without BatchNorm."""
    layers = nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, 2), nn.ReLU(), nn.Flatten()
    return nn.Sequential(*layers, nn.Linear(72, 16), nn.ReLU(), nn.Linear(16, 4))


NETS = {"plain": plain, "block": Block, "mixconv": MixConv}
# Layers, the BatchNorms that they absorb, and their channels in these.
NORMS = {
    Block: [(c, n, slice(None)) for c, n in (("stem", "stem_norm"), ("conv", "norm"), ("down", "down_norm"))],
    MixConv: [("stem", "stem_norm", slice(None)), ("small", "norm", slice(4)), ("large", "norm", slice(4, 10))],
}
QUICK = [("plain", "W2A2"), ("mixconv", "W4A4"), ("block", "W4A4"), ("block", "N2UQ"), ("block", "DKM")]
TRAINED = [
    pytest.param(net, method, marks=() if (net, method) in QUICK else pytest.mark.slow)
    for net in NETS
    for method in METHODS
]


def batches(count=24, size=32, seed=0):
    """Returns images of 8 x 8 pixels with four classes: the brightest quarter."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, 4, (count * size,), generator=generator)
    x = torch.rand(count * size, 1, 8, 8, generator=generator)
    for i, label in enumerate(labels):
        x[i, 0, 4 * (label // 2) :, 4 * (label % 2) :][:4, :4] += 0.5
    return list(zip(x.split(size), labels.split(size), strict=True))


def prepared(net, method="W2A2", **options):
    torch.manual_seed(0)
    bits, activation_bits, weights, activations = METHODS[method]
    plan = Plan.from_flags(bits=bits, activation_bits=activation_bits)
    methods = Methods(weights=weights, activations=activations)
    first = batches(count=2)
    module = (NETS[net]() if isinstance(net, str) else net).train()
    return prepare(module, plan, example_inputs=(first[0][0],), calibration=[first[1][0]], methods=methods, **options)


@cache
def trained(net, method):
    """Returns a trained net in eval mode, which tests do not change."""
    tuned = prepared(net, method)
    for _ in train(tuned, batches(12), LoopConfig(epochs=2, rate=5e-3, quantizer_rate=0.1, settle=0.5)):
        pass
    return tuned.eval()


def in_float64(tuned, x):
    """Returns the outputs, and the values at all sites, of a trained net that computes in float64."""
    wide, seen = copy.deepcopy(tuned).double(), {}
    for i, quantizer in enumerate(wide.activations):
        quantizer.register_forward_hook(lambda _, __, out, i=i: seen.__setitem__(i, out.detach().numpy()))
    with torch.no_grad():
        return wide(x.double()).numpy(), [seen[i] for i in range(len(seen))]


@pytest.mark.parametrize(("net", "method"), TRAINED)
def test_the_file_computes_what_was_trained(net, method):
    """Rounding biases afterwards left 5 to 40 dB between them."""
    tuned, x = trained(net, method), torch.cat([x for x, _ in batches(count=4, seed=1)])
    wanted, values = in_float64(tuned, x)
    small = tuned.finalize()
    file = onnx.load_from_string(build(small).data)
    names = {output for node in file.graph.node for output in node.output}
    (output,) = (value.name for value in file.graph.output)
    file.graph.output.extend(onnx.ValueInfoProto(name=code_name(i)) for i in range(len(values)))
    assert names >= {code_name(i) for i in range(len(values))}
    got = outputs_of(file.SerializeToString(), [{file.graph.input[0].name: x.numpy()}], "deployed")
    off = count = 0
    for i, grid in enumerate(small.activations.values()):
        codes = np.rint(values[i] / float(grid.scale)) + grid.stored_zero_point
        off, count = off + int((codes.ravel() != got[code_name(i)].ravel()).sum()), count + codes.size
    assert off <= 1e-4 * count
    noise, signal = np.square(got[output] - wanted).sum(1), np.square(wanted).sum(1)
    db = 10 * np.log10(signal / np.maximum(noise, 1e-20 * signal))
    assert np.median(db) >= 60


@pytest.mark.parametrize(("net", "method"), TRAINED)
def test_the_file_has_the_trained_biases_bit_for_bit(net, method, tmp_path):
    tuned = trained(net, method)
    small = tuned.finalize()
    small.save(tmp_path / "ckpt")
    loaded = CompressedModel.load(tmp_path / "ckpt")
    file = onnx.load_from_string(build(loaded).data)
    stored = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in file.graph.initializer}
    written, trained_with = stepped(loaded), folded_biases(tuned)
    steps = {b.name: b for b in integer_biases(written.program, written.artifacts, list(small.activations.values()))}
    assert steps.keys() == trained_with.keys() == {name for name in small.artifacts if name.endswith("bias")}
    for name, step in steps.items():
        bias = small.artifacts[name].dequantize()
        np.testing.assert_array_equal(bias.view(np.uint32), written.artifacts[name].dequantize().view(np.uint32))
        np.testing.assert_allclose(bias, trained_with[name], rtol=0, atol=3e-7 * np.abs(trained_with[name]).max())
        if stored[name].dtype == np.int32:  # N2UQ's thresholds take floats
            assert np.array_equal((stored[name] * (step.grid.scale * step.scale).astype(np.float64)).astype("f4"), bias)
        else:
            assert np.array_equal(stored[name], bias)


def folded_biases(tuned):
    """Returns the biases that the forward of a settled net computes with, BatchNorm folded, in float64."""
    found = {name: place.used() for name, place in tuned._places.items()}
    found |= tuned._steps().used(found, tuned._scales(tuned._steps()))
    seen = {name: value.detach().double().numpy() for name, value in found.items()}
    if type(tuned.model) not in NORMS:
        return {name: value for name, value in seen.items() if name.endswith("bias")}
    found = {"head.bias": seen["head.bias"]}
    for conv, norm, channels in NORMS[type(tuned.model)]:
        weight, bias, mean, variance = (
            seen[f"{norm}.{part}"][channels] for part in ("weight", "bias", "running_mean", "running_var")
        )
        own = seen.get(f"{conv}.bias", 0.0)
        found[f"{conv}.bias"] = bias + (own - mean) * weight / np.sqrt(variance + 1e-5)
    return found


def test_unsettled_training_ends_elsewhere():
    """What settling is for: without it, the file differs from the trained net in many codes."""
    tuned, x = copy.deepcopy(trained("block", "W2A2")), batches(count=1)[0][0]
    with torch.no_grad():
        settled = tuned(x)
        tuned.set_extra_state({"is_settled": False})
        assert (tuned(x) - settled).square().mean().sqrt() > 1e-3 * settled.std()


def test_biases_learn_while_they_are_rounded():
    tuned = prepared("block")
    tuned.settle()
    tuned(batches(count=1)[0][0]).square().sum().backward()
    assert [name for name, p in tuned.named_parameters() if p.grad is None] == []
    assert tuned.model.norm.bias.grad.abs().min() > 0


def test_statistics_stay_and_everything_else_trains_on():
    tuned = prepared("block")
    tuned.settle()
    before = {name: value.clone() for name, value in [*tuned.named_parameters(), *tuned.named_buffers()]}
    optimizer = torch.optim.SGD(tuned.parameters(), lr=0.01)
    for x, y in batches(count=2):
        optimizer.zero_grad()
        nn.functional.cross_entropy(tuned(x), y).backward()
        optimizer.step()
    parameters = dict(tuned.named_parameters())
    assert not [name for name, value in parameters.items() if torch.equal(value, before[name])]
    assert all(torch.equal(value, before[name]) for name, value in tuned.named_buffers())


def test_training_and_evaluation_compute_the_same_once_settled():
    tuned, x = prepared("block"), batches(count=1)[0][0]
    with torch.no_grad():
        assert not torch.equal(tuned.train()(x), tuned.eval()(x))
        tuned.settle()
        assert torch.equal(tuned.train()(x), tuned.eval()(x))


@pytest.mark.parametrize("batchnorm", ["freeze", "fold"])
def test_all_ways_of_batchnorm_settle(batchnorm):
    tuned, x = prepared("block", batchnorm=batchnorm), batches(count=1)[0][0]
    tuned.settle()
    small = tuned.finalize()
    for name, artifact in stepped(small).artifacts.items():
        assert artifact.dequantize().tobytes() == small.artifacts[name].dequantize().tobytes()
    with torch.no_grad():
        assert torch.allclose(tuned.eval().double()(x.double()).float(), as_stored(small, x), atol=1e-4)


def as_stored(small, x):
    """Returns the outputs of a model's artifacts and grids in torch."""
    weights = {name: artifact.dequantize() for name, artifact in small.artifacts.items()}
    marked = mark(small.program.with_state(weights), list(small.activations))
    (output,) = MarkedRunner(marked)({"image": x.numpy()}, rounding(list(small.activations.values()))).values()
    return torch.from_numpy(output)


def test_a_model_without_quantized_activations_stays_as_it_is():
    plan = Plan.from_flags(bits=2)
    tuned, x = prepare(Block(), plan, example_inputs=(batches(1)[0][0],)), batches(count=1)[0][0]
    with torch.no_grad():
        tuned.eval()
        before = tuned(x)
        tuned.settle()
        assert torch.equal(tuned(x), before)
        tuned.train()
        tuned(x)
    assert tuned.model.norm.num_batches_tracked == 1
    assert tuned.get_extra_state() == {"is_settled": False}


def test_the_state_dict_knows_that_the_model_is_settled():
    tuned, other, x = prepared("block"), prepared("block"), batches(count=1)[0][0]
    tuned.settle()
    other.load_state_dict(tuned.state_dict())
    with torch.no_grad():
        assert torch.equal(tuned.eval()(x), other.eval()(x))


def test_statistics_can_be_estimated_again():
    """A BatchNorm that does not train used to lose its statistics: they were reset, and then no batch set them."""
    for options in ({}, {"batchnorm": "freeze"}):
        tuned, data = prepared("block", **options), [x for x, _ in batches(count=3)]
        tuned.settle()
        tuned.reestimate_batchnorm(data)
        norm = tuned.model.stem_norm
        assert norm.num_batches_tracked == 3
        assert not torch.equal(norm.running_var, torch.ones(8))
        small = tuned.finalize()
        for name, artifact in stepped(small).artifacts.items():
            assert artifact.dequantize().tobytes() == small.artifacts[name].dequantize().tobytes()


class Odd(nn.Module):
    """Two BatchNorms in a row, one without γ and β, and one that has nothing special."""

    def __init__(self) -> None:
        super().__init__()
        self.twice = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.BatchNorm2d(4))
        self.bare = nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4, affine=False))
        self.usual = nn.Sequential(nn.Conv2d(4, 64, 3), nn.BatchNorm2d(64))
        self.head = nn.Linear(64, 4)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        x = self.bare(self.twice(image).relu()).relu()
        return self.head(self.usual(x).relu().mean((2, 3)))


def test_biases_that_cannot_be_rounded_in_training_are_named():
    tuned = prepared(Odd(), "W4A4")
    tuned.settle()
    notes = [note for note in tuned.finalize().notes if "rounds" in note]
    assert notes == [
        f"The export rounds {name}.0.bias: its BatchNorm has no β, or is followed by another."
        for name in ("twice", "bare")
    ]


def test_a_dead_channel_leaves_the_steps_of_the_others_fine():
    """Its scale is next to nothing and its bias is not, so that few of its steps would fit 32 bits."""
    tuned = prepared("block")
    with torch.no_grad():
        for gamma, value in ((tuned.model.norm.weight, 1e-12), (tuned.model.down_norm.weight, 0.0)):
            gamma[3] = value
        for norm in (tuned.model.norm, tuned.model.down_norm):
            norm.bias[3] = 0.7
    tuned.settle()
    small = tuned.finalize()
    written = stepped(small)
    for name, artifact in written.artifacts.items():
        if name.endswith("bias"):
            assert artifact.dequantize().tobytes() == small.artifacts[name].dequantize().tobytes()
    for name in ("conv.weight", "down.weight"):
        ratio = small.artifacts[name].scale / written.artifacts[name].integers().scale
        assert (ratio == 32).all()
    assert small.artifacts["conv.bias"].dequantize()[3] == np.float32(0.7)


@pytest.mark.parametrize(
    ("bits", "free_inputs", "computes"), [(2, True, "float"), (2, False, "int8"), (4, True, "int8")]
)
@pytest.mark.parametrize("net", NETS)
def test_the_offset_of_an_input_of_few_bits_stays_as_learned(net, bits, free_inputs, computes):
    """Half a step of 2 bits is much: moving the offset of its images took 1.9 points from ResNet-20 at W2A2."""
    signed = [(x - 0.7, y) for x, y in batches(count=6)]
    plan, methods = Plan.from_flags(bits=2, activation_bits=bits), Methods(activations="lsq_plus")
    torch.manual_seed(0)
    tuned = prepare(
        NETS[net]().train(), plan, example_inputs=signed[0][:1], calibration=[signed[1][0]], methods=methods
    )
    for _ in train(tuned, signed, LoopConfig(epochs=2, rate=5e-3, settle=0.5, free_inputs=free_inputs)):
        pass
    small = tuned.eval().finalize()
    first, *others = small.activations.values()
    assert (first.zero_point is None) == (computes == "float")
    assert all(grid.zero_point is not None for grid in others)
    built = build(small)
    assert [layer.compute for layer in built.report.layers] == [computes] + ["int8"] * 3
    x = signed[0][0]
    wanted, _ = in_float64(tuned, x)
    (got,) = outputs_of(built.data, [{small.program.input_names[0]: x.numpy()}], "deployed").values()
    noise, signal = np.square(got - wanted).sum(1), np.square(wanted).sum(1)
    assert np.median(10 * np.log10(signal / np.maximum(noise, 1e-20 * signal))) >= 60
