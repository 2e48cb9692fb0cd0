"""The command that an unfinished conversion shows: run as printed, it finishes that conversion."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from support.checkpoints import load, make_checkpoint
from support.conversions import STAGING
from support.program import run_cli, snapshot
from support.progress import FullDisk

import quarkconv
from quarkconv.errors import SourceError, WriteError


def float_model(folder: Path, _: Callable[[str], Path]) -> Path:
    return quarkconv.convert_checkpoint(make_checkpoint(folder / "int8"), "bf16", folder / "model").output


def model_without_config(folder: Path, _: Callable[[str], Path]) -> Path:
    """Int8 experts with BF16 scales and nothing that names their scheme."""
    root = make_checkpoint(folder / "model", scale_dtype=torch.bfloat16, shards=1)
    config = json.loads((root / "config.json").read_text())
    del config["quantization_config"]
    (root / "config.json").write_text(json.dumps(config))
    return root


def half_of_the_experts_in_float(folder: Path, _: Callable[[str], Path]) -> Path:
    root = make_checkpoint(folder / "model", layers=2, shards=1)
    (path,) = root.glob("*.safetensors")
    tensors = {name: tensor for name, tensor in load(root).items() if not re.match(r".*layers\.1\..*_scale$", name)}
    for name, tensor in tensors.items():
        if ".layers.1." in name and tensor.dtype == torch.int8:
            tensors[name] = (tensor + 0.5).bfloat16()
    save_file(tensors, path, metadata={"format": "pt"})
    (root / "model.safetensors.index.json").unlink()
    return root


def export(name: str) -> Callable[[Path, Callable[[str], Path]], Path]:
    return lambda _, checkpoints: checkpoints(name)


CASES: dict[str, tuple[Callable[[Path, Callable[[str], Path]], Path], str, dict[str, Any]]] = {
    "nothing": (export("qwen3_moe-0.11-f2f"), "fused-int8", {}),
    "--quantize all --exclude": (
        float_model, "ascend", {"quantize": "all", "exclude": [r"re:.*self_attn\.(q|k|v)_proj$", "*.o_proj"]},
    ),
    "--quantize missing": (half_of_the_experts_in_float, "fused-int8", {"quantize": "missing"}),
    "--quantize all --ep": (float_model, "fused-int8", {"quantize": "all", "ep": 2}),
    "--tp": (export("qwen3_moe-0.11-f2f"), "fused-int8", {"tp": 2}),
    "--scheme": (model_without_config, "compressed-tensors", {"scheme": "ptpc_int8"}),
    "--mtp drop": (export("deepseek_v3-0.13-f2f-mtp"), "fused-int8", {"mtp": "drop"}),
    "--mtp quantize": (export("glm4_moe-0.13-f2f-mtp_bf16"), "compressed-tensors", {"mtp": "quantize"}),
    "--mtp quantize --exclude": (
        export("glm4_moe-0.13-f2f-mtp_bf16"), "quark", {"mtp": "quantize", "exclude": ["*.2.self_attn.*"]},
    ),
}  # fmt: skip
"""Source, target and options of a conversion."""


@pytest.mark.parametrize("case", CASES)
def test_the_printed_command_finishes_the_conversion(
    checkpoints: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], case: str
) -> None:
    make, target, options = CASES[case]
    source = make(tmp_path / "source", checkpoints)
    options = {"max_shard_size": 2_000, "jobs": 1, **options}
    expected = quarkconv.convert_checkpoint(source, target, tmp_path / "expected", **options).output
    out = tmp_path / "out put"
    with pytest.raises(WriteError):
        quarkconv.convert_checkpoint(source, target, out, progress=FullDisk(2), **options)
    begun = next(path.parent for path in out.rglob(STAGING))
    with pytest.raises(SourceError) as caught:
        quarkconv.inspect_checkpoint(begun)
    printed = re.search("`(.*)`", caught.value.hint or "")
    assert printed is not None
    words = shlex.split(printed[1])
    assert words[0] == "quarkconv"
    code, _, err = run_cli(capsys, *words[1:])
    assert code == 0, err
    assert snapshot(out) == snapshot(expected)
