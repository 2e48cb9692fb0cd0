"""The plugin in vLLM's own classes computes what the Quark export says, and leaves vLLM's parameters as they are.

Experts run on the CPU by the torch twin of the kernels, inside vLLM's modular kernel; where the plugin looks at the
platform it sees one of CUDA.
"""

from __future__ import annotations

import pytest
import torch
from engines.expected import RANKS, WHOLE, Rank
from engines.forms import QUARK, Forms
from engines.forward import relative_error
from engines.vllm.loading import build, load
from engines.vllm.plugin_layers import BOUND, exact, experts_of, inputs, ready, workspaces
from vllm.config import set_current_vllm_config
from vllm.model_executor.layers import quantization
from vllm.model_executor.layers.fused_moe import modular_kernel

TAKEN = [
    *[("qwen3_moe-quark0.13-f2f", form) for form in (QUARK, "fused-int8", "compressed-tensors", "quark")],
    ("mixtral-quark0.11-eager", "fused-int8"),
    ("minimax_m2-quark0.13-f2f", "compressed-tensors"),
    ("qwen2_moe-0.11-eager-shared_expert", QUARK),
    ("qwen3_moe-quark0.13-f2f-per_tensor_weight", QUARK),
    ("qwen3_moe-quark0.13-f2f-per_tensor_weight", "quark"),
    ("qwen3_moe-quark0.11-eager-int8_static", QUARK),
    ("qwen3_moe-quark0.11-eager-int8_static", "quark"),
]


@pytest.mark.parametrize(("name", "form"), TAKEN)
def test_experts_compute_what_the_export_says(turned_on: list[str], forms: Forms, name: str, form: str) -> None:
    layer = ready(forms(name, form), name)
    x, weights, ids = inputs(layer, layer.global_num_experts)
    out = layer.quant_method.apply(layer, x, weights, ids, None, None)
    assert type(layer.quant_method.moe_kernel.fused_experts).__name__ == "QuarkconvExperts"
    assert relative_error(out, exact(forms.stacked(name), name, x, weights, ids)) < BOUND
    assert any(line.startswith("Using quarkconv Int8 MoE backend") for line in turned_on)


@pytest.mark.usefixtures("turned_on")
@pytest.mark.parametrize("rank", [WHOLE, RANKS[4]], ids=str)
def test_a_modular_kernel_gives_the_same_bits(forms: Forms, rank: Rank) -> None:
    """The method calls the experts directly; vLLM may call them by its interface of modular experts."""
    name = "qwen3_moe-quark0.13-f2f"
    layer = ready(forms(name, QUARK), name, rank)
    x, weights, ids = inputs(layer, layer.global_num_experts)
    modular = layer.quant_method.moe_kernel.apply(
        x, layer.w13_weight, layer.w2_weight, weights, ids, layer.activation, layer.global_num_experts,
        layer.expert_map, False,
    )  # fmt: skip
    assert modular.any()
    assert torch.equal(modular, layer.quant_method.apply(layer, x, weights, ids, None, None))


@pytest.mark.usefixtures("turned_on")
def test_router_weights_on_the_input_multiply_the_tokens(forms: Forms) -> None:
    name = "qwen3_moe-quark0.13-f2f"
    layer = ready(forms(name, QUARK), name)
    x, weights, ids = inputs(layer, layer.global_num_experts)
    weights, ids = (
        2 ** (4 * weights[:, :1] - 2).round(),
        ids[:, :1].contiguous(),
    )  # powers of 2 leave the codes as they are
    layer.apply_router_weight_on_input = True
    out = layer.quant_method.apply(layer, x, weights, ids, None, None)
    expected = exact(forms.stacked(name), name, x.double() * weights, torch.ones_like(weights), ids)
    assert relative_error(out, expected) < BOUND
    assert relative_error(out, exact(forms.stacked(name), name, x, weights, ids)) > BOUND


@pytest.mark.usefixtures("turned_on")
@pytest.mark.parametrize("name", ["qwen3_moe-quark0.13-f2f", "qwen3_moe-quark0.11-eager-int8_static"])
@pytest.mark.parametrize("parallel", [RANKS[1:3], RANKS[3:]], ids=["tensor", "expert"])
def test_results_of_the_ranks_add_up(forms: Forms, name: str, parallel: tuple[Rank, ...]) -> None:
    parts = []
    for rank in parallel:
        layer = ready(forms(name, QUARK), name, rank)
        x, weights, ids = inputs(layer, layer.global_num_experts)
        assert (layer.expert_map is not None) == rank.expert_parallel
        parts.append(layer.quant_method.apply(layer, x, weights, ids, None, None).double())
    expected = exact(forms.stacked(name), name, x, weights, ids, slices=1 if rank.expert_parallel else rank.size)
    assert relative_error(parts[0] + parts[1], expected) < BOUND
    assert min(relative_error(part, expected) for part in parts) > 0.1  # neither rank has all


@pytest.mark.usefixtures("turned_on")
@pytest.mark.parametrize("form", [QUARK, "fused-int8", "compressed-tensors", "quark"])
def test_parameters_are_those_of_vllm(forms: Forms, form: str) -> None:
    """Bit for bit, in names, shapes and dtypes: a restart without the plugin finds what it expects."""
    name = "qwen3_moe-quark0.13-f2f"
    with_plugin = dict(ready(forms(name, form), name).named_parameters())
    quantization._CUSTOMIZED_METHOD_TO_QUANT_CONFIG.clear()
    without = dict(experts_of(load(build(forms(name, form))), name).named_parameters())
    assert with_plugin.keys() == without.keys()
    for key, parameter in without.items():
        assert (parameter.dtype, parameter.shape) == (with_plugin[key].dtype, with_plugin[key].shape)
        assert torch.equal(parameter, with_plugin[key]) or key.endswith("zero_point"), key


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU: torch.cuda.is_available() is false")
@pytest.mark.usefixtures("turned_on")
@pytest.mark.parametrize("rank", [WHOLE, RANKS[3]], ids=str)
@pytest.mark.parametrize("name", ["qwen3_moe-quark0.13-f2f", "qwen3_moe-quark0.11-eager-int8_static"])
def test_a_graph_computes_what_the_cpu_does(
    forms: Forms, monkeypatch: pytest.MonkeyPatch, name: str, rank: Rank
) -> None:
    """Captured once and replayed with other tokens."""
    layer = ready(forms(name, QUARK), name, rank)
    x, weights, ids = inputs(layer, layer.global_num_experts)
    expected = layer.quant_method.apply(layer, x, weights, ids, None, None)
    monkeypatch.setattr(modular_kernel, "current_workspace_manager", lambda: workspaces("cuda"))
    layer.to("cuda")
    with set_current_vllm_config(vars(build(forms(name, QUARK), rank))["engine_config"]):
        layer.quant_method.process_weights_after_loading(layer)
    arguments = [torch.zeros_like(tensor, device="cuda") for tensor in (x, weights, ids)]
    layer.quant_method.apply(layer, *arguments, None, None)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = layer.quant_method.apply(layer, *arguments, None, None)
    for argument, value in zip(arguments, (x, weights, ids), strict=True):
        argument.copy_(value)
    graph.replay()
    assert relative_error(out.cpu(), expected.double()) < BOUND
