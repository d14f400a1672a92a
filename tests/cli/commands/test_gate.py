import json
import os

import pytest

from qcompress_exporters.onnx_format import metadata


def test_ok_and_fail(qcompress, onnx_file):
    path = onnx_file(original_bytes=100_000)
    nbytes = path.stat().st_size
    kept = qcompress("gate", path, "--max-size", nbytes, "--min-ratio", "8")
    assert (kept.exit_code, kept.stderr) == (0, "")
    assert "all 2 checks passed" in kept.stdout
    broken = qcompress("gate", path, "--max-size", nbytes - 1, "--min-ratio", "8")
    assert broken.exit_code == 1
    assert "FAIL" in broken.stdout
    assert "1 of 2 checks failed" in broken.stdout
    assert f"≤ {nbytes - 1} B" in broken.stdout


def test_limits_and_files_from_the_config_and_flags_win(qcompress, onnx_file, folder):
    onnx_file("dist/a.onnx")
    onnx_file("dist/b.onnx")
    (folder / "qcompress.toml").write_text('[gate]\nmax_size = "1 B"\nfiles = ["dist/*.onnx"]\n')
    assert qcompress("gate").exit_code == 1
    result = qcompress("gate", "--max-size", "1 MiB", "--json")
    assert result.exit_code == 0
    assert [v["file"] for v in json.loads(result.stdout)["verdicts"]] == ["dist/a.onnx", "dist/b.onnx"]
    (folder / "qcompress.toml").unlink()
    (folder / "pyproject.toml").write_text('[tool.qcompress.gate]\nmax_size = 5\nfiles = "dist/a.onnx"\n')
    assert qcompress("gate").exit_code == 1
    (folder / "ci.toml").write_text('[gate]\nmax_size = "1MB"\n')
    assert qcompress("gate", "dist/*.onnx", "dist/a.onnx", "--config", "ci.toml").exit_code == 0


def test_a_file_on_the_command_line_is_judged_alone_by_the_limits_of_the_config(qcompress, onnx_file, folder, refused):
    onnx_file("small.onnx")
    onnx_file("large.onnx", count=1000)
    (folder / "qcompress.toml").write_text('[gate]\nmax_size = "1 kB"\nfiles = ["small.onnx"]\n')
    assert qcompress("gate").exit_code == 0
    result = qcompress("gate", "large.onnx", "--json")
    assert result.exit_code == 1
    assert [v["file"] for v in json.loads(result.stdout)["verdicts"]] == ["large.onnx"]
    (folder / "qcompress.toml").write_text('[gate]\nmax_size = "1 kB"\nfiles = [3]\n')
    assert "files must be a list of files" in refused("gate", "large.onnx")


def test_pipes_are_refused_at_once(refused, onnx_file, folder):
    path = onnx_file(original_bytes=100)
    os.mkfifo(folder / "pipe")
    os.mkfifo(metadata.validation_path(path))
    for args in (("pipe",), ("/dev/zero",), (path, "--config", "pipe"), (path, "--min-agreement", "1%")):
        assert "a pipe, a device or a socket" in refused("gate", *args, "--max-size", "1 kB")


def test_a_number_of_thousands_of_digits(refused, onnx_file):
    path = onnx_file(original_bytes="9" * 5000)
    message = refused("gate", path, "--min-ratio", "2")
    assert "qcompress.original_bytes must be a number of bytes, got '999" in message
    assert len(message) < 300


def test_globs(qcompress, onnx_file, refused):
    onnx_file("dist/deep/a.onnx")
    onnx_file("b[1].onnx")
    result = qcompress("gate", "dist/**/*.onnx", "b[1].onnx", "--max-size", "1MB", "--json")
    assert [v["file"] for v in json.loads(result.stdout)["verdicts"]] == ["dist/deep/a.onnx", "b[1].onnx"]
    assert refused("gate", "none/*.onnx", "--max-size", "1MB").startswith("gate: no file matches none/*.onnx; ")


def test_one_of_our_files_that_did_not_shrink_fails_by_itself(qcompress, onnx_file):
    result = qcompress("gate", onnx_file(original_bytes=10), "--max-size", "1MB")
    assert result.exit_code == 1
    assert "net.onnx: smaller_than_original: the file did not shrink" in result.stdout


def test_original_overrides_and_serves_other_peoples_files(qcompress, onnx_file, refused, folder):
    path = onnx_file()
    message = refused("gate", path, "--min-ratio", "2")
    assert message.endswith("; add --original FILE.\n")
    (folder / "model.pt").write_bytes(b"x" * 100_000)
    result = qcompress("gate", path, "--min-ratio", "2", "--original", "model.pt", "--json")
    assert result.exit_code == 0
    assert json.loads(result.stdout)["verdicts"][0]["measured"] == 100_000 / path.stat().st_size
    assert refused("gate", path, "--min-ratio", "2", "--original", "no.pt") == (
        "--original no.pt: there is no such file.\n"
    )


def test_weights_beside_the_file_count(qcompress, onnx_file, refused, folder):
    path = onnx_file(count=50_000, external=True)
    assert path.stat().st_size < 10_000
    assert qcompress("gate", path, "--max-size", "100kB").exit_code == 1
    assert qcompress("gate", path, "--max-size", "300kB").exit_code == 0
    original = ("--original", path)
    assert qcompress("gate", onnx_file("small.onnx"), "--min-ratio", "100", *original).exit_code == 0
    (folder / "weights.bin").unlink()
    assert refused("gate", path, "--max-size", "1MB").endswith("weights.bin, but there is no such file.\n")


