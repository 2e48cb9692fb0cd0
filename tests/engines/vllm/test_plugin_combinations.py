"""The plugin beside what else vLLM combines with experts: shared experts, graphs, LoRA, more ranks, draft models."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import vllm
from engines.expected import WHOLE, Rank
from engines.forms import QUARK, Forms
from engines.forward import relative_error
from engines.vllm import loading
from engines.vllm.loading import build, load
from engines.vllm.plugin_layers import BOUND, exact, experts_of, inputs, ready
from vllm.config import LoRAConfig, set_current_vllm_config
from vllm.distributed import parallel_state
from vllm.engine.arg_utils import EngineArgs
from vllm.forward_context import set_forward_context
from vllm.model_executor.layers import quantization
from vllm.model_executor.model_loader import reload
from vllm.model_executor.model_loader.utils import initialize_model

SHARED = "qwen2_moe-0.11-eager-shared_expert"
NAME = "qwen3_moe-quark0.13-f2f"
STATIC = "qwen3_moe-quark0.11-eager-int8_static"
if not hasattr(torch.ops._C, "silu_and_mul"):  # vLLM before 0.31 looks for it where it builds an activation
    torch.library.define("_C::silu_and_mul", "(Tensor! out, Tensor input) -> ()")


def read_by(layer: Any) -> list[int | None]:
    """Addresses of what the experts of a layer read beside its weights."""
    experts = layer.quant_method.moe_kernel.fused_experts
    read = (experts.w1_scale, experts.w2_scale, experts.a1_scale, experts.a2_scale)
    return [None if tensor is None else tensor.data_ptr() for tensor in read]


def loaded(folder: Path, name: str) -> tuple[torch.nn.Module, Any]:
    """A model and its experts of layer 1, loaded once, as vLLM has them before it makes their kernel."""
    model = build(folder)
    layer = experts_of(model, name)
    reload.record_metadata_for_reloading(layer)
    load(model)
    return model, layer


def load_again(model: torch.nn.Module, layer: Any) -> None:
    """Load a checkpoint again by vLLM's own reloading, which restores the parameters that it replaced."""
    config = vars(model)["engine_config"]
    with set_current_vllm_config(config):
        reload.initialize_layerwise_reload(layer)
        load(model)
        reload.finalize_layerwise_reload(layer, config.model_config)


class Half(torch.nn.Module):
    """In place of shared experts, whose INT8 linears are compiled code."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 0.5 * x


def runner_of(model: torch.nn.Module, routed: tuple[torch.Tensor, torch.Tensor]) -> Any:
    """vLLM's runner of layer 1, ready, with `Half` as shared experts and fixed weights and ids of experts."""
    layer = experts_of(model, SHARED)
    with set_current_vllm_config(vars(model)["engine_config"]):
        layer.quant_method.process_weights_after_loading(layer)
    runner: Any = model.get_submodule("model.layers.1.mlp.experts")
    runner.router.select_experts = lambda **_: routed
    runner._shared_experts._layer = Half()
    return runner


