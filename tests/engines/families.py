"""Exports of single families, and what the parameters of an engine's model must hold for them.

Each has one layer and a vocabulary of 24, which engines pad with zeros.
"""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Final

import torch
from engines.expected import Rank, Stacked
from support.exports import DATA

FAMILIES: Final = DATA / "families"
_PADDED_TO: Final = 64

RENAMED: Final = {
    "ernie4_5_moe": ((r"\.mlp\.gate\.e_score_correction_bias", ".mlp.moe_statics.e_score_correction_bias"),),
    "hunyuan_v1_moe": ((r"\.mlp\.experts\._shared_experts\._layer\.shared_experts\.", ".mlp.shared_mlp."),),
    "jamba": ((r"^model\.layers\.(\d+)\.(qkv_proj|o_proj)\.", r"model.layers.\1.self_attn.\2."),),
    "lfm2_moe": (
        (r"\.feed_forward\.gate\.e_score_correction_bias", ".feed_forward.expert_bias"),
        (r"^lm_head\.", "model.embed_tokens."),  # one tensor serves both
    ),
    "phimoe": ((r"\.mlp\.router\.", ".block_sparse_moe.gate."), (r"\.mlp\.", ".block_sparse_moe.")),
}  # fmt: skip
"""Model type -> names of an engine's parameters, and the names that they have in the checkpoint."""


def copy(name: str, destination: Path) -> Path:
    """A copy of the export of a family."""
    shutil.copytree(FAMILIES / name, destination)
    return destination


class Family(Stacked):
    """Expected parameters under the engine's names.

    Attributes:
        flat_bias: whether the engine keeps the bias of a router in one dimension.
    """

    def __init__(self, source: Path, *, flat_bias: bool = False) -> None:
        super().__init__(source)
        self.flat_bias = flat_bias
        config = json.loads((source / "config.json").read_text())
        self._renamed = RENAMED.get(config["model_type"], ())

    def parameter(self, name: str, rank: Rank, *, dequantized: bool = False) -> torch.Tensor:
        """See :class:`Stacked`; embedding and head with the padding of engines."""
        for pattern, stored in self._renamed:
            name = re.sub(pattern, stored, name)
        expected = super().parameter(name, rank, dequantized=dequantized)
        if name.endswith(("embed_tokens.weight", "lm_head.weight")):
            rows = -len(expected) % _PADDED_TO
            return torch.cat([expected, expected.new_zeros((rows, expected.shape[1]))])
        return expected.flatten() if self.flat_bias and name.endswith("e_score_correction_bias") else expected
