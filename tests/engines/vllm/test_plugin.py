"""The plugin in vLLM's own classes: which layers it takes, and that they compute what the Quark export says.

Experts run on the CPU by the torch twin of the kernels, inside vLLM's modular kernel; where the plugin looks at the
platform it sees one of CUDA.
"""

from __future__ import annotations

import sys
import tomllib
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import vllm
from engines.expected import RANKS, WHOLE, Rank
from engines.forms import QUARK, Forms
from engines.forward import relative_error
from engines.vllm.loading import build, load
from engines.vllm.plugin_layers import BOUND, exact, experts_of, inputs, logger_into, ready, workspaces
from vllm.config import set_current_vllm_config
from vllm.model_executor.layers import activation as activations
from vllm.model_executor.layers import quantization
from vllm.model_executor.layers.fused_moe import modular_kernel
from vllm.model_executor.layers.fused_moe.activation import MoEActivation
from vllm.model_executor.layers.quantization import get_quantization_config

import quarkconv.integrations.vllm as plugin
from quarkconv.kernels.activations import activate_reference, make_activation

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


def test_experts_of_no_rank_are_skipped() -> None:
    from quarkconv.integrations.vllm.experts import local_ids

    ids = torch.tensor([[0, 3], [-1, 2]], dtype=torch.int32)
    mapped = local_ids(ids, torch.tensor([-1, -1, 0, 1], dtype=torch.int32))
    assert mapped.tolist() == [[-1, 1], [-1, 0]]
    assert local_ids(ids, None) is ids


@pytest.mark.parametrize(
    ("expert_map", "first"),
    [
        (None, None),
        ([0, 1, -1, -1], 0),
        ([-1, -1, 0, 1], 2),
        ([-1, 0, 1, -1], 1),
        ([0, -1, 1, -1], None),
        ([-1, 0, -1, 1], None),
        ([1, 0, -1, -1], None),
        ([-1, -1, -1, -1], None),
    ],
)
def test_experts_that_follow_each_other_are_found(expert_map: list[int] | None, first: int | None) -> None:
    from quarkconv.integrations.vllm.experts import first_expert

    assert first_expert(None if expert_map is None else torch.tensor(expert_map, dtype=torch.int32)) == first


@pytest.mark.usefixtures("turned_on")
@pytest.mark.parametrize("rank", RANKS[3:], ids=str)
def test_ids_of_other_ranks_are_outside_of_this_one(forms: Forms, rank: Rank) -> None:
    """By a subtraction as vLLM places experts, and by the map where another map is passed."""
    name = "qwen3_moe-quark0.13-f2f"
    layer = ready(forms(name, QUARK), name, rank)
    experts, own = layer.quant_method.moe_kernel.fused_experts, layer.local_num_experts
    ids = torch.tensor([[*range(-1, layer.global_num_experts)]], dtype=torch.int32)
    for expert_map in (layer.expert_map, layer.expert_map.flip(0)):
        found = experts._local_ids(ids, expert_map)
        assert found.dtype == torch.int32
        expected = [-1, *expert_map.tolist()]
        assert [local if 0 <= local < own else -1 for local in found[0].tolist()] == expected


MAPPED: dict[str, tuple[dict[str, float], Any]] = {
    "silu": ({}, None),
    "silu, limited": ({"swiglu_limit": 0.5}, lambda: activations.SiluAndMulWithClamp(0.5, compile_native=False)),
    "swigluoai_uninterleave": (
        {"swiglu_limit": 0.5, "swiglu_alpha": 1.702, "swiglu_beta": 1.0},
        lambda: activations.SiluAndMulWithClamp(0.5, 1.702, 1.0, compile_native=False),
    ),
    "situ": ({"activation_situ_beta": 1.5}, lambda: activations.SituAndMul(1.5, compile_native=False)),
    "situ, limited": (
        {"activation_situ_beta": 1.5, "activation_situ_linear_beta": 0.7},
        lambda: activations.SituAndMul(1.5, 0.7, compile_native=False),
    ),
    "swiglustep": ({}, lambda: activations.SwigluStepAndMul()),
}
"""Activation -> parameters in vLLM's MoE config, and vLLM's own class of it."""


@pytest.mark.parametrize("name", MAPPED)
def test_activations_are_those_of_vllm(forms: Forms, name: str) -> None:
    from quarkconv.integrations.vllm.experts import activation_arguments

    if name.split(",")[0] not in [each.value for each in MoEActivation]:
        pytest.skip(f"vLLM {vllm.__version__} has no such activation")
    fields, own = MAPPED[name]
    arguments = activation_arguments(MoEActivation(name.split(",")[0]), SimpleNamespace(**fields))
    assert arguments is not None
    values = tuple(arguments.get(key) for key in ("activation_limit", "activation_alpha"))
    x = 4 * torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
    gate, up = x.chunk(2, 1)
    ours = activate_reference(gate, up, make_activation(arguments["activation"], *values))
    if own is None:
        torch.testing.assert_close(ours, torch.nn.functional.silu(gate) * up)
        return
    with set_current_vllm_config(vars(build(forms("qwen3_moe-quark0.13-f2f", QUARK)))["engine_config"]):
        torch.testing.assert_close(ours, own().forward_native(x))


def _moe(**changes: Any) -> Any:
    def change(moe: Any) -> None:
        for name, value in changes.items():
            setattr(moe, name, value)

    return change


def _data_parallel(moe: Any) -> None:
    moe.moe_parallel_config.dp_size = 2


def _passthrough(moe: Any) -> None:
    moe.moe_parallel_config.all2all_backend = "passthrough"


