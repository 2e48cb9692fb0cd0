"""The float path: logits of the streamed model equal transformers' own forward of the target ``bf16``, bit for bit.

Both run the same classes on the same weights; only loading differs, and when each layer runs.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support.exports import DATA, EXPORTS, FIXTURES, restore
from support.logits import streamed, whole

from quarkconv import UnsupportedError, convert_checkpoint, inspect_checkpoint
from quarkconv.errors import QuarkconvError

pytestmark = pytest.mark.long(15)

FAMILIES = {path.name: path for path in sorted((DATA / "families").iterdir()) if path.is_dir()}
OTHER_TOOLS = {path.name: path for path in sorted((DATA / "other_tools").iterdir()) if path.is_dir()}
KEPT = {**FAMILIES, **EXPORTS, **FIXTURES, **OTHER_TOOLS}

REFUSED = {
    # The class fails as a whole too: head_dim of this config is not that of its rotary embedding.
    "deepseek_v3-0.13-eager": "cannot be run layer by layer",
    "deepseek_v3-0.13-f2f": "cannot be run layer by layer",
    "qwen3_moe-0.13-f2f-wrapped": "no class",
    # So does that of Step-3.5: this config has no sliding window. tests/evaluate/test_step3p5.py has a whole one.
    "step3p5-like-3key_fused": "cannot be run layer by layer",
}
"""What ``evaluate`` refuses, and in which words."""


@pytest.mark.parametrize("name", KEPT)
def test_the_dequantized_model_equals_transformers_own_forward_of_the_bf16_target(name: str, tmp_path: Path) -> None:
    source = restore(KEPT[name], tmp_path / "source")
    if not inspect_checkpoint(source).targets["bf16"].supported:
        with pytest.raises(QuarkconvError):
            convert_checkpoint(source, "bf16", tmp_path / "bf16")
        return
    out = convert_checkpoint(source, "bf16", tmp_path / "bf16").output
    ids = torch.randint(0, 24, (2, 20), generator=torch.Generator().manual_seed(1))
    if name in REFUSED:
        with pytest.raises(UnsupportedError, match=REFUSED[name]):
            streamed(source, ids)
        return
    assert torch.equal(streamed(source, ids), whole(out, ids))


@pytest.mark.parametrize("target", ["fused-int8", "compressed-tensors", "w8a8-int8", "bf16"])
def test_every_layout_of_a_model_gives_the_same_logits(quantized: Path, target: str, tmp_path: Path) -> None:
    ids = torch.randint(0, 512, (1, 12), generator=torch.Generator().manual_seed(2))
    out = convert_checkpoint(quantized, target, tmp_path / target).output
    assert torch.equal(streamed(out, ids), streamed(quantized, ids))


def test_the_unquantized_model_equals_transformers_own_forward(unquantized: Path) -> None:
    ids = torch.randint(0, 512, (2, 20), generator=torch.Generator().manual_seed(1))
    assert torch.equal(streamed(unquantized, ids), whole(unquantized, ids))
