"""Public names are a promise, and importing them costs nothing."""

import importlib
import json
import subprocess
import sys

import pytest

import qcompress
import qcompress_exporters

CORE = [
    "CompressedModel", "Dataset", "FloatWeight", "IntegerWeight", "PalettizedWeight", "Plan", "QCompressError",
    "analyze", "compress", "load_data", "load_plan", "load_source", "prepare",
]  # fmt: skip
PACKAGES = ["finetune", "quantizers", "regularizers"]
FINETUNE = ["Inputs", "LoopConfig", "Methods", "Prepared", "StepRecord", "distillation", "prepare", "train"]
QUANTIZERS = [
    "AbstractQuantizer", "Bmpq", "Dkm", "DoReFa", "Ewgs", "Lsq", "LsqPlus", "Method", "N2uqActivation", "N2uqWeight",
    "Pact", "QUANTIZERS", "Ternary", "Tqt", "Way", "bmpq", "choose_form", "dkm", "dorefa_weight", "ewgs", "lsq",
    "lsq_plus", "n2uq_activation", "n2uq_weight", "pact", "ternary", "tqt", "way",
]  # fmt: skip
REGULARIZERS = [
    "BinRegularizer", "DistanceRegularizer", "KurtosisRegularizer", "RangeRegularizer", "bin_regularization", "kl",
    "kurtosis", "l2", "linf", "margin", "soft_min_max",
]  # fmt: skip
EXPORTERS = ["ExportReport", "ParityReport", "build", "export", "validate"]


@pytest.mark.parametrize(("package", "names"), [(qcompress, CORE), (qcompress_exporters, EXPORTERS)])
def test_public_names(package, names):
    packages = PACKAGES if package is qcompress else []
    assert sorted(package.__all__) == sorted(names + packages) == dir(package)
    for name in names:
        value = getattr(package, name)
        assert callable(value), f"{name} is a module: a submodule of that name hides it"
        assert value.__doc__
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        package.nothing  # noqa: B018


@pytest.mark.parametrize(
    ("package", "names"), [("finetune", FINETUNE), ("quantizers", QUANTIZERS), ("regularizers", REGULARIZERS)]
)
def test_public_packages(package, names):
    found = getattr(qcompress, package)
    assert sorted(found.__all__) == names
    for name in names:
        value = getattr(found, name)
        assert name in ("QUANTIZERS", "Inputs") or (callable(value) and value.__doc__)


def test_a_name_is_still_itself_after_its_neighbours_were_imported():
    for module in ("qcompress.analysis", "qcompress.posthoc.compress", "qcompress_exporters.onnx_format.file"):
        importlib.import_module(module)
    assert callable(qcompress.analyze)
    assert callable(qcompress.compress)
    assert callable(qcompress_exporters.export)
    for name in ("lsq", "lsq_plus", "pact", "ewgs", "tqt", "ternary", "bmpq"):
        importlib.import_module(f"qcompress.quantizers.{name}")
        assert callable(getattr(qcompress.quantizers, name))
    importlib.import_module("qcompress.regularizers.kurtosis")
    assert callable(qcompress.regularizers.kurtosis)


@pytest.mark.parametrize(
    ("code", "absent"),
    [
        ("import qcompress, qcompress_exporters, qcompress_cli", ["torch", "onnx", "numpy", "onnx_ir", "onnxscript"]),
        ("from qcompress import analyze, load_source, Plan, PalettizedWeight", ["torch", "onnx", "scipy", "sklearn"]),
        (
            "import qcompress.gate.verdicts, qcompress_exporters.onnx_format.metadata",
            ["torch", "onnx_ir", "onnxscript", "onnxruntime"],
        ),
        ("from qcompress import CompressedModel, load_data", ["torch", "onnx"]),
    ],
)
def test_lean_imports(code, absent):
    script = f"{code}\nimport json, sys; print(json.dumps(sorted(m for m in sys.modules if '.' not in m)))"
    out = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    assert not set(json.loads(out)) & set(absent)
