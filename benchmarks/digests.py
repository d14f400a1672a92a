"""Computes digests of exported files, to show that a change of the code does not change their bytes.

    python benchmarks/digests.py --data DIR --folders DIR --train                 # once: train the models
    python benchmarks/digests.py --data DIR --folders DIR --json before.json      # before the change
    python benchmarks/digests.py --data DIR --folders DIR --against before.json   # after it: 1 if any file differs

`--data` holds the nets and images that `_nets.py` names. `--folders` holds trained models, because training does not
give the same bits on every machine: the weights of the digits sample, and models trained with LSQ+ and N2UQ.

Every file is built in memory for an explicit target, so a new default target has no effect here. Each file has two
digests. `sha256` covers the whole file. `graph` excludes the file's metadata (version, target, digests of the plan and
of the grids): if only `sha256` differs, the weights and the graph are the same. The metadata changes with the version
of qcompress, with a new plan field that the plan's digest covers, and with the way that a grid's digest is computed.

The script imports public names only, so it runs before and after modules move. It uses one thread, so that sums in
calibration and solving do not depend on the number of cores.
"""

import argparse
import hashlib
import importlib.util
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"

import numpy as np
import onnx
import torch
from safetensors.torch import load_file, save_file

import qcompress as qc
from qcompress_exporters import build

SAMPLE = Path(__file__).resolve().parents[1] / "samples" / "digits"
DIGITS_WEIGHTS = "digits.safetensors"
NATIVE, UINT8 = "onnxruntime==1.24", "onnxruntime==1.18"  # with UINT4 and UINT2; without them
FORMATS = ("qdq", "integer")


@dataclass(frozen=True)
class Case:
    """One compressed model and the files that are built from it.

    Args:
        name: prefix of the names of its files.
        flags: arguments of `Plan.from_flags`.
        options: further arguments of `compress`.
        formats: formats of int8 compute; None for other compute.
        targets: targets of the files.
        leftovers: type of the tensors that stay float.
    """

    name: str
    flags: Mapping[str, Any]
    options: Mapping[str, Any] = field(default_factory=lambda: {"effort": "fast"})
    formats: tuple[str | None, ...] = (None,)
    targets: tuple[str, ...] = (NATIVE,)
    leftovers: str = "float32"


@dataclass(frozen=True)
class Net:
    """A float net with calibration images.

    Args:
        module: the net.
        images: the images, transformed to inputs of the net.
        input_name: name of the net's only input.
    """

    module: torch.nn.Module
    images: np.ndarray
    input_name: str


