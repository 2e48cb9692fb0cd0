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
from engines.forward import relative_error
from engines.vllm.exports import prepare
from engines.vllm.loading import build, load
from engines.vllm.plugin_layers import workspaces
from torch.nn.functional import gelu, silu
from vllm.config import set_current_vllm_config
from vllm.model_executor.layers.fused_moe import modular_kernel, utils

import quarkconv
from quarkconv.description.description import describe
from quarkconv.experts.function import ExpertActivation, Unknown
from quarkconv.experts.knowledge import knowledge, layer_activation, layer_routing
from quarkconv.verify.reference import reference_forwards

TOKENS, TOP_K = 12, 2
LARGEST: Final = 4.0
"""Of gate and up: functions differ there. Where a function has a limit, which is 7 or 10, six times as large."""


def quantize(states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes and scales of each row."""
    scale = states.float().abs().amax(-1, keepdim=True).clamp(min=1e-10) / 127
    return torch.round(states.float() / scale).to(torch.int8), scale


def _halves(gate_up: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    gate, up = gate_up.float().chunk(2, -1)
    return gate, up


def _swiglu(gate: torch.Tensor, up: torch.Tensor, limit: float, alpha: float, beta: float) -> torch.Tensor:
    gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    return gate * torch.sigmoid(alpha * gate) * (up + beta)


def _situ(gate: torch.Tensor, up: torch.Tensor, beta: float, linear_beta: float) -> torch.Tensor:
    up = linear_beta * torch.tanh(up / linear_beta) if linear_beta > 0 else up
    return beta * torch.tanh(gate / beta) * torch.sigmoid(gate) * up


ACTIVATIONS: Final[dict[str, tuple[str, Callable[..., torch.Tensor]]]] = {
    "silu_and_mul": ("", lambda gate, up: silu(gate) * up),
    "gelu_and_mul": ("", lambda gate, up: gelu(gate) * up),
    "gelu_tanh_and_mul": ("", lambda gate, up: gelu(gate, approximate="tanh") * up),
    "silu_and_mul_with_clamp": (", float limit, float alpha, float beta", _swiglu),
    "situ_and_mul": (", float beta, float linear_beta", _situ),
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
            out.copy_(function(*_halves(gate_up), *rest))

        torch.library.impl(f"_C::{name}", "CPU", run)
    schema = "(Tensor input, Tensor! out, Tensor? topk_ids, Tensor? expert_map) -> ()"
    torch.library.define("_moe_C::moe_sum", schema)
    torch.library.impl("_moe_C::moe_sum", "CPU", _sum)
    torch.library.define(
        "_moe_C::moe_align_block_size",
        "(Tensor topk_ids, int num_experts, int block_size, Tensor! sorted_ids, Tensor! expert_ids, "
        "Tensor! padded, Tensor? expert_map, Tensor? scatter_idx) -> ()",
    )
    torch.library.impl("_moe_C::moe_align_block_size", "CPU", _align)


def _sum(values: torch.Tensor, out: torch.Tensor, *_: Any) -> None:
    out.copy_(values.float().sum(1))


def _align(
    topk_ids: torch.Tensor, experts: int, block: int, pairs: torch.Tensor, owners: torch.Tensor, padded: torch.Tensor,
    *_: Any,
) -> None:  # fmt: skip
    """Pairs sorted by expert, those of each padded to whole blocks with the number of pairs."""
    flat = topk_ids.flatten()
    pairs.fill_(len(flat))
    owners.zero_()
    at = 0
    for expert in range(experts):
        own = (flat == expert).nonzero().flatten()
        pairs[at : at + len(own)] = own.to(pairs.dtype)
        blocks = -(-len(own) // block)
        owners[at // block : at // block + blocks] = expert
        at += blocks * block
    padded.fill_(at)


def compared(family: str, folder: Path) -> dict[str, Any]:
    """vLLM's output for random tokens beside the exact one: errors over the norm, and what was computed."""
    source = prepare(copy(family, folder / "source"))
    description = describe(source)
    layer = description.int8_layers[0]
    known = knowledge(description.config.raw, layer.moe)
    activation, routing = layer_activation(known, layer), layer_routing(known, layer)
    out = quarkconv.convert_checkpoint(source, "compressed-tensors", folder / "out", jobs=1).output
    model = build(out)
    load(model)
    module: Any = next(module for module in model.modules() if hasattr(module, "w13_weight"))
    with set_current_vllm_config(vars(model)["engine_config"]):
        module.quant_method.process_weights_after_loading(module)
    on_input = bool(getattr(module, "apply_router_weight_on_input", False))
    random = torch.Generator().manual_seed(1)
    x = torch.randn(TOKENS, module.w13_weight.shape[2], generator=random)
    products = (module.w13_weight.float() * module.w13_weight_scale.reshape(layer.experts, -1, 1)) @ x.T
    limited = not isinstance(activation, Unknown) and activation.limit is not None
    x = (x * ((6 if limited else 1) * LARGEST / products.abs().max())).bfloat16()
    k = 1 if on_input else TOP_K
    ids = torch.stack([torch.randperm(layer.experts, generator=random)[:k] for _ in range(TOKENS)])
    weights = torch.rand(TOKENS, k, generator=random)
    with set_current_vllm_config(vars(model)["engine_config"]):
        found = module.quant_method.apply(module, x.clone(), weights, ids.int(), None, None)
    result: dict[str, Any] = {"family": family, "vllm": sorted(set(_seen)), "on_input": on_input}
    result["method"] = type(module.quant_method.moe_kernel.fused_experts).__name__
    result["vllm_activation"] = str(getattr(module, "activation", ""))
    if isinstance(activation, Unknown):
        return result | {"unknown": activation.reason}
    experts = quarkconv.load_fused_experts(source, layer.prefix)
    rule = getattr(routing, "on_input", False)

    def error(activation: ExpertActivation, on_input: bool) -> float:
        if on_input and k == 1:  # vLLM rounds the product of token and weight
            states, factors, on_input = x * weights.bfloat16(), torch.ones_like(weights), False
        else:
            states, factors = x, weights
        exact = reference_forwards(states, factors, ids, experts.projection, activation, on_input=on_input).exact
        return relative_error(found, exact)

    plain = ExpertActivation("gelu" if activation == ExpertActivation("silu") else "silu")
    others = [error(activation, not rule), *([error(plain, rule)] if activation.gated else [])]
    return result | {"activation": activation.describe(), "error": error(activation, rule), "other": min(others)}


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
