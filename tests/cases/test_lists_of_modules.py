"""Lists of modules in configs, as engines read them: merged names, and expressions that do not compile."""

from __future__ import annotations

from pathlib import Path
from typing import Final

import pytest
import torch
from support.model import Model
from support.reported import codes, compressed_tensors, finding

from quarkconv import convert_checkpoint, inspect_checkpoint, verify_checkpoint
from quarkconv.scheme.formats.readers import declared_scheme

ATTENTION: Final = tuple(f"model.layers.{layer}.self_attn" for layer in range(2))


def with_float_attention(ignore: list[str]) -> Model:
    """Query, key and value in BF16, the rest in int8."""
    model = Model()
    model.config["quantization_config"] = compressed_tensors(ignore)
    for layer in ATTENTION:
        shard = model.shard(f"{layer}.o_proj.weight")
        shard |= {f"{layer}.{part}_proj.weight": torch.rand(8, 8).bfloat16() for part in "qkv"}
    return model


def test_the_name_of_a_merged_linear_means_its_parts(tmp_path: Path) -> None:
    source = with_float_attention([f"{layer}.qkv_proj" for layer in ATTENTION]).write(tmp_path / "source")
    assert codes(source) == {}
    for target in ("compressed-tensors", "w8a8-int8", "quark"):
        out = convert_checkpoint(source, target, tmp_path / target).output
        assert codes(out) == {}
        assert verify_checkpoint(out, source, device="cpu").verdict() == "Verified"


def test_the_name_of_a_merged_linear_of_one_layer_means_no_other(tmp_path: Path) -> None:
    source = with_float_attention([f"{ATTENTION[0]}.qkv_proj"]).write(tmp_path)
    found = finding(source, "quantized-but-stored-float")
    assert (found.subject, found.count) == (f"{ATTENTION[1]}.k_proj", 3)


def test_vllm_expands_merged_names_of_quark_configs_first_so_that_they_mean_nothing(tmp_path: Path) -> None:
    model = with_float_attention([])
    model.config["quantization_config"] = Model().quantization
    model.quantization["exclude"] += [f"{layer}.qkv_proj" for layer in ATTENTION]
    assert finding(model.write(tmp_path), "quantized-but-stored-float").count == 6


@pytest.mark.parametrize("pattern", ["re:*gate", "re:[", "re:(?P<a"])
@pytest.mark.parametrize("method", ["quark", "compressed-tensors", "w8a8_int8"])
def test_an_expression_that_does_not_compile_is_an_error_on_which_engines_fail(
    method: str, pattern: str, tmp_path: Path
) -> None:
    model = Model()
    if method == "compressed-tensors":
        model.config["quantization_config"] = compressed_tensors([pattern])
    elif method == "w8a8_int8":
        ignored = ["lm_head", "re:.*mlp.gate$", pattern]
        model.config["quantization_config"] = {"quant_method": method, "ignore": ignored}
    else:
        model.quantization["exclude"].append(pattern)
    source = model.write(tmp_path / "source")
    assert codes(source) == {"quant-config-invalid": "error"}
    assert pattern in finding(source, "quant-config-invalid").message
    forms = {"w8a8_int8": "w8a8-int8"}
    found = inspect_checkpoint(source).engines
    assert not any(fact.form == forms.get(method, method) and fact.verdict == "int8" for fact in found)
    out = convert_checkpoint(source, "fused-int8", tmp_path / "out").output
    assert verify_checkpoint(out, source, device="cpu").verdict() == "Verified"


def test_targets_may_name_merged_linears() -> None:
    config = compressed_tensors([])
    config["config_groups"]["group_0"]["targets"] = ["model.layers.0.mlp.gate_up_proj"]
    declared = declared_scheme(config)
    assert declared is not None
    quantized = {
        name: declared.resolve(f"model.layers.0.mlp.{name}").weight is not None for name in ("up_proj", "down_proj")
    }
    assert quantized == {"up_proj": True, "down_proj": False}
