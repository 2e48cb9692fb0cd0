#!/usr/bin/env bash
# Inspect, convert and verify a real Quark export; then what quantization and two planted faults cost on real text.
set -euo pipefail
cd "$(dirname "$0")"

model=qwen3_moe-quark0.13-f2f
trained=tiny_moe/quark-ptpc_int8
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

show() {
    printf '\n\033[1;34m$ %s\033[0m\n' "$*"
    "$@"
}

fails() {  # a command that is expected to find something
    local status=0
    show "$@" || status=$?
    [ "$status" = 1 ] && printf '\033[2mexit code 1, as expected\033[0m\n'
}

evaluate=(--unquantized "$work/bf16" --text tiny_moe/heldout.txt --window 256 --windows 16 --no-resume)

show quarkconv inspect "$model"
show quarkconv convert "$model" --to fused-int8 --out "$work/$model-fused-int8"
show quarkconv verify "$work/$model-fused-int8" --source "$model"

# A trained model. Its weights in floats, as `bf16` writes them, are what INT8 is compared with.
show quarkconv convert "$trained" --to bf16 --out "$work/bf16"
show quarkconv convert "$trained" --to fused-int8 --out "$work/sound"
show quarkconv evaluate "$work/sound" "${evaluate[@]}"

# One expert's scales move by a row: perplexity hardly moves, KL divergence and the layer's own error do.
show python plant_fault.py scales "$work/sound" "$work/shifted-scales"
fails quarkconv verify "$work/shifted-scales" --bytes-only
fails quarkconv evaluate "$work/shifted-scales" "${evaluate[@]}" --max-kl 0.01

# Its codes move by a row: the model is ruined.
show python plant_fault.py codes "$work/sound" "$work/shifted-codes"
fails quarkconv verify "$work/shifted-codes" --bytes-only
fails quarkconv evaluate "$work/shifted-codes" "${evaluate[@]}" --max-kl 0.01