FAST = tuple(Case(f"fast w{bits}", {"bits": bits}, targets=(NATIVE, UINT8)) for bits in range(1, 9))
INT8 = tuple(
    Case(f"fast w{bits}a8", {"bits": bits, "activation_bits": 8}, {"effort": "fast", "calibration": True}, FORMATS)
    for bits in (8, 2)
)
BALANCED = Case("balanced w2", {"bits": 2}, {"effort": "balanced", "calibration": True})
# The other plan fields and kinds of compute, on the digits net because it is cheap.
FIELDS = (
    Case("balanced w2, synthesised inputs", {"bits": 2}, {"effort": "balanced"}),
    Case("fast w4 uniform", {"bits": 4, "scheme": "uniform"}),
    Case("fast w2 uniform", {"bits": 2, "scheme": "uniform"}),
    Case("fast w4 auto", {"bits": 4, "scheme": "auto"}),
    Case("fast w3, 16 rows per palette", {"bits": 3, "rows_per_lut": 16}),
    Case("fast w4, 2 weights per code", {"bits": 4, "vector_dim": 2}),
    Case("fast w4, float16 palettes", {"bits": 4, "lut_dtype": "float16"}),
    Case("fast w4, float16 leftovers", {"bits": 4}, leftovers="float16"),
    Case("fast w4 uniform, blocks of 32", {"bits": 4, "scheme": "uniform", "block_size": 32}),
    Case("fast w8 dynamic8", {"bits": 8, "scheme": "uniform"}, {"effort": "fast", "compute": "dynamic8"}),
    Case(
        "fast w4a4 uniform", {"bits": 4, "activation_bits": 4, "scheme": "uniform"},
        {"effort": "fast", "calibration": True}, FORMATS,
    ),
    Case(
        "balanced w4a8, reduced range", {"bits": 4, "activation_bits": 8},
        {"effort": "balanced", "calibration": True, "reduce_range": True},
    ),
    Case(
        "fast w2a8, placement paper", {"bits": 2, "activation_bits": 8},
        {"effort": "fast", "calibration": True, "placement": "paper"}, FORMATS,
    ),
)  # fmt: skip
CASES = {
    "digits": (*FAST, *INT8, BALANCED, *FIELDS),
    "resnet20": (*FAST, *INT8, BALANCED),
    "mobilenet": (*FAST, *INT8, BALANCED),
}
# Models that are trained once: bits, methods, and the learning rate of the quantizers relative to the net's.
TRAINED: dict[str, tuple[dict[str, int], dict[str, Any], float]] = {
    "lsq_plus_w4a4": ({"bits": 4, "activation_bits": 4}, {"weights": "lsq_plus", "activations": "lsq_plus"}, 1.0),
    "lsq_plus_w2a2": ({"bits": 2, "activation_bits": 2}, {"weights": "lsq_plus", "activations": "lsq_plus"}, 1.0),
    "lsq_plus_w2": ({"bits": 2}, {"weights": "lsq_plus"}, 1.0),
    "n2uq_w2a2": ({"bits": 2, "activation_bits": 2}, {"weights": "n2uq", "activations": "n2uq"}, 0.1),
    "n2uq_w2": ({"bits": 2}, {"weights": "n2uq"}, 1.0),
}