FALLBACKS: dict[str, tuple[Any, str]] = {
    "LoRA": (_moe(is_lora_enabled=True), "LoRA"),
    "data parallel": (_data_parallel, "parallel config"),
    "experts that reduce over the ranks": (_passthrough, "parallel config"),
    "a requested backend": (_moe(moe_backend="triton"), "--moe-backend triton was requested"),
    "interleaved gate and up": (_moe(activation=MoEActivation.SWIGLUOAI), "activation"),
    "gelu with a limit": (_moe(activation=MoEActivation.GELU, swiglu_limit=7.0), "parameters of gelu"),
    "float32": (_moe(in_dtype=torch.float32), "float32"),
}


@pytest.mark.parametrize("case", FALLBACKS)
def test_other_layers_stay_on_vllm_and_the_log_gives_the_reason(turned_on: list[str], forms: Forms, case: str) -> None:
    from quarkconv.integrations.vllm.method import backend_name, replace_method

    change, reason = FALLBACKS[case]
    name = "qwen3_moe-quark0.13-f2f"
    stock = experts_of(build(forms(name, "fused-int8")), name).quant_method.stock
    if change is _passthrough and not hasattr(stock.moe.moe_parallel_config, "use_passthrough_all2all"):
        pytest.skip(f"vLLM {vllm.__version__} has no such backend")
    turned_on.clear()
    change(stock.moe)
    assert replace_method(stock) is stock
    [line] = turned_on
    own = backend_name(stock.int8_backend)
    assert own in ("TRITON", "CPU")  # 0.26 chooses by the real platform here
    assert line.startswith(f"quarkconv: INT8 MoE layers stay on vLLM's own {own} backend: ")
    assert reason in line


@pytest.mark.usefixtures("turned_on")
def test_a_cpu_stays_on_vllm(forms: Forms, monkeypatch: pytest.MonkeyPatch) -> None:
    from quarkconv.integrations.vllm import experts

    monkeypatch.setattr(experts, "current_platform", vllm.platforms.current_platform)
    name = "qwen3_moe-quark0.13-f2f"
    method = experts_of(build(forms(name, QUARK)), name).quant_method
    assert type(method).__name__ == "QuarkW8A8Int8MoEMethod"


@pytest.mark.usefixtures("turned_on")
def test_zero_points_of_static_activations_are_refused(forms: Forms) -> None:
    name = "qwen3_moe-quark0.11-eager-int8_static"
    layer = experts_of(load(build(forms(name, QUARK))), name)
    layer.w2_input_zero_point.data[1] = 3
    with pytest.raises(ValueError, match=r"w2_input_zero_point: expected 0 .*, found 3"):
        layer.quant_method.process_weights_after_loading(layer)


@pytest.mark.parametrize("value", [None, "", "0", "true"])
def test_the_plugin_is_off_without_the_variable(monkeypatch: pytest.MonkeyPatch, value: str | None) -> None:
    monkeypatch.setattr(quantization, "_CUSTOMIZED_METHOD_TO_QUANT_CONFIG", {})
    monkeypatch.delenv(plugin.VARIABLE, raising=False)
    if value is not None:
        monkeypatch.setenv(plugin.VARIABLE, value)
    plugin.register()
    assert quantization._CUSTOMIZED_METHOD_TO_QUANT_CONFIG == {}


@pytest.mark.usefixtures("turned_on")
def test_both_configs_are_registered_once_and_again() -> None:
    plugin.register()
    for name, own in (("quark", "QuarkconvQuarkConfig"), ("compressed-tensors", "QuarkconvCompressedTensorsConfig")):
        assert get_quantization_config(name).__name__ == own


def test_another_release_of_vllm_is_refused_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    lines: list[str] = []
    monkeypatch.setattr("vllm.logger.init_logger", lambda _: logger_into(lines))
    monkeypatch.setattr(quantization, "_CUSTOMIZED_METHOD_TO_QUANT_CONFIG", {})
    monkeypatch.setenv(plugin.VARIABLE, "1")
    monkeypatch.setattr(vllm, "__version__", "0.34.0")
    plugin.register()
    assert lines == ["quarkconv: QUARKCONV_VLLM=1 has no effect: the plugin supports vLLM 0.26 to 0.33, found 0.34.0"]
    assert quantization._CUSTOMIZED_METHOD_TO_QUANT_CONFIG == {}


def test_a_missing_module_is_reported_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    lines: list[str] = []
    monkeypatch.setattr("vllm.logger.init_logger", lambda _: logger_into(lines))
    monkeypatch.setattr(quantization, "_CUSTOMIZED_METHOD_TO_QUANT_CONFIG", {})
    monkeypatch.setitem(sys.modules, "quarkconv.integrations.vllm.configs", None)
    monkeypatch.setenv(plugin.VARIABLE, "1")
    plugin.register()
    [line] = lines
    assert line.startswith("quarkconv: QUARKCONV_VLLM=1 has no effect: import of quarkconv.integrations.vllm.configs")
    assert quantization._CUSTOMIZED_METHOD_TO_QUANT_CONFIG == {}


@pytest.mark.parametrize(
    ("version", "tested"),
    [
        ("0.25.1", False),
        ("0.26.0", True),
        ("0.33.1rc2+cu130", True),
        ("0.33", True),
        ("0.34.0", False),
        ("1.0", False),
        ("dev", False),
    ],
)
def test_versions(version: str, tested: bool) -> None:
    assert plugin.is_tested(version) == tested


def test_vllm_finds_the_plugin() -> None:
    project = tomllib.loads((Path(__file__).parents[3] / "pyproject.toml").read_text())["project"]
    module, _, function = project["entry-points"]["vllm.general_plugins"]["quarkconv"].partition(":")
    assert getattr(import_module(module), function) is plugin.register


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
