"""Checkpoints of families that no export in tests/data has, in the names of their published checkpoints.

transformers has no class of these for Quark to export. Names and router tensors are those that vLLM 0.33 and SGLang
0.5.23 load.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import torch
from safetensors.torch import save_file

from support.checkpoints import Tensors
from support.model import int8_linear
from support.quark_config import quark_config

HIDDEN, INNER, EXPERTS = 16, 8, 4
GATE_UP_DOWN: Final = ("gate_proj", "up_proj", "down_proj")
W1_W3_W2: Final = ("w1", "w3", "w2")


@dataclass(frozen=True)
class Published:
    """A family's checkpoint.

    Attributes:
        config: config.json.
        moe: module with experts and router.
        leaves: names of gate, up and down.
        router: name of the router's weight below `moe`, and its rows.
        bias: name of the correction bias below `moe`, which has as many elements.
        width: hidden size of the experts' input.
        beside: float linears beside the experts: name below `moe` -> shape.
        activation: what verify says of it.
    """

    config: dict[str, Any]
    moe: str = "model.layers.0.mlp"
    leaves: tuple[str, str, str] = GATE_UP_DOWN
    router: tuple[str, int] = ("gate.weight", EXPERTS)
    bias: str | None = None
    width: int = HIDDEN
    beside: dict[str, tuple[int, int]] = field(default_factory=dict)
    activation: str = "silu"

    def write(self, folder: Path) -> Path:
        """Write the checkpoint; returns ``folder``."""
        random = torch.Generator().manual_seed(3)
        name, rows = self.router
        tensors: Tensors = {f"{self.moe}.{name}": torch.randn(rows, HIDDEN, generator=random).bfloat16()}
        if self.bias is not None:
            tensors[f"{self.moe}.{self.bias}"] = torch.randn(rows, generator=random) / 8
        for other, shape in self.beside.items():
            tensors[f"{self.moe}.{other}"] = torch.randn(shape, generator=random).bfloat16()
        for expert in range(EXPERTS):
            for leaf in self.leaves:
                shape = (self.width, INNER) if leaf == self.leaves[2] else (INNER, self.width)
                tensors |= int8_linear(f"{self.moe}.experts.{expert}.{leaf}", *shape)
        excluded = [f"{self.moe}.{other.removesuffix('.weight')}" for other in (name, *self.beside)]
        quantization = quark_config(exclude=excluded)
        folder.mkdir()
        save_file(tensors, folder / "model.safetensors")
        (folder / "config.json").write_text(json.dumps({**self.config, "quantization_config": quantization}))
        return folder


SIZES: Final = {
    "hidden_size": HIDDEN, "moe_intermediate_size": INNER, "num_hidden_layers": 1, "hidden_act": "silu",
}  # fmt: skip
SIGMOID: Final = {"n_group": 2, "topk_group": 1, "routed_scaling_factor": 2.5, "num_experts_per_tok": 2}
PUBLISHED: Final = {
    "deepseek": Published(
        {"model_type": "deepseek", **SIZES, "n_routed_experts": EXPERTS, "num_experts_per_tok": 2,
         "norm_topk_prob": False, "scoring_func": "softmax"},
    ),
    "deepseek_vl_v2": Published(
        {"model_type": "deepseek_vl_v2", "language_config": {
            "model_type": "deepseek_v2", **SIZES, "n_routed_experts": EXPERTS, "num_experts_per_tok": 2,
            "norm_topk_prob": False, "topk_method": "greedy", "routed_scaling_factor": 1.0}},
        moe="language.model.layers.0.mlp",
    ),
    "bailing_moe": Published(
        {"model_type": "bailing_moe", **SIZES, "num_experts": EXPERTS, "num_experts_per_tok": 2,
         "norm_topk_prob": True, "use_bias": False},
    ),
    "bailing_moe_v2": Published(
        {"model_type": "bailing_moe", **SIZES, **SIGMOID, "num_experts": EXPERTS, "norm_topk_prob": True,
         "score_function": "sigmoid", "moe_router_enable_expert_bias": True, "use_bias": False},
        bias="gate.expert_bias",
    ),
    "bailing_moe_v3": Published(
        {"model_type": "bailing_hybrid", "architectures": ["BailingMoeV3ForCausalLM"], **SIZES, **SIGMOID,
         "num_experts": EXPERTS, "score_function": "sigmoid", "moe_router_enable_expert_bias": True,
         "expert_swiglu_limit_list": [0.5], "share_expert_swiglu_limit_list": [4.0]},
        bias="gate.expert_bias", activation="silu, clamped at 0.5",
    ),
    "bailing_moe_v3_vl": Published(
        {"model_type": "bailing_moe_v3_vl", "architectures": ["BailingMoeV3VLForConditionalGeneration"],
         "text_config": {"model_type": "bailing_hybrid", **SIZES, **SIGMOID, "num_experts": EXPERTS,
                         "score_function": "sigmoid", "moe_router_enable_expert_bias": True}},
        moe="language_model.model.layers.0.mlp", bias="gate.expert_bias",
    ),
    "longcat_flash": Published(
        {"model_type": "longcat_flash", **SIZES, "n_routed_experts": EXPERTS, "moe_topk": 2, "zero_expert_num": 2,
         "zero_expert_type": "identity", "routed_scaling_factor": 6.0},
        router=("router.classifier.weight", EXPERTS + 2), bias="router.e_score_correction_bias",
    ),
    "grok-2": Published(
        {"model_type": "git", "architectures": ["Grok1ForCausalLM"], **SIZES, "hidden_act": "gelu",
         "num_local_experts": EXPERTS, "num_experts_per_tok": 2, "router_logit_softcapping": 30.0},
        moe="model.layers.0.block_sparse_moe", leaves=W1_W3_W2, activation="gelu",
    ),
    "grok-1": Published(
        {"model_type": "grok-1", **SIZES, "hidden_act": "gelu", "num_experts": EXPERTS, "num_experts_per_tok": 2},
        moe="model.layers.0.moe_block", leaves=("linear", "linear_v", "linear_1"), activation="gelu",
    ),
    "kimi_k3": Published(
        {"model_type": "kimi_k3", "text_config": {
            "model_type": "kimi_linear", **SIZES, "num_experts": EXPERTS, "num_experts_per_token": 2,
            "num_expert_group": 1, "topk_group": 1, "use_grouped_topk": True, "moe_renormalize": True,
            "moe_router_activation_func": "sigmoid", "routed_scaling_factor": 2.5, "hidden_act": "situ",
            "activation_situ_beta": 4.0, "activation_situ_linear_beta": 25.0, "routed_expert_hidden_size": 12,
            "latent_moe_use_norm": True}},
        moe="language_model.model.layers.0.block_sparse_moe", leaves=W1_W3_W2, bias="gate.e_score_correction_bias",
        width=12, beside={"routed_expert_down_proj.weight": (12, HIDDEN), "routed_expert_up_proj.weight": (HIDDEN, 12)},
        activation="situ, beta 4, linear beta 25",
    ),
}  # fmt: skip
