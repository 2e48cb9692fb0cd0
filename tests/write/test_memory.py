"""Memory: that of the buffers, whatever the size of the model."""

from __future__ import annotations

from pathlib import Path

from safetensors import safe_open
from support.checkpoints import make_checkpoint
from support.program import PROCESS_TIMEOUT, start

PEAK = """
import sys
from quarkconv.convert.convert import convert_checkpoint
convert_checkpoint(sys.argv[1], "fused-int8", sys.argv[2], jobs=1)
print(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")))
"""


def test_memory_does_not_grow_with_the_model(tmp_path: Path) -> None:
    peaks, sizes = [], []
    for layers in (2, 8):
        model = make_checkpoint(tmp_path / f"model-{layers}", layers=layers, experts=8, hidden=768, intermediate=384)
        sizes.append(sum(file.stat().st_size for file in model.glob("*.safetensors")))
        process = start(PEAK, model, tmp_path / f"out-{layers}")
        text, err = process.communicate(timeout=PROCESS_TIMEOUT)
        assert process.returncode == 0, err
        peaks.append(int(text) * 1024)
        with safe_open(tmp_path / f"out-{layers}" / "model-00001-of-00001.safetensors", "pt") as handle:
            assert handle.get_slice("model.layers.1.mlp.experts.gate_up_proj").get_shape() == [8, 768, 768]
    assert sizes[1] - sizes[0] > 50e6
    assert peaks[1] - peaks[0] < 5e6  # a tenth of what the model grew by: headers and the manifest
    assert peaks[1] < 160e6
