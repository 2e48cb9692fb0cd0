"""The INT8 MoE forward by Humming's kernels, in the sequence of calls of vLLM 0.33 (`--moe-backend humming`).

As in vLLM (fused_moe/experts/fused_humming_moe.py, HummingIndexedExperts; quantization/utils/humming): rows of weights
are padded to a multiple of 256 and columns to one of 128, scales of weights are bfloat16, and activations are quantized
per token. Needs humming-kernels (0.1.19 was run) and a CUDA compiler.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from humming import dtypes, ops
from humming.config import GemmType
from humming.forward import humming_forward
from humming.schema import CompressedTensorsWeightSchema, HummingInputSchema
from humming.testing.data import generate_moe_tensors
from humming.transform import prepare_and_transform_humming_tensors
from humming.tune import get_heuristics_config

from quarkconv.kernels.arguments import ExpertsArguments, ExpertWeights

_SILU = {"activation_type": "binary_split", "activation_impl": "((a / (1.f + expf(-a)))) * b"}
_CHOICES = {"use_batch_invariant": False, "use_f16_accum": False}
_SCHEME = {
    "quant_method": "compressed-tensors", "format": "int-quantized", "type": "int", "num_bits": 8, "symmetric": True,
    "strategy": "channel",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Repacked:
    """One projection of all experts in Humming's layout: its config, tensors, and tiles by number of pairs."""

    config: Any
    tensors: dict[str, torch.Tensor]
    tuning: Any

    def block(self, pairs: int) -> int:
        """Rows of a block for so many pairs."""
        return next((tile["block_shape"][0] for low, high, tile in self.tuning if low < pairs <= high), 64)


def repack(weights: ExpertWeights, parts: int) -> Repacked:
    """Weights as Humming takes them; `parts` 2 for gate and up, 1 for down."""
    experts, rows, depth = weights.codes.shape
    schema, tensors = CompressedTensorsWeightSchema.from_config(_SCHEME).convert_humming(
        {"weight": weights.codes, "weight_scale": weights.scale},
        [rows // parts] * parts, [depth], torch.bfloat16, experts,
    )  # fmt: skip
    inputs = HummingInputSchema(a_dtype=dtypes.int8, input_scale_dtype=dtypes.float32, input_quant_mode="dynamic_token")
    config, tensors = prepare_and_transform_humming_tensors(
        tensors, shape_n=rows, shape_k=depth, weight_schema=schema, input_schema=inputs, num_experts=experts,
        pad_n_to_multiple=256, pad_k_to_multiple=128, torch_dtype=torch.bfloat16, device=weights.codes.device,
    )  # fmt: skip
    return Repacked(config, tensors, get_heuristics_config(config, gemm_type=GemmType.INDEXED, **_CHOICES))


def make_run(call: ExpertsArguments, up: Repacked, down: Repacked, locks: torch.Tensor) -> Callable[[], torch.Tensor]:
    """The forward of a call: both quantizations and products, and the weighted sum over experts by torch.

    Pairs are sorted beforehand, which Humming's figure does not include. The sum is one more launch than in vLLM.
    """
    x, ids, weights = call.hidden_states, call.topk_ids, call.topk_weights
    (tokens, top_k), pairs = ids.shape, ids.numel()
    aligned = []
    for part in (up, down):
        sorting = generate_moe_tensors(ids, part.config.num_experts, GemmType.INDEXED, part.block(pairs))
        aligned.append(dict(zip(("sorted_ids", "expert_ids", "num_tokens_padded"), sorting[2:], strict=True)))
    gate_up = torch.empty((pairs, up.config.shape_n - up.config.pad_shape_n), dtype=x.dtype, device=x.device)
    y = torch.empty((pairs, x.shape[1]), dtype=x.dtype, device=x.device)
    compute = json.dumps(_CHOICES | {"gemm_type": "indexed"})
    quantize = {"quant_mode": "dynamic_token", "quant_dtype": str(dtypes.int8), "group_scale_dtype": "float32"}

    def product(part: Repacked, codes: Any, scale: Any, out: torch.Tensor, top_k: int, where: dict[str, Any]) -> None:
        humming_forward(
            part.config, inputs=codes, weight=part.tensors["weight"], weight_scale=part.tensors["weight_scale"],
            input_scale=scale, outputs=out, top_k=top_k, tuning_config=json.dumps(part.tuning), locks=locks,
            compute_config=compute, valid_shape_m=pairs, **where,
        )  # fmt: skip

    def run() -> torch.Tensor:
        codes, _, scale = ops.process_input(x, **quantize)
        product(up, codes, scale, gate_up, top_k, aligned[0])
        codes, _, scale = ops.process_input(gate_up, **quantize, **_SILU)
        product(down, codes, scale, y, 1, aligned[1])
        return torch.bmm(weights.to(y.dtype).unsqueeze(1), y.view(tokens, top_k, -1)).squeeze(1)

    return run


def make_locks(device: torch.device) -> torch.Tensor:
    """The locks that the products share."""
    return torch.zeros(
        torch.cuda.get_device_properties(device).multi_processor_count * 8, dtype=torch.int32, device=device
    )
