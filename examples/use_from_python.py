"""The three commands from Python: inspect a Quark export, convert it, verify the result.

Usage: python examples/use_from_python.py [MODEL]
"""

import sys
import tempfile
from pathlib import Path

import quarkconv

model = sys.argv[1] if len(sys.argv) > 1 else str(Path(__file__).parent / "qwen3_moe-quark0.13-f2f")

inspection = quarkconv.inspect_checkpoint(model)
print(f"scheme: {inspection.scheme}")
for finding in inspection.findings:
    print(f"{finding.severity}: {finding.code}: {finding.message}")
if not inspection.targets["fused-int8"].supported:
    sys.exit(inspection.targets["fused-int8"].reason)

with tempfile.TemporaryDirectory() as folder:
    result = quarkconv.convert_checkpoint(model, "fused-int8", Path(folder) / "fused")
    print(f"wrote {result.plan.output_bytes:,} bytes to {result.output}")

    verification = quarkconv.verify_checkpoint(result.output, source=model)
    for layer in verification.numbers.layers:
        noise = layer.dequantized
        print(f"layer {layer.layer}: SNR {noise.snr_db:.1f} dB, relative error {noise.relative_error:.4f}")
    print("verified" if verification.ok else verification.problems)
