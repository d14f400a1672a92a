#!/usr/bin/env bash
# Usage: demo.sh FOLDER. Trains the sample in FOLDER and runs all commands on it, from `analyze` to `gate`.
set -euo pipefail

sample=$(cd "$(dirname "$0")" && pwd)
mkdir -p "$1"
cd "$1"

run() {
    printf '\n$ %s\n' "$*"
    "$@"
}

run python "$sample/train.py"

run qcompress analyze model.pt
run qcompress export model.pt --bits 2
run qcompress validate model.pt model.w2.onnx --data test.npz
run qcompress gate model.w2.onnx --max-size 60kB --min-ratio 10 --max-drop 8% --min-agreement 90%

printf '\nThe same commands with a qcompress.toml instead of options:\n'
mkdir -p configured
cp model.pt calibration.npz test.npz "$sample/qcompress.toml" configured/
cd configured
run cat qcompress.toml
run qcompress export --bits 2
run qcompress validate model.pt model.w2.onnx
run qcompress gate model.w2.onnx
