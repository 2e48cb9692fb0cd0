"""Which layers the plugin takes, which stay on vLLM's own backends, and when it is off."""

from __future__ import annotations

import sys
import tomllib
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
import vllm
from engines.forms import QUARK, Forms
from engines.vllm.loading import build, load
from engines.vllm.plugin_layers import experts_of, logger_into
from vllm.model_executor.layers import quantization
from vllm.model_executor.layers.fused_moe.activation import MoEActivation
from vllm.model_executor.layers.quantization import get_quantization_config

import quarkconv.integrations.vllm as plugin


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
