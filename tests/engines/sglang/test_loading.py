"""SGLang's own loader on what is converted: every parameter of its model holds what stacking the Quark export gives.

The parameters are poisoned before, so that one that SGLang leaves alone, for a name that it skips, is found.
"""

from __future__ import annotations

import json

import pytest
import torch
from engines.expected import RANKS, WHOLE, Rank, Stacked
from engines.forms import Forms
from engines.sglang.exports import prepare
from engines.sglang.loading import build, load
from sglang.srt.layers.quantization.unquant import UnquantizedFusedMoEMethod, UnquantizedLinearMethod
from sglang.srt.layers.quantization.w8a8_int8 import W8A8Int8Config, W8A8Int8LinearMethod, W8A8Int8MoEMethod
from support.exports import Checkpoints

EXPORTS = (
    "qwen3_moe-quark0.13-f2f",
    "qwen3_moe-quark0.13-f2f-per_tensor_weight",
    "mixtral-quark0.11-eager",
    "minimax_m2-quark0.13-f2f",
    "deepseek_v3-quark0.13-f2f",
    "deepseek_v3-0.13-f2f-mtp",
    "step3p5-like-3key_fused",
    "glm4_moe-0.13-f2f-experts_only",
    "glm4_moe-0.13-f2f-mtp_bf16",
    "qwen2_moe-0.11-eager-shared_expert",
    "qwen3_moe-0.11-eager-layer_type",
    "qwen3_moe-0.11-eager-kv_cache_fp8",
    "qwen3_moe-0.13-f2f-attention_per_tensor",
    "qwen3_moe-0.13-f2f-experts_per_projection",
)
W8A8 = "w8a8_int8"
FORMS = {"w8a8-int8": None, "compressed-tensors": W8A8, "bf16": None}
"""Target -> what to give as ``--quantization``."""


@pytest.fixture(scope="module")
def forms(checkpoints: Checkpoints, tmp_path_factory: pytest.TempPathFactory) -> Forms:
    return Forms(checkpoints, tmp_path_factory.mktemp("sglang"), prepare)


def mismatches(model: torch.nn.Module, stacked: Stacked, rank: Rank, target: str) -> list[str]:
    """Names of the parameters that do not hold what they must, bit for bit."""
    wrong = []
    for name, parameter in model.named_parameters():
        derived = name.endswith(".self_attn.w_scale")  # from kv_b_proj, after loading
        if derived or stacked.left_out(name):
            continue
        expected = stacked.parameter(name, rank, dequantized=target == "bf16")
        if expected.is_floating_point() and not name.endswith("_scale"):
            expected = expected.to(parameter.dtype)  # routers and biases in F32
        if expected.dtype != parameter.dtype or not torch.equal(expected, parameter.data):
            wrong.append(name)
    return wrong


@pytest.mark.parametrize("target", FORMS)
@pytest.mark.parametrize("name", EXPORTS)
def test_every_parameter_is_what_stacking_gives(forms: Forms, name: str, target: str) -> None:
    folder = forms(name, target)
    for rank in RANKS:
        model = load(build(folder, rank, FORMS[target]), folder)
        assert mismatches(model, forms.stacked(name), rank, target) == [], rank
        if target != "bf16":
            assert any(key.endswith("experts.w13_weight_scale") for key, _ in model.named_parameters())


@pytest.mark.parametrize("target", ["w8a8-int8", "compressed-tensors"])
@pytest.mark.parametrize("name", EXPORTS)
def test_int8_is_computed_where_int8_is_stored(forms: Forms, name: str, target: str) -> None:
    stacked, seen = forms.stacked(name), {True: 0, False: 0}
    for module_name, module in build(forms(name, target), WHOLE, FORMS[target]).named_modules():
        method = getattr(module, "quant_method", None)
        experts = hasattr(module, "w13_weight")
        if method is None or not (experts or hasattr(module, "weight")) or "Embedding" in type(method).__name__:
            continue
        int8 = stacked.is_int8(module_name)
        seen[int8] += 1
        quantized = W8A8Int8MoEMethod if experts else W8A8Int8LinearMethod
        left = UnquantizedFusedMoEMethod if experts else UnquantizedLinearMethod
        assert isinstance(method, quantized if int8 else left), module_name
    assert all(seen.values())


@pytest.mark.parametrize("name", EXPORTS)
def test_the_config_is_accepted(forms: Forms, name: str) -> None:
    config = json.loads((forms(name, "w8a8-int8") / "config.json").read_text())
    read = W8A8Int8Config.from_config(config["quantization_config"])
    assert read.ignore == config["quantization_config"]["ignore"]
    assert read.ignore
    assert not read.is_dynamic


REFUSED = {
    ("minimax_m2-quark0.13-f2f", "quark", None): (RuntimeError, "Unsupported FusedMoe scheme"),
    ("qwen3_moe-quark0.13-f2f", "quark", None): (NotImplementedError, "No quark compatible scheme was found"),
    ("qwen3_moe-quark0.13-f2f", "quark", W8A8): (ValueError, "does not match the quantization method"),
    ("minimax_m2-quark0.13-f2f", "compressed-tensors", None): (NotImplementedError, "only for NPU for now"),
    ("minimax_m2-quark0.13-f2f", "fused-int8", None): (NotImplementedError, "only for NPU for now"),
    ("qwen3_moe-0.13-f2f-layer_excluded", "w8a8-int8", None): (TypeError, "UnquantizedLinearMethod.create_weights"),
    ("qwen3_moe-0.13-f2f-layer_excluded", "compressed-tensors", W8A8): (TypeError, "UnquantizedLinearMethod"),
}
"""Export, target and ``--quantization`` -> how SGLang refuses it. Of exports with attention in int8, the scheme of the
linears asks for CUDA before that of the experts is looked up. A layer whose experts were left in float gets the method
of a linear."""


@pytest.mark.parametrize(("name", "target", "quantization"), REFUSED)
def test_what_sglang_refuses(forms: Forms, name: str, target: str, quantization: str | None) -> None:
    error, message = REFUSED[name, target, quantization]
    with pytest.raises(error, match=message):
        build(forms(name, target), WHOLE, quantization)


@pytest.mark.parametrize("name", ["qwen3_moe-quark0.13-f2f", "mixtral-quark0.11-eager", "deepseek_v3-quark0.13-f2f"])
def test_fused_experts_are_skipped_in_silence(forms: Forms, name: str) -> None:
    """With ``--quantization w8a8_int8``. Of DeepSeek the codes are loaded, and the scales are skipped."""
    folder = forms(name, "fused-int8")
    wrong = mismatches(load(build(folder, WHOLE, W8A8), folder), forms.stacked(name), WHOLE, "fused-int8")
    assert wrong
    assert all(".experts.w" in parameter for parameter in wrong)
    assert any(parameter.endswith("w13_weight_scale") for parameter in wrong)
