"""Load the routed experts of one layer, fused, and run the INT8 forward on them.

Takes Quark exports and converted checkpoints; uses a GPU if there is one.

Usage: python examples/run_one_layer.py [MODEL] [LAYER]
"""

import sys
from pathlib import Path

import torch

import quarkconv
from quarkconv.kernels import fused_experts_int8

model = sys.argv[1] if len(sys.argv) > 1 else str(Path(__file__).parent / "qwen3_moe-quark0.13-f2f")
layer = int(sys.argv[2]) if len(sys.argv) > 2 else 0
device = "cuda" if torch.cuda.is_available() else "cpu"

experts = quarkconv.load_fused_experts(model, layer, device)
print(f"{experts.module}: {experts.experts} experts, H {experts.hidden_size}, I {experts.intermediate_size}")

tokens, top_k = 16, 2
torch.manual_seed(0)
hidden_states = torch.randn(tokens, experts.hidden_size, dtype=torch.bfloat16, device=device)
router_logits = torch.randn(tokens, experts.experts, device=device)
topk_weights, topk_ids = router_logits.softmax(-1).topk(top_k)

output = fused_experts_int8(
    hidden_states,
    experts.w13,
    experts.w2,
    experts.w13_scale,
    experts.w2_scale,
    topk_weights,
    topk_ids,
    w13_input_scale=experts.w13_input_scale,
    w2_input_scale=experts.w2_input_scale,
)
print(f"output: {list(output.shape)} {output.dtype} on {output.device}, RMS {output.float().pow(2).mean().sqrt():.4f}")
