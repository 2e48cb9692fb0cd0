"""A config.json of another model than the tensors, and routers that do not fit: named, and never called sound."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import pytest
import torch
from support.checkpoints import edit_checkpoint
from support.exports import DATA, restore
from support.model import Model, int8_linear
from support.reported import GATES, codes, finding, refusal

from quarkconv import convert_checkpoint, inspect_checkpoint, verify_checkpoint

MERGED: Final = "model.layers.0.self_attn"


def of_deepseek(**settings: Any) -> Model:
    model = Model()
    del model.config["num_experts"]
    model.config |= {
        "model_type": "deepseek_v3", "n_routed_experts": 3, "routed_scaling_factor": 1.0, "n_group": 1, "topk_group": 1,
        **settings,
    }  # fmt: skip
    for gate, shard in zip(GATES, model.shards, strict=True):
        shard[f"{gate}.e_score_correction_bias"] = torch.zeros(3)
    return model


def of_qwen(**settings: Any) -> Model:
    model = Model()
    model.config |= settings
    return model


def with_router(shape: tuple[int, ...] | None) -> Model:
    model = Model()
    model.remove(f"{GATES[0]}.weight")
    if shape is not None:
        model.first[f"{GATES[0]}.weight"] = torch.ones(shape).bfloat16()
    return model


DISAGREE: Final[dict[str, tuple[str, Callable[[], Model]]]] = {
    "another hidden size": ("hidden_size 16", lambda: of_qwen(hidden_size=16)),
    "another intermediate size": ("intermediate sizes 16", lambda: of_qwen(moe_intermediate_size=16)),
    "fewer layers": ("1 layer and no multi-token prediction layers", lambda: of_qwen(num_hidden_layers=1)),
    "more layers": ("4 layers, but 2", lambda: of_qwen(num_hidden_layers=4)),
    "dense first layers": ("first_k_dense_replace = 1", lambda: of_deepseek(first_k_dense_replace=1)),
    "every second layer sparse": ("moe_layer_freq = 2", lambda: of_deepseek(moe_layer_freq=2)),
    "a list of sparse layers": ("moe_layer_freq = [0, 1]", lambda: of_deepseek(moe_layer_freq=[0, 1])),
    "a sparse step": ("decoder_sparse_step = 2", lambda: of_qwen(decoder_sparse_step=2)),
    "a list of dense layers": ("mlp_only_layers = [0]", lambda: of_qwen(mlp_only_layers=[0])),
    "kinds of layers": ("mlp_layer_types", lambda: of_qwen(mlp_layer_types=["dense", "sparse"])),
    "a number in quotes": ("num_hidden_layers = '2'", lambda: of_qwen(num_hidden_layers="2")),
    "half a layer": ("hidden_size = 8.5", lambda: of_qwen(hidden_size=8.5)),
    "no router": ("routers missing", lambda: with_router(None)),
    "a router of more experts": ("shape that does not fit", lambda: with_router((4, 8))),
    "a router of another width": ("shape that does not fit", lambda: with_router((3, 16))),
    "a router of three dimensions": ("shape that does not fit", lambda: with_router((1, 3, 8))),
}


@pytest.mark.parametrize("variant", DISAGREE)
def test_a_config_of_another_model_is_named_and_no_engine_is_said_to_run_it(variant: str, tmp_path: Path) -> None:
    text, build = DISAGREE[variant]
    source = build().write(tmp_path / "source")
    inspection = inspect_checkpoint(source, deep=True)
    (code,) = set(codes(source))
    assert code == ("router-mismatch" if "router" in variant else "config-mismatch")
    assert text in finding(source, code).message
    assert inspection.headline.startswith(f"Config and tensors disagree ({code})")
    assert not [fact for fact in inspection.engines if fact.verdict == "int8"]
    result = convert_checkpoint(source, "compressed-tensors", tmp_path / "out")
    verified = verify_checkpoint(result.output, source, device="cpu")
    assert verified.ok
    assert code in {item.code for item in result.plan.losses}
    assert code in {item.code for item in verified.findings}


AGREE: Final[dict[str, Callable[[], Model]]] = {
    "sizes": lambda: of_qwen(hidden_size=8, moe_intermediate_size=4, intermediate_size=32),
    "sizes in lists": lambda: of_qwen(moe_intermediate_size=[4, 2]),
    "every layer sparse": lambda: of_deepseek(first_k_dense_replace=0, moe_layer_freq=1),
    "steps of one": lambda: of_qwen(decoder_sparse_step=1, mlp_only_layers=[], interleave_moe_layer_step=1),
    "layers of prediction": lambda: of_qwen(num_hidden_layers=1, num_nextn_predict_layers=1),
}


@pytest.mark.parametrize("variant", AGREE)
def test_a_config_that_agrees_is_sound(variant: str, tmp_path: Path) -> None:
    assert inspect_checkpoint(AGREE[variant]().write(tmp_path), deep=True).headline.startswith("Sound")


@pytest.mark.parametrize("folder", ["families", "fixtures"])
def test_no_export_disagrees_with_its_own_config(folder: str, tmp_path: Path) -> None:
    exports = [path for path in (DATA / folder).iterdir() if path.is_dir()]
    assert exports
    for export in exports:
        found = {item.code for item in inspect_checkpoint(restore(export, tmp_path / export.name)).findings}
        assert not found & {"config-mismatch", "router-mismatch", "merged-mixed"}


@pytest.mark.parametrize("form", ["f2f", "eager"])
def test_a_router_by_token_without_its_experts_of_tokens_is_named(form: str, tmp_path: Path) -> None:
    source = restore(DATA / "families" / f"deepseek_v4-0.13-{form}", tmp_path / "source")
    assert "router-mismatch" not in codes(source)
    edit_checkpoint(source, lambda tensors: [tensors.pop(name) for name in list(tensors) if name.endswith("tid2eid")])
    assert finding(source, "router-mismatch").subject.endswith(".gate.tid2eid")
    assert not any(fact.verdict == "int8" for fact in inspect_checkpoint(source).engines)


def merged(*int8: str) -> Model:
    """Attention of which some parts are int8, and the config agrees."""
    model = Model()
    for part in ("q_proj", "k_proj", "v_proj"):
        if part in int8:
            model.first |= int8_linear(f"{MERGED}.{part}", 8, 8)
        else:
            model.first[f"{MERGED}.{part}.weight"] = torch.ones(8, 8).bfloat16()
            model.quantization["exclude"].append(f"{MERGED}.{part}")
    return model


def test_linears_that_engines_merge_from_int8_and_float_are_named(tmp_path: Path) -> None:
    """vLLM and SGLang raise for them (should_ignore_layer, is_layer_skipped); vllm-ascend has no entry for them."""
    source = merged("q_proj", "k_proj").write(tmp_path / "source")
    assert (finding(source, "merged-mixed").subject, codes(source)) == (f"{MERGED}.v_proj", {"merged-mixed": "warning"})
    assert not [fact for fact in inspect_checkpoint(source).engines if fact.verdict == "int8"]
    assert refusal(source, "ascend").exit_code == 4
    out = convert_checkpoint(source, "fused-int8", tmp_path / "out").output
    assert verify_checkpoint(out, source, device="cpu").ok


@pytest.mark.parametrize(
    ("int8", "fp8", "named"),
    [
        (("k_proj", "v_proj"), ("q_proj",), "q_proj"),
        ((), ("q_proj", "k_proj"), "v_proj"),
        (("k_proj",), ("q_proj",), "v_proj"),
    ],
)
def test_linears_that_engines_merge_from_fp8_and_others_are_named(
    int8: tuple[str, ...], fp8: tuple[str, ...], named: str, tmp_path: Path
) -> None:
    model = merged(*int8)
    for part in fp8:
        name = f"{MERGED}.{part}.weight"
        model.first |= {name: torch.ones(8, 8).to(torch.float8_e4m3fn), f"{name}_scale_inv": torch.ones(1, 1)}
    source = model.write(tmp_path / "source")
    assert finding(source, "merged-mixed").subject == f"{MERGED}.{named}"
    assert not [fact for fact in inspect_checkpoint(source).engines if fact.verdict == "int8"]
    for to in ("fused-int8", "compressed-tensors"):
        out = convert_checkpoint(source, to, tmp_path / to).output
        assert verify_checkpoint(out, source, device="cpu").ok
        assert codes(out).keys() >= {"merged-mixed"}


@pytest.mark.parametrize("int8", [(), ("q_proj", "k_proj", "v_proj")])
def test_linears_that_are_alike_are_merged(int8: tuple[str, ...], tmp_path: Path) -> None:
    source = merged(*int8).write(tmp_path / "source")
    assert codes(source) == {}
    assert convert_checkpoint(source, "ascend", tmp_path / "out").output.exists()
