"""The configs of engine formats, as conversion writes them."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from quarkconv.scheme.declared import DeclaredScheme, UnknownScheme
from quarkconv.scheme.formats.readers import declared_scheme
from quarkconv.scheme.spec import (
    FLOAT,
    INPUT_PER_TOKEN,
    INPUT_STATIC,
    WEIGHT_PER_CHANNEL,
    WEIGHT_PER_TENSOR,
    ModuleScheme,
    TensorSpec,
)

PTPC = ModuleScheme(WEIGHT_PER_CHANNEL, INPUT_PER_TOKEN)
WEIGHTS = {"num_bits": 8, "type": "int", "strategy": "channel", "symmetric": True, "dynamic": False}
ACTIVATIONS = {"num_bits": 8, "type": "int", "strategy": "token", "symmetric": True, "dynamic": True}
CONFIG: dict[str, Any] = {
    "quant_method": "compressed-tensors",
    "format": "int-quantized",
    "quantization_status": "compressed",
    "config_groups": {"group_0": {"targets": ["Linear"], "weights": WEIGHTS, "input_activations": ACTIVATIONS}},
    "ignore": ["lm_head", "model.layers.0.mlp.gate", "re:.*visual.*"],
}
"""What vLLM 0.28 parses."""


def read(quantization: dict[str, Any]) -> DeclaredScheme:
    scheme = declared_scheme(copy.deepcopy(quantization))
    assert scheme is not None
    return scheme


def grouped(**groups: dict[str, Any]) -> DeclaredScheme:
    return read({**CONFIG, "config_groups": groups})


@pytest.mark.parametrize(
    ("module", "expected"),
    [
        ("model.layers.0.self_attn.q_proj", PTPC),
        ("lm_head", FLOAT),
        ("model.lm_head", PTPC),
        ("model.layers.0.mlp.gate", FLOAT),
        ("model.layers.0.mlp.gate_proj", PTPC),
        ("model.visual.blocks.0.attn.qkv", FLOAT),
    ],
)
def test_a_config_of_compressed_tensors_is_read(module: str, expected: ModuleScheme) -> None:
    scheme = read(CONFIG)
    assert scheme.method == "compressed-tensors"
    assert scheme.default == PTPC
    assert scheme.names[PTPC] == "ptpc_int8"
    assert scheme.resolve(module) == expected
    assert scheme.problems == []


def test_an_ignored_module_of_experts_ignores_all_of_them() -> None:
    scheme = read({**CONFIG, "ignore": ["model.layers.0.mlp.experts"]})
    for layer, expected in ((0, FLOAT), (1, PTPC)):
        experts = f"model.layers.{layer}.mlp.experts"
        assert scheme.resolve_expert(experts, f"{experts}.0.up_proj") == expected


def test_globs_mean_nothing_here() -> None:
    assert read({**CONFIG, "ignore": ["*lm_head"]}).resolve("lm_head") == PTPC


def test_groups_by_name_come_before_the_class() -> None:
    scheme = grouped(
        group_0={"targets": ["Linear"], "weights": WEIGHTS, "input_activations": ACTIVATIONS},
        group_1={"targets": ["re:.*q_proj$", "lone"], "weights": {**WEIGHTS, "strategy": "tensor"}},
    )
    tensor = ModuleScheme(WEIGHT_PER_TENSOR, None)
    assert scheme.resolve("model.layers.0.self_attn.q_proj") == tensor
    assert scheme.resolve("lone") == tensor
    assert scheme.resolve("model.layers.0.self_attn.k_proj") == PTPC
    assert scheme.default == PTPC


def test_without_a_group_for_linears_the_rest_is_float() -> None:
    scheme = grouped(group_0={"targets": ["re:.*experts.*"], "weights": WEIGHTS, "input_activations": ACTIVATIONS})
    assert scheme.default == FLOAT
    assert scheme.resolve("model.layers.0.mlp.experts.0.up_proj") == PTPC
    assert scheme.resolve("lm_head") == FLOAT


def test_static_activations_with_a_scale_for_each_row_are_int8_static_here() -> None:
    static = {**ACTIVATIONS, "strategy": "tensor", "dynamic": False}
    scheme = grouped(group_0={"targets": ["Linear"], "weights": WEIGHTS, "input_activations": static})
    assert scheme.default == ModuleScheme(WEIGHT_PER_CHANNEL, INPUT_STATIC)
    assert scheme.names[scheme.default] == "int8_static"


@pytest.mark.parametrize(
    ("weights", "dtype", "granularity"),
    [
        ({**WEIGHTS, "num_bits": 4, "strategy": "group"}, "int4", "group"),
        ({**WEIGHTS, "type": "float"}, "fp8_e4m3", "per_channel"),
        ({**WEIGHTS, "strategy": None}, "int8", "per_tensor"),
    ],
)
def test_other_formats_are_described(weights: dict[str, Any], dtype: str, granularity: str) -> None:
    scheme = grouped(group_0={"targets": ["Linear"], "weights": weights})
    assert scheme.default == ModuleScheme(TensorSpec(dtype, granularity, symmetric=True, dynamic=False), None)
    assert scheme.default not in scheme.names


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"config_groups": []}, "config_groups"),
        ({"config_groups": {"g": 1}}, "config_groups.g"),
        ({"config_groups": {"g": {"targets": "Linear"}}}, "config_groups.g.targets"),
        ({"config_groups": {"g": {"weights": {"type": 8}}}}, "config_groups.g.weights"),
        ({"config_groups": {"g": {"input_activations": {"num_bits": "8"}}}}, "config_groups.g.input_activations"),
        ({"ignore": "lm_head"}, "ignore"),
    ],
)
def test_what_is_ignored_is_named(change: dict[str, Any], field: str) -> None:
    assert [problem.field for problem in read({**CONFIG, **change}).problems] == [field]


@pytest.mark.parametrize("target", ["re:(", "re:*x", "re:[[a]"])
def test_an_invalid_expression_matches_nothing(target: str) -> None:
    scheme = grouped(group_0={"targets": [target], "weights": WEIGHTS, "input_activations": ACTIVATIONS})
    assert scheme.resolve("model.layers.0.self_attn.q_proj") == FLOAT


def test_a_config_of_w8a8_int8_is_read() -> None:
    scheme = read({"quant_method": "w8a8_int8", "ignore": ["lm_head"]})
    assert (scheme.method, scheme.default) == ("w8a8_int8", PTPC)
    assert scheme.resolve("lm_head") == FLOAT
    assert scheme.resolve("model.layers.0.self_attn.q_proj") == PTPC


def test_of_another_method_only_the_name_is_known() -> None:
    scheme = read({"quant_method": "gptq", "bits": 4})
    assert isinstance(scheme, UnknownScheme)
    assert (scheme.method, scheme.resolve("lm_head"), scheme.problems) == ("gptq", FLOAT, [])
