"""Convert a real Quark export, verify it, and read the proof layer by layer.

    python examples/prove_it.py [MODEL] [UNQUANTIZED]

MODEL defaults to the export beside this file. UNQUANTIZED, if given, is the model before quantization.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import quarkconv

HERE = Path(__file__).resolve().parent


def main(model: str, unquantized: str | None = None) -> None:
    # 1. Inspect. Headers only; from the Hub, a few MB.
    inspection = quarkconv.inspect_checkpoint(model)
    print(f"{model}: {inspection.scheme}, {len(inspection.description.moe_layers)} MoE layers")
    for finding in inspection.findings:
        print(f"  {finding.severity}: {finding.message}")

    with tempfile.TemporaryDirectory() as folder:
        # 2. Convert. The plan is pure data: look at it before anything is written.
        plan = quarkconv.plan_conversion(model, "fused-int8")
        print(f"plan: {sum(len(shard.tensors) for shard in plan.shards)} tensors, {plan.output_bytes:,} bytes")
        result = quarkconv.convert_checkpoint(model, "fused-int8", Path(folder) / "converted")

        # 3. Verify: every byte against manifest and source, and the numbers of each layer.
        verification = quarkconv.verify_checkpoint(
            result.output, source=result.source, unquantized=unquantized, tokens=[16, 256]
        )

    # 4. Read the proof: "exact" shows whether the kernel is right, "dequantized" what 8-bit activations cost.
    print("verified" if verification.ok else f"{len(verification.problems)} problems")
    for problem in verification.problems:
        print(f"  {problem.stage}: {problem.tensor}: {problem.message}")
    for layer in verification.numbers.layers:
        print(
            f"  layer {layer.layer}, {layer.tokens:3} tokens: {layer.exact.relative_error:.1e} from exact arithmetic, "
            f"{layer.dequantized.relative_error:.2%} from the dequantized model"
        )
    for number, _, role, expert, error in verification.numbers.worst(3):
        print(
            f"  furthest from the unquantized model: layer {number} expert {expert} {role}, {error.relative_error:.2%}"
        )


if __name__ == "__main__":
    arguments = sys.argv[1:] or [str(HERE / "qwen3_moe-quark0.13-f2f")]
    main(*arguments[:2])
