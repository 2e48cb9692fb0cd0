"""What INT8 and two planted faults cost the example model: the figures of README.md and docs/evaluation.md.

    python benchmarks/evaluate_tiny.py UNQUANTIZED

UNQUANTIZED is what `examples/tiny_moe/train.py` wrote. Writes benchmarks/results/evaluate-tiny.json.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))

import torch
import transformers
from common import save
from plant_fault import SUFFIXES, shift_rows

import quarkconv

EXAMPLE = Path(__file__).resolve().parents[1] / "examples" / "tiny_moe"
LAYER = EXPERT = 0
"""Where the faults are planted, as in the demo."""


def figures(model: Path, unquantized: Path) -> dict[str, Any]:
    """An evaluation on the held-out text, without what differs from machine to machine or is long."""
    found = quarkconv.evaluate_checkpoint(
        model, unquantized, text=EXAMPLE / "heldout.txt", window=256, device="cpu", resume=False
    ).to_json()
    kept = ("windows", "window", "scored_tokens", "perplexity", "kl", "agreement", "rms_dp", "dequantized", "worst")
    layers = [{key: layer[key] for key in ("index", "own", "drift", "routing_changed")} for layer in found["layers"]]
    return {**{key: found[key] for key in kept}, "layers": layers}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("unquantized", type=Path)
    options = parser.parse_args()
    result: dict[str, Any] = {"sound": figures(EXAMPLE / "quark-ptpc_int8", options.unquantized)}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        fused = quarkconv.convert_checkpoint(EXAMPLE / "quark-ptpc_int8", "fused-int8", folder / "fused").output
        for what in SUFFIXES:
            shift_rows(what, fused, folder / what, LAYER, EXPERT)
            result[f"shifted {what}"] = figures(folder / what, options.unquantized)
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    save("evaluate-tiny", {"versions": versions, "fault": {"layer": LAYER, "expert": EXPERT}, **result})
    for name, found in result.items():
        print(f"{name}: perplexity {found['perplexity']['int8']['value']:.4f}, KL {found['kl']['mean']:.5f}")


if __name__ == "__main__":
    main()
