#!/usr/bin/env bash
# Usage: run.sh FOLDER. Trains the digits net in FOLDER, fine-tunes it, exports it and validates the file.
set -euo pipefail

sample=$(cd "$(dirname "$0")" && pwd)
mkdir -p "$1"
cd "$1"

run() {
    printf '\n$ %s\n' "$*"
    "$@"
}

[ -f model.pt ] || run python "$sample/../digits/train.py"
run qcompress finetune state.pt --arch "$sample/../digits/net.py:DigitsNet" --data "$sample/data.py:training" \
    --val test.npz --bits 2 --activation-bits 4 --ends 8 --kd-weight 0.5 --augment crop:1 --epochs 3 -o ckpt --resume
run qcompress export ckpt -o digits.onnx --force
run qcompress validate ckpt digits.onnx --data test.npz --no-timing
