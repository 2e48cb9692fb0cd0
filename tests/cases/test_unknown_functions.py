"""Settings and tensors of a known model type that make another function of its experts, or of its routing."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import pytest
import torch
from support.model import Model, edited
from support.reported import bare, codes, finding, refusal

from quarkconv import UnsupportedError, convert_checkpoint, inspect_checkpoint, verify_checkpoint
from quarkconv.targets import TARGETS

EXPERTS: Final = tuple(f"model.layers.{layer}.mlp.experts" for layer in range(2))


def with_settings(**settings: Any) -> Model:
    model = Model()
    model.config |= settings
    return model


def with_biases(*, of: tuple[str, ...] = ("gate_proj", "up_proj", "down_proj")) -> Model:
    def add(name: str, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
        module = name.removesuffix(".weight")
        has = module != name and ".experts." in name and module.endswith(of)
        return {name: tensor} | ({f"{module}.bias": torch.rand(len(tensor))} if has else {})

    return edited(add)


def with_tensors(**tensors: torch.Tensor) -> Model:
    """A model with more tensors of its first expert."""
    model = Model()
    model.first |= {f"{EXPERTS[0]}.0.{name.replace('__', '.')}": tensor for name, tensor in tensors.items()}
    return model


UNKNOWN: Final[dict[str, Callable[[], Model]]] = {
    "an activation that models of the type do not have": lambda: with_settings(hidden_act="mish"),
    "a limit for each layer": lambda: with_settings(swiglu_limit=[7.0, 7.0]),
    "a slope": lambda: with_settings(moe_activation_alpha=1.702),
    "an activation under another key": lambda: with_settings(activation_function="gelu"),
    "a factor on the experts": lambda: with_settings(expert_output_multiplier=0.5),
    "layer 0 routed by token id": lambda: with_settings(hash_moe_layers=[0]),
    "a latent width": lambda: with_settings(moe_latent_size=4),
    "weights on the input": lambda: with_settings(apply_router_weight_on_input=True),
    "a scale on the weights": lambda: with_settings(routed_scaling_factor=2.5),
    "groups of experts": lambda: with_settings(n_group=3),
    "biases": with_biases,
    "a projection beside the others": lambda: with_tensors(
        extra_proj__weight=torch.ones(8, 8, dtype=torch.int8), extra_proj__weight_scale=torch.ones(8)
    ),
    "a norm of an expert": lambda: with_tensors(norm__weight=torch.ones(4)),
    "a factor of an expert": lambda: with_tensors(alpha=torch.ones(4)),
}


@pytest.mark.parametrize("variant", ["a projection beside the others", "a norm of an expert", "a factor of an expert"])
def test_experts_with_tensors_of_unknown_meaning_are_not_fused(variant: str, tmp_path: Path) -> None:
    error = refusal(UNKNOWN[variant]().write(tmp_path), "fused-int8")
    assert (error.exit_code, "its meaning is unknown" in str(error)) == (4, True)


OF_ONE_LAYER: Final = {"a projection beside the others", "a norm of an expert", "a factor of an expert"}
"""Variants of which the second layer is as before."""


@pytest.mark.parametrize("variant", UNKNOWN)
def test_what_is_not_known_is_neither_sound_nor_proven(variant: str, tmp_path: Path) -> None:
    source = UNKNOWN[variant]().write(tmp_path / "source")
    inspection = inspect_checkpoint(source, deep=True)
    assert inspection.ok
    assert not inspection.headline.startswith("Sound")
    assert "the function of the experts" in str(inspection.not_checked)
    result = verify_checkpoint(source, device="cpu")
    numbers = result.numbers
    assert result.ok
    assert [layer.module for layer in numbers.layers] == ([EXPERTS[1]] if variant in OF_ONE_LAYER else [])
    reasons = [layer.reason for layer in numbers.not_checked if layer.module == EXPERTS[0]] or [str(numbers.skipped)]
    assert "the function of the experts is unknown" in reasons[0]
    out = convert_checkpoint(source, "compressed-tensors", tmp_path / "out").output
    verdict = verify_checkpoint(out, source, device="cpu").verdict()
    assert verdict.endswith(f"not checked: numbers{' of 1 layer' if variant in OF_ONE_LAYER else ''}")


@pytest.mark.parametrize(
    "settings", [{"norm_topk_prob": "yes"}, {"num_experts_per_tok": 9}, {"num_experts_per_tok": [2, 1]}]
)
def test_a_routing_that_is_not_known_is_not_sound(settings: dict[str, Any], tmp_path: Path) -> None:
    inspection = inspect_checkpoint(with_settings(**settings).write(tmp_path), deep=True)
    assert not inspection.headline.startswith("Sound")
    assert "the routing (config.json has" in str(inspection.not_checked)


@pytest.mark.parametrize("settings", [{"expert_output_multiplier": 1.0}, {"activation_function": "silu"}])
def test_values_that_change_nothing_leave_a_model_known(settings: dict[str, Any], tmp_path: Path) -> None:
    assert inspect_checkpoint(with_settings(**settings).write(tmp_path), deep=True).not_checked == ()


def test_experts_with_a_gate_that_their_activation_lacks_are_not_computed(tmp_path: Path) -> None:
    model = with_settings(model_type="nemotron_h", mlp_hidden_act="relu2", norm_topk_prob=True, n_group=1, topk_group=1)
    model.config["routed_scaling_factor"] = 1.0
    del model.config["hidden_act"]
    result = verify_checkpoint(model.write(tmp_path), device="cpu")
    assert "the experts have a gate; experts of model type nemotron_h do not" in str(result.numbers.skipped)


def fused_gpt_oss(*, biases: bool) -> Model:
    model = bare()
    model.config |= {"model_type": "gpt_oss", "num_local_experts": 3, "swiglu_limit": 7.0}
    for prefix, shard in zip(EXPERTS, model.shards, strict=True):
        model.remove(prefix)
        for leaf, rows, columns in (("gate_up_proj", 8, 8), ("down_proj", 8, 4)):
            shard[f"{prefix}.{leaf}"] = torch.randint(-127, 127, (3, rows, columns), dtype=torch.int8)
            shard[f"{prefix}.{leaf}_scale"] = torch.rand(3, rows, 1) + 0.1
            if biases:
                shard[f"{prefix}.{leaf}_bias"] = torch.rand(3, rows)
    return model


@pytest.mark.parametrize("biases", [True, False])
def test_int8_rows_of_gate_and_up_that_alternate_are_not_taken_for_halves(biases: bool, tmp_path: Path) -> None:
    source = fused_gpt_oss(biases=biases).write(tmp_path)
    found = finding(source, "experts-not-understood")
    assert "alternating rows of gate and up" in found.message
    assert ("biases" in found.message) is biases
    for target in TARGETS:
        assert refusal(source, target).exit_code == 4
    with pytest.raises(UnsupportedError):
        verify_checkpoint(source, device="cpu")


@pytest.mark.parametrize("of", [("down_proj",), ("0.gate_proj", "0.up_proj", "0.down_proj"), ("1.up_proj",)])
def test_a_bias_of_some_projections_is_unsupported(of: tuple[str, ...], tmp_path: Path) -> None:
    source = with_biases(of=of).write(tmp_path)
    assert "experts-not-understood" in codes(source)
    assert refusal(source, "fused-int8").exit_code == 4


def test_a_bias_of_another_size_is_damage(tmp_path: Path) -> None:
    model = with_biases()
    bias = f"{EXPERTS[0]}.1.up_proj.bias"
    model.set(bias, torch.rand(5))
    source = model.write(tmp_path)
    assert finding(source, "expert-shape").subject == bias
    assert refusal(source, "bf16").exit_code == 3


@pytest.mark.parametrize(
    ("settings", "runs"),
    [
        ({}, True),
        ({"hidden_act": "mish"}, False),
        ({"swiglu_limit": [7.0, 7.0]}, False),
        ({"moe_latent_size": 4}, False),
        ({"num_experts_per_tok": 9}, False),
        ({"norm_topk_prob": None}, True),  # engines take the default of their class
    ],
)
def test_an_engine_has_no_verdict_on_a_function_that_is_not_known(
    settings: dict[str, Any], runs: bool, tmp_path: Path
) -> None:
    inspection = inspect_checkpoint(with_settings(**settings).write(tmp_path))
    assert any(row.verdict == "int8" for row in inspection.engines) is runs
    assert any("in int8" in item.text for item in inspection.advice) is runs
    assert ("not checked with these settings of the layers" in str(inspection.advice)) is not runs


@pytest.mark.parametrize("variant", ["biases", "a projection beside the others", "a norm of an expert"])
def test_an_engine_has_no_verdict_on_experts_that_its_class_does_not_have(variant: str, tmp_path: Path) -> None:
    inspection = inspect_checkpoint(UNKNOWN[variant]().write(tmp_path))
    assert not [row for row in inspection.engines if row.verdict in ("int8", "w8a16")]