def main() -> int:
    """Run the cases; return 1 if a digest differs from those of `--against`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--folders", type=Path, required=True)
    parser.add_argument("--train", action="store_true", help="train the models, save them in --folders, and stop")
    parser.add_argument("--nets", nargs="+", choices=[*CASES, "trained"], default=[*CASES, "trained"])
    parser.add_argument("--only", default="", help="run the cases whose name contains this text")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--against", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.train:
        train(args.folders)
        return 0
    before = json.loads(args.against.read_text()) if args.against else {}
    found, differ = {}, 0
    for name, data in files(args):
        found[name] = digests(data)
        verdict = compared(before.get(name), found[name]) if args.against else ""
        differ += verdict not in ("", "equal", "new")
        print(f"{name:60} {len(data):>10,} B {found[name]['sha256'][:12]} {verdict}", flush=True)
        if args.json:
            args.json.write_text(json.dumps(found, indent=1) + "\n")
    if args.against:
        print(f"{len(found)} files, {differ} differ; CPU {time.process_time():.0f} s")
    return int(differ > 0)


def files(args: argparse.Namespace) -> Iterator[tuple[str, bytes]]:
    """Yield the name and content of each selected file."""
    for name in args.nets:
        if name == "trained":
            for folder in TRAINED:
                if args.only in (case := f"trained {folder}"):
                    yield from exports(case, qc.CompressedModel.load(args.folders / folder), Case("", {}, {}, FORMATS))
            continue
        net = opened(name, args)
        for case in CASES[name]:
            if args.only in f"{name} {case.name}":
                yield from exports(f"{name} {case.name}", compressed(net, case), case)


def exports(name: str, small: qc.CompressedModel, case: Case) -> Iterator[tuple[str, bytes]]:
    """Yield the files of one compressed model."""
    for target in case.targets:
        for format in case.formats if small.compute == "int8" else (None,):
            built = build(small, target=target, format=format, float_leftovers=case.leftovers)
            yield " ".join([name, *([format] if format else []), target.removeprefix("onnxruntime==")]), built.data


def compressed(net: Net, case: Case) -> qc.CompressedModel:
    """Compress a net as `qcompress export` does."""
    options = dict(case.options)
    if options.pop("calibration", False):
        options["calibration"] = qc.Dataset(inputs={net.input_name: net.images}, name="images")
    example = (torch.from_numpy(net.images[:1]),)
    return qc.compress(net.module, qc.Plan.from_flags(**case.flags), example_inputs=example, **options)


def digests(data: bytes) -> dict[str, Any]:
    """Return the digests of a file with and without its metadata, and its size."""
    model = onnx.load_from_string(data)
    del model.metadata_props[:]
    graph = model.SerializeToString(deterministic=True)
    return {
        "sha256": hashlib.sha256(data).hexdigest(),
        "graph": hashlib.sha256(graph).hexdigest(),
        "bytes": len(data),
    }


def compared(before: dict[str, Any] | None, after: dict[str, Any]) -> str:
    """Return how a file differs from its earlier version."""
    if before is None:
        return "new"
    if before == after:
        return "equal"
    if before["graph"] == after["graph"]:
        return "METADATA DIFFERS"
    return f"DIFFERS ({after['bytes'] - before['bytes']:+,} B)"


def opened(name: str, args: argparse.Namespace) -> Net:
    """Open a net with its weights and images."""
    if name == "digits":
        net = digits_net(args.folders)
        return Net(net, digits_images()[0].numpy()[:256], "image")
    file, architecture, weights, images, key, samples = {
        "resnet20": (
            "resnet_cifar.py", "ResNetCifar", "resnet20_cifar10jpeg_ft.safetensors",
            "cifar10jpeg_small.npz", "train_x", 128,
        ),
        "mobilenet": (
            "mobilenet_v1.py", "MobileNetV1", "mobilenet_v1_075_imagenet.safetensors",
            "imagenet1k_sample_part0.npz", "x", 16,
        ),
    }[name]  # fmt: skip
    source = module_of(args.data / file)
    net = getattr(source, architecture)()
    net.load_state_dict(load_file(args.data / weights))
    with np.load(args.data / images) as arrays:
        raw = arrays[key][:samples]
    return Net(net.eval(), source.preprocess(raw).contiguous().numpy(), "x")


def digits_net(folders: Path) -> torch.nn.Module:
    """Return the net of the digits sample with the saved weights."""
    net = module_of(SAMPLE / "net.py").DigitsNet()
    net.load_state_dict(load_file(folders / DIGITS_WEIGHTS))
    return net.eval()


def digits_images() -> tuple[torch.Tensor, torch.Tensor]:
    """Return scikit-learn's digits in their original order, and their labels."""
    from sklearn.datasets import load_digits

    pixels, labels = load_digits(return_X_y=True)
    return torch.from_numpy((pixels / 16).astype(np.float32).reshape(-1, 1, 8, 8)), torch.from_numpy(labels)


def module_of(path: Path) -> Any:
    """Import a Python file as a module."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def train(folders: Path) -> None:
    """Train the digits sample, then train each model of TRAINED from it for three epochs, and save all."""
    folders.mkdir(parents=True, exist_ok=True)
    subprocess.run([sys.executable, SAMPLE / "train.py", "--out", folders / "sample"], check=True)
    save_file(torch.load(folders / "sample" / "state.pt", weights_only=True), folders / DIGITS_WEIGHTS)
    x, y = digits_images()
    for name, (bits, methods, quantizer_rate) in TRAINED.items():
        torch.manual_seed(0)
        tuned = qc.prepare(
            digits_net(folders), qc.Plan.from_flags(**bits), example_inputs=(x[:64],), calibration=[x[64:256]],
            methods=qc.finetune.Methods(**methods),
        )  # fmt: skip
        batches = list(zip(x.split(64), y.split(64), strict=True))
        config = qc.finetune.LoopConfig(epochs=3, quantizer_rate=quantizer_rate)
        *_, last = qc.finetune.train(tuned, batches, config)
        tuned.finalize().save(folders / name)
        print(f"{name}: {last}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
