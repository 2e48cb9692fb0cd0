"""Outputs of SGLang's layers of routed experts, its kernel in Triton's interpreter: a line of JSON for each family.

    python tests/engines/sglang/outputs.py FAMILY...

As tests/engines/vllm/outputs.py: SGLang loads the conversion, chooses activation and settings, and computes. What is
compiled beside its kernel is computed with torch.

A program of its own: Triton looks at the environment when it is imported.
"""

from __future__ import annotations

import inspect
import json
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

os.environ.update(CUDA_VISIBLE_DEVICES="", TRITON_INTERPRET="1", TORCHDYNAMO_DISABLE="1")
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
import triton.language as tl
from engines.families import copy
from engines.outputs import ExactExperts, align, quantize, swiglu
from engines.sglang.exports import prepare
from engines.sglang.loading import build, load
from sglang.kernels.ops.activation import silu_and_mul_clamp
from sglang.kernels.ops.moe import fused_moe_triton_kernels as kernels
from sglang.srt.layers.moe.moe_runner.triton_utils import fused_moe, fused_moe_triton_config, moe_align_block_size
from sglang.srt.layers.moe.topk import StandardTopKOutput
from torch.nn.functional import gelu, silu

import quarkconv

_ACTIVATIONS: Final[dict[str, Callable[[torch.Tensor], torch.Tensor]]] = {
    "silu_and_mul": silu,
    "gelu_and_mul": gelu,
    "gelu_tanh_and_mul": lambda gate: gelu(gate, approximate="tanh"),
}
_seen: list[str] = []


def define_compiled() -> None:
    """Give torch for what is compiled, in the modules that call it, which then take a GPU's branches."""

    def gated(name: str) -> Any:
        def run(gate_up: torch.Tensor, out: torch.Tensor, **_: Any) -> None:
            _seen.append(name)
            gate, up = gate_up.float().chunk(2, -1)
            out.copy_(_ACTIVATIONS[name](gate) * up)

        return run

    def clamped(gate_up: torch.Tensor, out: torch.Tensor, limit: float) -> None:
        _seen.append(f"silu_and_mul_clamp {limit}")
        gate, up = gate_up.float().chunk(2, -1)
        out.copy_(swiglu(gate, up, limit, 1, 0))

    def reduce(values: torch.Tensor, out: torch.Tensor, factor: float) -> None:
        out.copy_(values.float().sum(1) * factor)

    vars(fused_moe).update({name: gated(name) for name in _ACTIVATIONS}, moe_sum_reduce=reduce, _is_cuda=True)
    vars(fused_moe).update(_use_moe_sum_reduce_torch_compile=lambda _: False, _activation_row_filter=lambda **_: {})
    vars(silu_and_mul_clamp).update(silu_and_mul_clamp=clamped)
    vars(kernels).update(per_token_quant_int8=quantize)
    for name in ("gdc_wait", "gdc_launch_dependents"):  # order launches, which the interpreter lacks
        setattr(tl.extra.cuda, name, lambda: None)
    vars(fused_moe_triton_config).update(get_device_name=lambda: "NVIDIA H200")
    for name in ("inplace_fused_experts", "outplace_fused_experts"):  # operators that exist for GPUs
        operator = getattr(fused_moe, name)
        vars(fused_moe)[name] = getattr(operator, "op_func", None) or inspect.unwrap(operator)

    def sort(ids: torch.Tensor, buckets: int, *rest: Any) -> None:
        align(ids, buckets - 1, *rest)  # one more than experts, for ids of none

    vars(sys.modules[moe_align_block_size.__module__])["sgl_moe_align_block_size"] = sort


def compared(family: str, folder: Path) -> dict[str, Any]:
    """SGLang's output for random tokens beside the exact one: errors over the norm, and what was computed."""
    source = prepare(copy(family, folder / "source"))
    exact = ExactExperts(source)
    x, weights, ids = exact.inputs()
    out = quarkconv.convert_checkpoint(source, "w8a8-int8", folder / "out", jobs=1).output
    model = load(build(out), out)
    layer: Any = next(module for module in model.modules() if hasattr(module, "w13_weight"))
    layer.quant_method.process_weights_after_loading(layer)
    topk = StandardTopKOutput(weights, ids, torch.zeros(len(x), layer.num_experts))
    dispatched = layer.dispatcher.dispatch(hidden_states=x.clone(), topk_output=topk)
    found = layer.quant_method.apply(layer=layer, dispatch_output=dispatched).hidden_states
    config = layer.moe_runner_config
    return {
        "family": family,
        "compiled": sorted(set(_seen)),
        "on_input": bool(config.apply_router_weight_on_input),
        "settings": [config.activation, config.gemm1_alpha, config.gemm1_clamp_limit, config.swiglu_limit],
        **exact.errors(found / (config.routed_scaling_factor or 1)),
    }


def main(families: list[str]) -> None:
    """Print what was found for each family; an error of SGLang's is part of it."""
    define_compiled()
    for family in families:
        _seen.clear()
        with tempfile.TemporaryDirectory() as folder:
            try:
                found = compared(family, Path(folder))
            except Exception as error:  # of every type; the caller decides which are expected
                found = {"family": family, "error": f"{type(error).__name__}: {error}"[:300]}
        print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