def compiled(function: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """In one graph: fails where a part of it is not an operator."""
    return torch.compile(function, backend="eager", fullgraph=True)


@pytest.mark.usefixtures("turned_on")
@pytest.mark.parametrize("compile_graph", [False, True], ids=["eager", "compiled"])
def test_shared_experts_are_added_once(forms: Forms, compile_graph: bool) -> None:
    """By vLLM's runner, in whose graph the layer is one operator."""
    model = load(build(forms(SHARED, QUARK)))
    config = vars(model)["engine_config"]
    layer = experts_of(model, SHARED)
    x, weights, ids = inputs(layer, layer.global_num_experts)
    runner = runner_of(model, (weights, ids))
    assert type(layer.quant_method).__name__ == "QuarkconvMoEMethod"
    call = runner
    if compile_graph:  # on a CPU the runner calls the operator's function instead
        runner._forward_entry = torch.ops.vllm.moe_forward_shared
        call = compiled(lambda *arguments: runner(*arguments))
    with set_current_vllm_config(config), set_forward_context(None, config):
        out = call(x, torch.zeros(len(x), layer.global_num_experts))
    expected = exact(forms.stacked(SHARED), SHARED, x, weights, ids) + 0.5 * x.double()
    assert relative_error(out, expected) < BOUND


def build_with(folder: Any, change: Callable[[Any], None], rank: Rank = WHOLE) -> torch.nn.Module:
    """A model whose configuration was changed before vLLM built it."""
    config = loading.engine_config(folder, rank)
    change(config)
    with loading._as_rank(config, rank):
        model: torch.nn.Module = initialize_model(config)
    return model


def _lora(config: Any) -> None:
    config.lora_config = LoRAConfig(max_lora_rank=8, max_loras=1)


def _rebalancing(config: Any) -> None:
    config.parallel_config.enable_eplb = True


def test_lora_stays_on_vllm(turned_on: list[str], forms: Forms) -> None:
    method = experts_of(build_with(forms(NAME, QUARK), _lora), NAME).quant_method
    assert type(method).__name__ == "QuarkW8A8Int8MoEMethod"
    assert turned_on
    assert all(line.endswith("backend: kernel does not support LoRA") for line in turned_on)


@pytest.mark.parametrize("experts", [False, True], ids=["tensor", "expert"])
def test_data_parallel_ranks_stay_on_vllm(
    turned_on: list[str],
    forms: Forms,
    monkeypatch: pytest.MonkeyPatch,
    experts: bool,
) -> None:
    """With tensor or with expert parallel experts."""
    build(forms(NAME, QUARK))  # creates the groups
    turned_on.clear()
    monkeypatch.setattr(parallel_state._DP, "world_size", 2)

    def two(config: Any) -> None:
        config.parallel_config.data_parallel_size = 2
        config.parallel_config.enable_expert_parallel = experts

    layer = experts_of(build_with(forms(NAME, QUARK), two), NAME)
    parallel = layer.moe_config.moe_parallel_config
    assert (parallel.use_ep, parallel.ep_size if experts else parallel.tp_size) == (experts, 2)
    assert type(layer.quant_method).__name__ == "QuarkW8A8Int8MoEMethod"
    assert turned_on
    assert all("parallel config" in line for line in turned_on)


@pytest.mark.parametrize("plugin", [True, False])
def test_vllm_refuses_to_rebalance_int8_experts(forms: Forms, plugin: bool, request: pytest.FixtureRequest) -> None:
    """With the plugin as without."""
    if plugin:
        request.getfixturevalue("turned_on")
    else:
        quantization._CUSTOMIZED_METHOD_TO_QUANT_CONFIG.clear()
    with pytest.raises(NotImplementedError, match="EPLB is not supported"):
        build_with(forms(NAME, QUARK), _rebalancing, Rank(2, 0, True))


@pytest.mark.skipif(vllm.__version__ < "0.28", reason="vLLM before 0.28 has no attention of DeepSeek on a CPU")
@pytest.mark.parametrize("form", [QUARK, "compressed-tensors"])
def test_experts_of_a_draft_model_run_too(turned_on: list[str], forms: Forms, form: str) -> None:
    """Of multi-token prediction: the layer that is appended to DeepSeek V3."""
    arguments = EngineArgs(
        str(forms("deepseek_v3-0.13-f2f-mtp", form)), dtype="bfloat16", load_format="safetensors", max_model_len=64,
        enforce_eager=True, skip_tokenizer_init=True, speculative_config={"method": "mtp", "num_speculative_tokens": 1},
    )  # fmt: skip
    config = arguments.create_engine_config()
    with loading._as_rank(config, WHOLE):
        model = initialize_model(config, model_config=config.speculative_config.draft_model_config)
    methods = {name: m.quant_method for name, m in model.named_modules() if name.endswith("routed_experts")}
    [(name, method)] = methods.items()
    assert ".mtp_block." in name
    assert type(method).__name__ == "QuarkconvMoEMethod"
    assert any(line.startswith("Using quarkconv Int8 MoE backend") for line in turned_on)


@pytest.mark.usefixtures("turned_on")
@pytest.mark.parametrize("name", [NAME, f"{NAME}-per_tensor_weight"])
def test_captured_graphs_see_the_scales_of_weights_that_are_loaded_again(forms: Forms, name: str) -> None:
    """vLLM copies new weights into the parameters that graphs were captured with; scales per tensor are repeated."""
    layer = experts_of(load(build(forms(name, QUARK))), name)
    addresses, outs = [], []
    x, weights, ids = inputs(layer, layer.global_num_experts)
    for _ in range(2):
        layer.quant_method.process_weights_after_loading(layer)
        experts = layer.quant_method.moe_kernel.fused_experts
        addresses.append((experts.w1_scale.data_ptr(), experts.w2_scale.data_ptr()))
        outs.append(layer.quant_method.apply(layer, x, weights, ids, None, None))
        layer.w2_weight_scale.data.mul_(2)
    assert addresses[0] == addresses[1]
    assert torch.equal(outs[1], 2 * outs[0])


@pytest.mark.usefixtures("turned_on")
@pytest.mark.parametrize("name", [NAME, f"{NAME}-per_tensor_weight"])
def test_weights_that_vllm_loads_again_are_read(forms: Forms, name: str) -> None:
    """By vLLM's own reloading, which restores the parameters that it replaced while it loaded."""
    model, layer = loaded(forms(name, QUARK), name)
    layer.quant_method.process_weights_after_loading(layer)
    x, weights, ids = inputs(layer, layer.global_num_experts)
    expected = layer.quant_method.apply(layer, x, weights, ids, None, None)
    addresses = read_by(layer)
    layer.w2_weight.data.zero_()
    assert not layer.quant_method.apply(layer, x, weights, ids, None, None).any()
    load_again(model, layer)
    assert read_by(layer) == addresses
    assert torch.equal(layer.quant_method.apply(layer, x, weights, ids, None, None), expected)


@pytest.mark.usefixtures("turned_on")
@pytest.mark.parametrize("name", [NAME, f"{NAME}-per_tensor_weight"])
def test_scales_that_change_are_read_when_vllm_loads_again(forms: Forms, name: str) -> None:
    """Stale ones would give another result than a layer that is loaded once."""
    once = ready(forms(name, QUARK), name)
    x, weights, ids = inputs(once, once.global_num_experts)
    expected = once.quant_method.apply(once, x, weights, ids, None, None)
    model, layer = loaded(forms(name, QUARK), name)
    scales = [parameter for key, parameter in layer.named_parameters() if key.endswith("_scale")]
    assert len(scales) == 2
    for scale in scales:
        scale.data.mul_(2)
    layer.quant_method.process_weights_after_loading(layer)
    assert relative_error(layer.quant_method.apply(layer, x, weights, ids, None, None), expected) > 0.1
    load_again(model, layer)
    assert torch.equal(layer.quant_method.apply(layer, x, weights, ids, None, None), expected)


@pytest.mark.usefixtures("turned_on")
def test_static_activations_are_not_loaded_again(forms: Forms) -> None:
    """vLLM counts input scales twice, drops the scales that come last, and says nothing."""
    model, layer = loaded(forms(STATIC, QUARK), STATIC)
    layer.quant_method.process_weights_after_loading(layer)
    with set_current_vllm_config(vars(model)["engine_config"]):
        reload.initialize_layerwise_reload(layer)
        with pytest.raises(ValueError, match="leaves out scales when it loads int8_static experts again; restart"):
            load(model)