def test_accuracy_limits(qcompress, onnx_file, validated):
    path = validated(onnx_file(original_bytes=100_000), drop=0.86 - 0.85)
    kept = qcompress("gate", path, "--max-drop", "1%", "--min-agreement", "98%")
    assert kept.exit_code == 0
    assert "net.onnx: max_drop: not decidable with 250 samples: the 95 % interval of the drop is [-0.2 %, 1.4 %]" in (
        kept.stdout
    )
    assert qcompress("gate", path, "--max-drop", "0.5%").exit_code == 1
    assert qcompress("gate", path, "--min-agreement", "0.99").exit_code == 1


def test_a_missing_measurement_names_what_to_run(refused, onnx_file, validated):
    path = onnx_file(original_bytes=100_000)
    assert f"its validation is missing; run `qcompress validate MODEL {path} --data" in refused(
        "gate", path, "--max-drop", "0.01"
    )
    validated(path, metric=None, agreement=None)
    assert "has no metric (there were no labels)" in refused("gate", path, "--max-drop", "0.01")
    assert "has no agreement" in refused("gate", path, "--min-agreement", "0.9")


def test_a_measurement_of_another_file(refused, onnx_file, validated):
    path = validated(onnx_file(original_bytes=100_000), digest="another")
    assert "was measured on another file" in refused("gate", path, "--max-drop", "0.01")
    metadata.validation_path(path).write_text("not json")
    assert "is not a validation of qcompress" in refused("gate", path, "--max-drop", "0.01")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ((), "gate has no limit to check; add --max-size"),
        (("--max-size", "15Mb"), "Invalid value for '--max-size': The unit of '15Mb' reads as bits"),
        (("--min-ratio", "-1"), "Invalid value for '--min-ratio': must be more than 0"),
        (("--min-agreement", "98"), "Invalid value for '--min-agreement': must be a fraction"),
        (("--max-drop", "much"), "Invalid value for '--max-drop': must be a number"),
        (("--config", "no.toml"), "no.toml cannot be read: No such file"),
    ],
)
def test_wrong_usage(flags, message, refused, onnx_file):
    assert refused("gate", onnx_file(), *flags).startswith(message)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ("[gate]\nmax-size = 3", "gate in qcompress.toml: unknown key 'max-size'. Did you mean max_size?"),
        ("[gate]\nfile = 'x'\nmax_size = 3", "gate in qcompress.toml: unknown key 'file'. Did you mean files?"),
        ("[gate]\nfiles = 3\nmax_size = 3", "gate in qcompress.toml: files must be a list of files or globs, got 3."),
        ("[gate]\nmax_size = '3Mb'", "gate in qcompress.toml: max_size: The unit of '3Mb' reads as bits"),
        ("[gate]\nmax_size = 3", "gate needs at least one file"),
        ("[gate", "qcompress.toml is not valid TOML: "),
        ("gate = 3", "qcompress.toml: gate must be a valid dictionary, got 3."),
    ],
)
def test_wrong_config(config, message, refused, folder):
    (folder / "qcompress.toml").write_text(config)
    assert refused("gate").startswith(message)


def test_what_is_no_model(refused, folder):
    (folder / "net.onnx").write_text("hello")
    assert refused("gate", "net.onnx", "--max-size", "1MB") == "net.onnx is not an ONNX model.\n"
    assert refused("gate", "none.onnx", "--max-size", "1MB") == (
        "none.onnx cannot be read: No such file or directory.\n"
    )
    assert refused("gate", folder, "--max-size", "1MB").endswith("cannot be read: Is a directory.\n")


def test_a_near_miss_shows_enough_digits(qcompress, onnx_file):
    path = onnx_file(original_bytes=100_000)
    ratio = 100_000 / path.stat().st_size
    result = qcompress("gate", path, "--min-ratio", f"{ratio + 1e-6:.7f}")
    assert result.exit_code == 1
    (row,) = [line.split() for line in result.stdout.splitlines() if "min_ratio" in line]
    assert row[3] != row[4]


def test_what_is_no_number_fails_and_is_null_in_json(qcompress, onnx_file, validated):
    path = validated(onnx_file(original_bytes=100_000), drop=float("nan"), interval=None)
    result = qcompress("gate", path, "--max-drop", "0.01", "--json")
    assert result.exit_code == 1
    assert json.loads(result.stdout)["verdicts"][0]["measured"] is None
    assert "nan" in qcompress("gate", path, "--max-drop", "0.01").stdout


def test_a_file_that_validate_found_wrong_fails_under_any_limit(qcompress, onnx_file, validated):
    path = validated(onnx_file("net.onnx"), failed=("graph",))
    result = qcompress("gate", path, "--max-size", "1MB")
    assert result.exit_code == 1
    assert "validate found the file wrong: graph" in result.stdout


def test_a_file_measured_against_another_original_fails_under_any_limit(qcompress, onnx_file, validated):
    path = validated(onnx_file(), same_source=False)
    for limit in (("--max-size", "1MB"), ("--min-agreement", "50%")):
        result = qcompress("gate", path, *limit)
        assert result.exit_code == 1
        assert "same_source: validate compared it with another model than it was exported from; " in result.stdout
        assert "1 of 2 checks failed" in result.stdout
    assert qcompress("gate", validated(path, same_source=None), "--max-size", "1MB").exit_code == 0


def test_measurements_of_another_file_matter_to_accuracy_limits_alone(qcompress, onnx_file, validated):
    path = validated(onnx_file("net.onnx"), failed=("graph",), digest="other")
    assert qcompress("gate", path, "--max-size", "1MB").exit_code == 0
    assert qcompress("gate", path, "--min-agreement", "50%").exit_code == 2
