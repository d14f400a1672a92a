"""Trains ResNet-20 with 2-bit weights by coremltools' DKMPalettizer and by Brevitas, to compare with finetune.py.

    python benchmarks/qat_peers.py --data DIR --json FILE [--tools brevitas …] [--epochs 6] [--seed 0]

The net, the 10,000 images, their changes (`flip,crop:2`), the teacher with its temperature, the optimizer, schedule,
warm-up and batch size are those of finetune.py's rows; all layers have 2 bits. Each tool gets the best of three
learning rates, found with one epoch each, and then one run. Accuracy is that of the finalized net in torch on 5,000
test images: neither tool writes a file with packed 2-bit codes for onnxruntime.

coremltools: DKMPalettizer with its defaults, on every layer from the first step. Brevitas: QuantConv2d and QuantLinear
with learned scales per channel that start from statistics (`parameter_from_stats`).
"""

import argparse
import copy
import itertools
import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from _common import quiet
from _training import Shuffled, Task, tensors
from torch import Tensor, nn
from training import resnet20

from qcompress.data.augment import Share, parse_augment
from qcompress.finetune.config import LoopConfig
from qcompress.finetune.losses import distillation
from qcompress.plan.training import Training

RATES = (5e-4, 2e-3, 8e-3)
BITS = 2
SETTINGS = Training.defaults()


@dataclass(frozen=True)
class Result:
    """A trained net.

    Args:
        tool: which tool.
        epochs: passes over the training images.
        rate: highest learning rate.
        seed: of the batches.
        top1: accuracy of the finalized net, in torch.
        cpu_s: CPU seconds of training.
    """

    tool: str
    epochs: int
    rate: float
    seed: int
    top1: float
    cpu_s: float


@dataclass(frozen=True)
class Trained:
    """A net that a tool has prepared.

    Args:
        net: what is trained.
        step: called after each step of the optimizer.
        finalize: returns the net that is deployed.
    """

    net: nn.Module
    step: Callable[[], Any]
    finalize: Callable[[], nn.Module]


def coreml(net: nn.Module) -> Trained:
    """Return the net in coremltools' DKMPalettizer."""
    from coremltools.optimize.torch.palettization import (
        DKMPalettizer,
        DKMPalettizerConfig,
        ModuleDKMPalettizerConfig,
    )

    own = ModuleDKMPalettizerConfig(n_bits=BITS, weight_threshold=0, milestone=0)
    palettizer = DKMPalettizer(net, DKMPalettizerConfig(global_config=own))
    net = palettizer.prepare()
    return Trained(net, palettizer.step, lambda: palettizer.finalize(inplace=False))


def brevitas(net: nn.Module) -> Trained:
    """Return the net with Brevitas' layers."""
    from brevitas.nn import QuantConv2d, QuantLinear
    from brevitas.quant import Int8WeightPerChannelFloat

    options = {"weight_quant": Int8WeightPerChannelFloat, "weight_bit_width": BITS,
               "weight_scaling_impl_type": "parameter_from_stats"}  # fmt: skip
    for name, layer in list(net.named_modules()):
        if isinstance(layer, nn.Conv2d):
            new: nn.Module = QuantConv2d(
                layer.in_channels, layer.out_channels, layer.kernel_size, stride=layer.stride, padding=layer.padding,
                groups=layer.groups, bias=layer.bias is not None, **options,
            )  # fmt: skip
        elif isinstance(layer, nn.Linear):
            new = QuantLinear(layer.in_features, layer.out_features, bias=layer.bias is not None, **options)
        else:
            continue
        new.load_state_dict(layer.state_dict(), strict=False)
        home, _, attribute = name.rpartition(".")
        setattr(net.get_submodule(home), attribute, new)
    return Trained(net, lambda: None, lambda: net)


TOOLS = {"coremltools": coreml, "brevitas": brevitas}


def main() -> None:
    """Measure what is missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--tools", nargs="*", choices=TOOLS, default=list(TOOLS))
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    results = [Result(**entry) for entry in json.loads(args.json.read_text())] if args.json.exists() else []

    def measured(tool: str, epochs: int, rate: float) -> Result:
        for result in results:
            if (result.tool, result.epochs, result.rate, result.seed) == (tool, epochs, rate, args.seed):
                return result
        results.append(trained(resnet20(args.data, epochs), tool, rate, args.seed))
        args.json.write_text(json.dumps([asdict(result) for result in results], indent=1) + "\n")
        return results[-1]

    print("tool         epochs    rate    top-1  CPU min")
    for tool in args.tools:
        tried = [measured(tool, 1, rate) for rate in RATES]
        best = max(tried, key=lambda result: result.top1)
        for r in (*tried, measured(tool, args.epochs, best.rate)):
            print(f"{r.tool:12} {r.epochs:6} {r.rate:7g} {r.top1:8.2%} {r.cpu_s / 60:8.1f}", flush=True)


def trained(task: Task, tool: str, rate: float, seed: int) -> Result:
    """Train the net with a tool, and measure it."""
    torch.manual_seed(seed)
    start = time.process_time()
    with quiet():
        made = TOOLS[tool](copy.deepcopy(task.module))
    batches, augment = Shuffled(task.training, seed=seed, size=SETTINGS.batch_size), parse_augment("flip,crop:2")
    config = LoopConfig(epochs=task.epochs, rate=rate, warm_up=SETTINGS.warm_up)
    total, done = task.epochs * len(batches), itertools.count(1)
    optimizer = torch.optim.AdamW(made.net.parameters(), lr=rate, weight_decay=SETTINGS.weight_decay)
    assert task.teacher is not None
    made.net.train()
    for _ in range(task.epochs):
        for x, _ in batches:
            i = next(done)
            optimizer.param_groups[0]["lr"] = rate * config.share_of_rate(i / (total + 1))
            x = augment({"x": x}, Share(len(x), 0, len(x)), (seed, i))["x"]
            with torch.no_grad():
                wanted = task.teacher(x)
            optimizer.zero_grad()
            distillation(made.net(x), wanted, SETTINGS.temperature).backward()
            optimizer.step()
            made.step()
    made.net.eval()
    seconds = time.process_time() - start
    return Result(tool, task.epochs, rate, seed, top1(made.finalize().eval(), task), seconds)


@torch.no_grad()
def top1(net: nn.Module, task: Task) -> float:
    """Return the share of test images whose largest output is their label."""
    x, y = tensors(task.test)
    found: Tensor = torch.cat([net(part).argmax(1) for part in x.split(500)])
    return float((found == y).double().mean())


if __name__ == "__main__":
    main()
