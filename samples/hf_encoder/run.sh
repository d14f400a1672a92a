#!/usr/bin/env bash
# Usage: run.sh FOLDER. Trains the encoder in FOLDER, fine-tunes it at 2 bits, exports it and validates the file.
set -euo pipefail

sample=$(cd "$(dirname "$0")" && pwd)
mkdir -p "$1"
cd "$1"

run() {
    printf '\n$ %s\n' "$*"
    "$@"
}

[ -f test.npz ] || run python "$sample/train.py"
run qcompress finetune model/model.safetensors --arch "$sample/encoder.py:encoder" --data train.npz --val test.npz \
    --dynamic input_ids:1=length --dynamic attention_mask:1=length --bits 2 --epochs 2 -o ckpt --resume
run qcompress export ckpt -o encoder.onnx --force
run qcompress validate ckpt encoder.onnx --data test.npz --no-timing
