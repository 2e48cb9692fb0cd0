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
from engines.built import BUILT, EXPERTS, ernie_vl, kimi_k2
from engines.expected import Rank, Stacked
from engines.wrapped import WRAPPED
from support.checkpoints import load
from support.exports import DATA

FAMILIES: Final = DATA / "families"
_PADDED_TO: Final = 64
_VOCABULARY: Final = (
    ".embed.weight", ".embed_tokens.weight", "embeddings.weight", ".head.weight", ".lm_head.weight", ".lm_head.bias",
)  # fmt: skip
_NOT_PADDED: Final = {"gemma4_text": ("model.embed_tokens.weight",)}
_FLAT: Final = ("e_score_correction_bias", ".A_log")
_ROUTED: Final = re.compile(r"\.(w13|w2)_weight(_scale)?$")

_BELOW_LANGUAGE_MODEL: Final = (r"^model\.(?!language_model\.|visual\.)", "model.language_model.")
_BAILING: Final = (
    (r"\.(self_attn|attention)\.o_proj\.", ".attention.dense."), (r"\.self_attn\.", ".attention."),
    (r"\.embed_tokens\.", ".word_embeddings."),
)  # fmt: skip
RENAMED: Final = {
    "aria": (
        (r"^(language_model|vision_tower|multi_modal_projector)\.", r"model.\1."),
        (r"\.router_weight$", ".router.weight"),
    ),
    "bailing_hybrid": _BAILING,
    "bailing_moe_v3_vl": (
        *_BAILING, (r"\.attn\.qkv_proj\.", ".attn.qkv."), (r"^(language_model|model)\.(model|lm_head)\.", r"\2."),
    ),
    "deepseek_v4": (
        (r"^model\.", ""), (r"^lm_head\.", "head."), (r"^embed_tokens\.", "embed."),
        (r"\.self_attn\.", ".attn."), (r"\.mlp\.", ".ffn."), (r"\.input_layernorm\.", ".attn_norm."),
        (r"\.post_attention_layernorm\.", ".ffn_norm."),
        (r"\.ffn\.gate\.e_score_correction_bias", ".ffn.gate.bias"),
        (r"\.shared_experts\.down_proj\.", ".shared_experts.w2."),
    ),
    "deepseek_vl_v2": ((r"^language_model\.", "language."),),
    "ernie4_5_moe": ((r"\.mlp\.gate\.e_score_correction_bias", ".mlp.moe_statics.e_score_correction_bias"),),
    "hunyuan_v1_moe": (
        (r"\.mlp\.experts\._shared_experts\._layer\.shared_experts\.", ".mlp.shared_mlp."),
        (r"\.mlp\.gate\.(?!wg\.)", ".mlp.gate.wg."),
    ),
    "gemma4_text": ((r"\.moe\.per_expert_scale", ".router.per_expert_scale"), (r"\.moe\.", ".")),
    "jamba": ((r"^model\.layers\.(\d+)\.(qkv_proj|o_proj)\.", r"model.layers.\1.self_attn.\2."),),
    "kimi_k3": ((r"^(language_model\..+)\.mlp\.", r"\1.block_sparse_moe."),),
    "lfm2_moe": (
        (r"\.feed_forward\.gate\.e_score_correction_bias", ".feed_forward.expert_bias"),
        (r"^lm_head\.", "model.embed_tokens."),  # one tensor serves both
    ),
    "minimax_m3_vl": (
        (r"\.layers\.(\d+)\.fc", r".layers.\1.mlp.fc"),
        (r"^(vision_tower\..+\.self_attn)\.proj\.", r"\1.out_proj."),
        (r"^(model|lm_head)\.", r"language_model.\1."),
        (r"^(language_model\..+)\.mlp\.", r"\1.block_sparse_moe."),
        (r"^vision_tower\.(multi_modal_projector|patch_merge_mlp)", r"\1"),
    ),
    "nemotron_h": (
        (r"^model\.", "backbone."),
        (r"\.embed_tokens\.", ".embeddings."),
        (r"^backbone\.norm\.", "backbone.norm_f."),
    ),
    **dict.fromkeys(
        ("qwen3_5_moe_text", "qwen3_next"),
        ((r"^model\.layers\.(\d+)\.(qkv_proj|o_proj|q_norm|k_norm)\.", r"model.layers.\1.self_attn.\2."),),
    ),
    "glm5_next": ((r"\.attn\.qkv_proj\.", ".attn.qkv."), _BELOW_LANGUAGE_MODEL),
    "qwen3_5_moe": (
        (r"\.attn\.qkv_proj\.", ".attn.qkv."),
        (r"^model\.layers\.(\d+)\.(qkv_proj|o_proj|q_norm|k_norm)\.", r"model.layers.\1.self_attn.\2."),
        _BELOW_LANGUAGE_MODEL,
    ),
    "qwen4_exp": (
        (r"^model\.layers\.(\d+)\.(qkv_proj|o_proj|q_norm|k_norm|indexer)\.", r"model.layers.\1.self_attn.\2."),
        _BELOW_LANGUAGE_MODEL,
    ),
    "qwen3_vl_moe": ((r"\.attn\.qkv_proj\.", ".attn.qkv."), _BELOW_LANGUAGE_MODEL),
    "phimoe": ((r"\.mlp\.router\.", ".block_sparse_moe.gate."), (r"\.mlp\.", ".block_sparse_moe.")),
}  # fmt: skip
"""Model type -> names of an engine's parameters, and the names that they have in the checkpoint."""


