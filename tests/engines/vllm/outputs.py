"""Outputs of vLLM's layers of routed experts, its kernel in Triton's interpreter: a line of JSON for each family.

    python tests/engines/vllm/outputs.py FAMILY...

vLLM loads the conversion, chooses experts and activation, and computes; :mod:`quarkconv.verify` computes the same from
the export, exactly. What vLLM compiles beside its kernel is computed with torch: codes of tokens, the order of pairs by
expert, the sum over experts, and activations, each by the arguments that vLLM gives.

A program of its own: vLLM and Triton look at the environment when they are imported.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

os.environ.update(CUDA_VISIBLE_DEVICES="", TRITON_INTERPRET="1")  # empty: vLLM then allows for no GPU
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from engines.families import copy
from engines.outputs import ExactExperts, align, quantize, situ, swiglu
from engines.vllm.exports import prepare
from engines.vllm.loading import build, load
from engines.vllm.plugin_layers import workspaces
from torch.nn.functional import gelu, silu
from vllm.config import set_current_vllm_config
from vllm.model_executor.layers.fused_moe import modular_kernel, utils

import quarkconv

ACTIVATIONS: Final[dict[str, tuple[str, Callable[..., torch.Tensor]]]] = {
    "silu_and_mul": ("", lambda gate, up: silu(gate) * up),
    "gelu_and_mul": ("", lambda gate, up: gelu(gate) * up),
    "gelu_tanh_and_mul": ("", lambda gate, up: gelu(gate, approximate="tanh") * up),
    "silu_and_mul_with_clamp": (", float limit, float alpha, float beta", swiglu),
    "situ_and_mul": (", float beta, float linear_beta", situ),
}
"""vLLM's compiled activations: further arguments, and the function of gate, up and these."""
_seen: list[str] = []


def define_compiled() -> None:
    """Give the operators that vLLM compiles to torch."""
    for name, (arguments, function) in ACTIVATIONS.items():
        torch.library.define(f"_C::{name}", f"(Tensor! out, Tensor input{arguments}) -> ()")

        def run(
            out: torch.Tensor, gate_up: torch.Tensor, *rest: float, name: str = name, function: Any = function
        ) -> None:
            _seen.append(" ".join([name, *map(str, rest)]))
            gate, up = gate_up.float().chunk(2, -1)
            out.copy_(function(gate, up, *rest))

        torch.library.impl(f"_C::{name}", "CPU", run)
    schema = "(Tensor input, Tensor! out, Tensor? topk_ids, Tensor? expert_map) -> ()"
    torch.library.define("_moe_C::moe_sum", schema)
    torch.library.impl("_moe_C::moe_sum", "CPU", _sum)
    torch.library.define(
        "_moe_C::moe_align_block_size",
        "(Tensor topk_ids, int num_experts, int block_size, Tensor! sorted_ids, Tensor! expert_ids, "
        "Tensor! padded, Tensor? expert_map, Tensor? scatter_idx) -> ()",
    )
    torch.library.impl("_moe_C::moe_align_block_size", "CPU", align)


def _sum(values: torch.Tensor, out: torch.Tensor, *_: Any) -> None:
    out.copy_(values.float().sum(1))


def compared(family: str, folder: Path) -> dict[str, Any]:
    """vLLM's output for random tokens beside the exact one: errors over the norm, and what was computed."""
    source = prepare(copy(family, folder / "source"))
    exact = ExactExperts(source)
    x, weights, ids = exact.inputs()
    model = build(quarkconv.convert_checkpoint(source, "compressed-tensors", folder / "out", jobs=1).output)
    load(model)
    layer: Any = next(module for module in model.modules() if hasattr(module, "w13_weight"))
    with set_current_vllm_config(vars(model)["engine_config"]):
        layer.quant_method.process_weights_after_loading(layer)
        found = layer.quant_method.apply(layer, x.clone(), weights, ids, None, None)
    return {
        "family": family,
        "compiled": sorted(set(_seen)),
        "on_input": bool(layer.apply_router_weight_on_input),
        "experts": type(layer.quant_method.moe_kernel.fused_experts).__name__,
        **exact.errors(found),
    }


def main(families: list[str]) -> None:
    """Print what was found for each family; an error of vLLM's is part of it."""
    define_compiled()
    utils.per_token_quant_int8 = quantize
    modular_kernel.current_workspace_manager = lambda: workspaces("cpu")
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
