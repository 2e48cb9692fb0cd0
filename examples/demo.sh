#!/usr/bin/env bash
# Inspect, convert and verify a real Quark export, in a temporary folder.
set -euo pipefail
cd "$(dirname "$0")"

model=qwen3_moe-quark0.13-f2f
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

show() {
    printf '\n\033[1;34m$ %s\033[0m\n' "$*"
    "$@"
}

show quarkconv inspect "$model"
show quarkconv convert "$model" --to fused-int8 --out "$work/$model-fused-int8"
show quarkconv verify "$work/$model-fused-int8" --source "$model"