_EAGER: Final = ("qwen3_vl_moe",)
"""Families whose experts Quark leaves in float file to file."""


def model_type(family: str) -> str:
    """Under which a verdict is given for a family; two of them share one where engines have a class for each."""
    names = {"bailing_hybrid_v2.5": "bailing_hybrid", "grok-2": "git", "qwen4_exp_vl": "qwen4_exp"}
    return names.get(family, family)


def copy(family: str, destination: Path, flow: str = "f2f") -> Path:
    """A copy of the export of a family, or the checkpoint that is built for it here."""
    if family == "kimi_k2":
        return kimi_k2(FAMILIES / "deepseek_v3-0.13-f2f", destination)
    if family == "ernie4_5_moe_vl":
        return ernie_vl(FAMILIES / "ernie4_5_vl_moe-0.13-f2f", destination)
    if family in WRAPPED:
        return WRAPPED[family].write(destination)
    if family in BUILT:
        return BUILT[family].write(destination)
    shutil.copytree(FAMILIES / f"{family}-0.13-{'eager' if family in _EAGER else flow}", destination)
    return destination


_ERNIE: Final = re.compile(
    r".*\.layers\.0\.mlp\.(?P<kind>text|vision)_experts\.(routed_experts\.)?(?P<half>w13|w2)_(?P<leaf>weight(_scale)?)"
)


def ernie_mismatches(model: torch.nn.Module, source: Path) -> list[str]:
    """Names of the parameters of ERNIE 4.5 VL's experts for text, and of those for images, that are not as stored."""
    tensors, wrong, seen = load(source), [], 0
    for name, parameter in model.named_parameters():
        if match := _ERNIE.fullmatch(name):
            seen += 1
            projections = ("gate_proj", "up_proj") if match["half"] == "w13" else ("down_proj",)
            first = {"text": 0, "vision": EXPERTS}[match["kind"]]
            prefixes = [f"model.layers.0.mlp.experts.{first + expert}" for expert in range(EXPERTS)]
            leaf = match["leaf"]
            experts = [torch.cat([tensors[f"{prefix}.{key}.{leaf}"] for key in projections]) for prefix in prefixes]
            if not torch.equal(torch.stack(experts).reshape(parameter.shape), parameter.data):
                wrong.append(name)
    assert seen == 8
    return wrong


class Family(Stacked):
    """Expected parameters under the engine's names.

    Args:
        source: the export.
        engine: vllm or sglang.
    """

    def __init__(self, source: Path, engine: str) -> None:
        super().__init__(source)
        self._engine = engine
        config = json.loads((source / "config.json").read_text())
        self._renamed = RENAMED.get(config["model_type"], ())

    def parameter(self, name: str, rank: Rank, *, dequantized: bool = False) -> torch.Tensor:
        """See :class:`Stacked`; embedding and head with the padding of engines."""
        for pattern, stored in self._renamed:
            name = re.sub(pattern, stored, name)
        expected = super().parameter(name, rank, dequantized=dequantized)
        if self._engine == "vllm" and self.config["model_type"] == "llama4_text" and ".qkv_proj." in name:
            return _half_rotary(expected, self.config["head_dim"])
        if self._engine == "sglang" and name in _NOT_PADDED.get(self.config["model_type"], ()):
            return expected
        if f".{name}".endswith(_VOCABULARY) or (self._engine == "sglang" and name.endswith("visual.pos_embed.weight")):
            rows = -len(expected) % _PADDED_TO
            return torch.cat([expected, expected.new_zeros((rows, *expected.shape[1:]))])
        return expected.flatten() if self._engine == "vllm" and name.endswith(_FLAT) else expected


def _half_rotary(rows: torch.Tensor, head: int) -> torch.Tensor:
    """Rows of q, k and v with those of q and k, of which a rotation has two in turn, as halves of each head."""
    *rotated, values = rows.chunk(3)
    halves = [part.reshape(-1, head // 2, 2, part.shape[1]).transpose(1, 2).reshape(part.shape) for part in rotated]
    return torch.cat([*halves, values])


def experts_that_differ(model: torch.nn.Module, expected: Family, rank: Rank) -> list[str]:
    """Names of the routed experts' parameters that do not hold what they must on a rank."""
    experts = {name: value for name, value in model.named_parameters() if _ROUTED.search(name)}
    assert experts
    return [name for name, value in experts.items() if not torch.equal(expected.parameter(name, rank), value)]
