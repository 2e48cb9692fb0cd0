"""Real exports of every family: what is read of them, what they are converted to, and what verify computes."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support.exports import DATA
from transformers import AutoConfig

import quarkconv
from quarkconv.description.description import describe
from quarkconv.evaluate.dequantize import expert_floats
from quarkconv.experts.function import ExpertActivation, Routing
from quarkconv.experts.knowledge import expert_activation, expert_routing
from quarkconv.experts.layer import MoELayer
from quarkconv.experts.ranks import make_rank
from quarkconv.load.experts import FusedExperts
from quarkconv.load.layer_reader import LayerReader
from quarkconv.verify.numbers import unsupported_activation
from quarkconv.verify.router import Router, router_of
from quarkconv.verify.routing import route

FAMILIES = DATA / "families"
EVERY = sorted(path.name for path in FAMILIES.iterdir() if path.is_dir())

# Exports of which Quark left the experts in float, or whose experts quarkconv does not read, and why.
REFUSED = {
    "dbrx-0.13-f2f": "experts-not-understood",
    "ernie4_5_vl_moe-0.13-f2f": "experts-not-understood",
    "gpt_oss-0.13-f2f": "experts-not-quantized",
    "llama4-0.13-f2f": "experts-not-quantized",
    "qwen3_vl_moe-0.13-f2f": "experts-not-quantized",
}
READ = [name for name in EVERY if name not in REFUSED]
TEXT_AND_IMAGES = "ernie4_5_vl_moe-0.13-eager"
"""Text and image tokens have routers and experts of their own."""
TWO_SIZES = "ernie4_5_vl_moe-0.13-f2f"
"""As published: converted module by module (tests/cases/test_unread_experts.py)."""
NOT_FUSED = {
    "dbrx-0.13-eager": "names its experts' projections w1/v1/w2",
    "gpt_oss-0.13-eager": "has experts with biases",
    "nemotron_h-0.13-eager": "has experts without a gate",
    "nemotron_h-0.13-f2f": "has experts without a gate",
}
PER_EXPERT = ("compressed-tensors", "w8a8-int8", "bf16", "quark")


def layers(name: str) -> tuple[MoELayer, ...]:
    return describe(FAMILIES / name).moe_layers


FOREIGN_NAMES = ("mixtral-0.13-eager", "minimax_m2-0.13-eager")
"""Exports with the names of transformers' classes, which engines' classes of these model types do not know."""


@pytest.mark.parametrize("name", READ)
def test_the_experts_are_read(name: str) -> None:
    description = describe(FAMILIES / name)
    assert description.scheme == "ptpc_int8"
    found_codes = [item.code for item in description.findings if item.code.startswith(("expert", "layout", "not"))]
    assert found_codes == (["expert-names"] if name in FOREIGN_NAMES else [])
    # Images have experts of another size.
    found = {layer.geometry for layer in description.int8_layers}
    assert found == ({(4, 16, 8), (4, 16, 4)} if name == TEXT_AND_IMAGES else {(4, 16, 8)})


@pytest.mark.parametrize("name", READ)
def test_the_config_and_the_tensors_agree(name: str) -> None:
    # Quark declares the output projection of torch's own attention quantized, and does not quantize it. It has no
    # template for deepseek_v4 that excludes lm_head, and so stores it in int8.
    known = {
        "aria-0.13-eager": ["quantized-but-stored-float"],
        "deepseek_v4-0.13-eager": ["float-module-quantized"],
    }
    assert [item.code for item in describe(FAMILIES / name).errors()] == known.get(name, [])


@pytest.mark.parametrize(("name", "code"), REFUSED.items())
def test_what_is_not_read_is_unsupported_and_not_damaged(name: str, code: str, tmp_path: Path) -> None:
    assert code in {item.code for item in describe(FAMILIES / name).errors()}
    modules = describe(FAMILIES / name).renamed_experts
    assert bool(modules) is (name == TWO_SIZES)
    for target in ("fused-int8", *(() if modules else PER_EXPERT)):
        with pytest.raises(quarkconv.UnsupportedError) as error:
            quarkconv.convert_checkpoint(FAMILIES / name, target, tmp_path / target)
        assert error.value.exit_code == 4
    with pytest.raises(quarkconv.UnsupportedError):
        quarkconv.verify_checkpoint(FAMILIES / name, device="cpu")


STRUCTURES = {
    "dbrx-0.13-eager": ("w1/v1/w2", "transformer.blocks.0.ffn.experts.mlp", "transformer.blocks.0.ffn", "separate"),
    "gpt_oss-0.13-eager": (
        "gate_proj/up_proj/down_proj", "model.layers.0.mlp.experts", "model.layers.0.mlp",
        "joined, biased, interleaved",
    ),
    "nemotron_h-0.13-f2f": (
        "gate_proj/up_proj/down_proj", "backbone.layers.1.mixer.experts", "backbone.layers.1.mixer", "without a gate",
    ),
    "deepseek_v4-0.13-f2f": ("w1/w3/w2", "model.layers.0.ffn.experts", "model.layers.0.ffn", "separate"),
    "gemma4-0.13-f2f": ("gate_proj/up_proj/down_proj", "model.layers.0.experts", "model.layers.0", "separate"),
    "minimax_m3_vl-0.13-f2f": (
        "w1/w3/w2", "language_model.model.layers.0.block_sparse_moe.experts",
        "language_model.model.layers.0.block_sparse_moe", "separate",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", STRUCTURES)
def test_experts_are_recognised_with_their_names_and_parts(name: str) -> None:
    layer = layers(name)[0]
    parts = {
        "joined": layer.joined,
        "biased": layer.biased,
        "interleaved": layer.interleaved,
        "without a gate": not layer.gated,
    }
    structure = ", ".join(part for part, holds in parts.items() if holds) or "separate"
    assert ("/".join(layer.naming.projections()), layer.prefix, layer.moe, structure) == STRUCTURES[name]


def checked(path: Path, source: Path | None = None) -> quarkconv.Verification:
    """A verification with its numbers, or without those that no forward here computes."""
    return quarkconv.verify_checkpoint(path, source, device="cpu")


@pytest.mark.parametrize("name", READ)
def test_verify_computes_what_the_model_does(name: str) -> None:
    numbers = checked(FAMILIES / name).numbers
    config, layer = describe(FAMILIES / name).config.raw, layers(name)[0]
    activation = expert_activation(config, layer)
    assert isinstance(activation, ExpertActivation)
    assert numbers.skipped == unsupported_activation(activation)
    for item in numbers.layers:
        assert item.exact.ok
        assert item.dequantized.ok
        assert item.routing.startswith("the model's own: ")
        assert ("by token id" in item.routing) is (name.startswith("deepseek_v4") and item.layer == 0)


@pytest.mark.parametrize("name", READ)
def test_conversion_keeps_every_expert(name: str, tmp_path: Path) -> None:
    source = FAMILIES / name
    if name in NOT_FUSED:
        with pytest.raises(quarkconv.UnsupportedError, match=NOT_FUSED[name]) as error:
            quarkconv.convert_checkpoint(source, "fused-int8", tmp_path / "fused")
        assert error.value.exit_code == 4
    target = "compressed-tensors" if name in NOT_FUSED else "fused-int8"
    quarkconv.convert_checkpoint(source, target, tmp_path / target)
    result = checked(tmp_path / target, source)
    assert result.problems == ()
    assert [layer.exact.ok for layer in result.numbers.layers] == [True] * len(result.numbers.layers)


@pytest.mark.parametrize("name", NOT_FUSED)
@pytest.mark.parametrize("target", PER_EXPERT)
def test_targets_that_stack_nothing_rename_nothing(name: str, target: str, tmp_path: Path) -> None:
    quarkconv.convert_checkpoint(FAMILIES / name, target, tmp_path / "out")
    before = load_file(FAMILIES / name / "model.safetensors")
    after: dict[str, torch.Tensor] = {}
    for path in (tmp_path / "out").glob("*.safetensors"):
        after |= load_file(path)
    weights = [key for key in before if "experts" in key and key.endswith((".weight", ".bias"))]
    assert weights
    for key in weights:
        codes, scale = before[key], before.get(f"{key}_scale")
        expected = (
            codes if scale is None or target != "bf16" else (codes.float() * scale.float().unsqueeze(1)).bfloat16()
        )
        assert torch.equal(after[key], expected), key


def loaded(name: str, **rank: Any) -> FusedExperts:
    return quarkconv.load_fused_experts(FAMILIES / name, layers(name)[0].prefix, **rank)


def stacked(name: str, leaf: str) -> torch.Tensor:
    tensors = load_file(FAMILIES / name / "model.safetensors")
    prefix = layers(name)[0].prefix
    return torch.stack([tensors[f"{prefix}.{expert}.{leaf}"] for expert in range(4)])


def test_interleaved_rows_and_biases_are_loaded_apart() -> None:
    name = "gpt_oss-0.13-eager"
    experts = loaded(name)
    both = stacked(name, "gate_up_proj.weight")
    assert torch.equal(experts.w13, torch.cat([both[:, ::2], both[:, 1::2]], dim=1))
    scales = stacked(name, "gate_up_proj.weight_scale").float()
    assert torch.equal(experts.w13_scale.squeeze(-1), torch.cat([scales[:, ::2], scales[:, 1::2]], dim=1))
    biases = stacked(name, "gate_up_proj.bias").float()
    assert experts.w13_bias is not None
    assert experts.w2_bias is not None
    assert torch.equal(experts.w13_bias, torch.cat([biases[:, ::2], biases[:, 1::2]], dim=1))
    assert torch.equal(experts.w2_bias, stacked(name, "down_proj.bias").float())
    assert torch.equal(experts.w2, stacked(name, "down_proj.weight"))


def test_experts_without_a_gate_have_rows_of_up_alone() -> None:
    experts = loaded("nemotron_h-0.13-f2f")
    assert torch.equal(experts.w13, stacked("nemotron_h-0.13-f2f", "up_proj.weight"))
    assert experts.w13.shape == (4, 8, 16)
    assert experts.roles == ("up", "down")
    assert experts.w13_bias is None


@pytest.mark.parametrize("name", ["gpt_oss-0.13-eager", "nemotron_h-0.13-f2f", "dbrx-0.13-eager"])
def test_ranks_have_their_parts(name: str) -> None:
    whole = loaded(name)
    ups, inner = len(whole.roles) - 1, whole.intermediate_size
    parts = [loaded(name, rank=rank, world_size=2) for rank in range(2)]
    columns = [make_rank("tp", rank, 2).intermediate(inner) for rank in range(2)]
    rows = whole.w13.reshape(4, ups, inner, -1)
    for part, mine in zip(parts, columns, strict=True):
        assert torch.equal(part.w13, rows[:, :, mine.start : mine.stop].flatten(1, 2))
        assert torch.equal(part.w2, whole.w2[:, :, mine.start : mine.stop])
    if whole.w2_bias is not None:
        biases = [part.w2_bias for part in parts if part.w2_bias is not None]
        assert torch.equal(torch.stack(biases).sum(dim=0), whole.w2_bias)  # the ranks' outputs add up
    for rank in range(2):
        part = loaded(name, rank=rank, world_size=2, parallel="ep")
        assert torch.equal(part.w13, whole.w13[2 * rank : 2 * rank + 2])


def test_a_wrong_bias_is_found(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    source = FAMILIES / "gpt_oss-0.13-eager"
    quarkconv.convert_checkpoint(source, "compressed-tensors", tmp_path / "out")
    shard = next((tmp_path / "out").glob("*.safetensors"))
    tensors = load_file(shard)
    name = "model.layers.0.mlp.experts.2.down_proj.bias"
    tensors[name] = tensors[name] + 1
    save_file(tensors, shard, metadata={"format": "pt"})
    (tmp_path / "out" / "quarkconv.json").unlink()
    problems = quarkconv.verify_checkpoint(tmp_path / "out", source, device="cpu").problems
    assert any("bias differs" in problem.message for problem in problems)


def test_an_unknown_model_with_joined_rows_is_not_loaded(tmp_path: Path) -> None:
    source = FAMILIES / "gpt_oss-0.13-eager"
    config = json.loads((source / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "model_type": "something_new"}))
    (tmp_path / "model.safetensors").write_bytes((source / "model.safetensors").read_bytes())
    assert describe(tmp_path).moe_layers[0].interleaved is None
    with pytest.raises(quarkconv.UnsupportedError, match="row order of gate and up"):
        quarkconv.load_fused_experts(tmp_path, 0)
    skipped = quarkconv.verify_checkpoint(tmp_path, device="cpu").numbers.skipped
    assert skipped == "the function of the experts is unknown: the model type something_new is not known"


def test_a_gate_that_is_missing_is_not_an_expert_without_one(tmp_path: Path) -> None:
    source = FAMILIES / "qwen3_moe-0.13-f2f"
    tensors = load_file(source / "model.safetensors")
    from safetensors.torch import save_file

    save_file(
        {key: value for key, value in tensors.items() if ".gate_proj." not in key}, tmp_path / "model.safetensors"
    )
    (tmp_path / "config.json").write_bytes((source / "config.json").read_bytes())
    assert "expert-missing" in {item.code for item in describe(tmp_path).errors()}


# Quark left the experts of these exports in float: they are the originals of the others, from the same seed.
@pytest.mark.parametrize(
    ("name", "original", "transposed"),
    [
        ("gpt_oss-0.13-eager", "gpt_oss-0.13-f2f", True),
        ("qwen3_vl_moe-0.13-eager", "qwen3_vl_moe-0.13-f2f", False),
    ],
)
def test_originals_are_read_in_the_layout_of_the_published_model(name: str, original: str, transposed: bool) -> None:
    assert layers(original)[0].transposed is transposed
    result = quarkconv.verify_checkpoint(FAMILIES / name, unquantized=FAMILIES / original, device="cpu")
    assert result.problems == ()
    errors = [
        error.relative_error
        for experts in result.numbers.experts
        for role in experts.weights.values()
        for error in role
    ]
    assert len(errors) == 3 * 4
    # Rounding to 8 bits: rows of 8 or 16 values, with the largest about twice the root mean square.
    assert max(errors) < 0.01
    distances = [layer.unquantized for layer in result.numbers.layers]
    assert all(item is not None and item.relative_error < 0.05 for item in distances)


def test_an_original_that_is_not_read_is_named() -> None:
    with pytest.raises(quarkconv.UnsupportedError, match="does not read the layout"):
        quarkconv.verify_checkpoint(FAMILIES / "dbrx-0.13-eager", unquantized=FAMILIES / "dbrx-0.13-f2f", device="cpu")


@pytest.mark.parametrize("name", ["gpt_oss-0.13-eager", "nemotron_h-0.13-f2f", "dbrx-0.13-eager"])
def test_an_evaluation_names_the_experts_as_the_model_does(name: str, tmp_path: Path) -> None:
    quarkconv.convert_checkpoint(FAMILIES / name, "bf16", tmp_path / "out")
    expected = load_file(next((tmp_path / "out").glob("*.safetensors")))
    layer = layers(name)[0]
    found = dict(expert_floats(layer, loaded(name)))
    assert set(found) == {key for key in expected if key.startswith(f"{layer.prefix}.") and key.endswith(".weight")}
    assert all(torch.equal(expected[key], value) for key, value in found.items())


@pytest.mark.parametrize("part", ["text_moe", "vision_moe"])
def test_text_and_images_are_routed_as_transformers_routes_them(part: str) -> None:
    modeling = pytest.importorskip("transformers.models.ernie4_5_vl_moe.modeling_ernie4_5_vl_moe")
    config = AutoConfig.from_pretrained(FAMILIES / TEXT_AND_IMAGES).get_text_config()
    description = describe(FAMILIES / TEXT_AND_IMAGES)
    layer = next(layer for layer in description.int8_layers if layer.moe.endswith(part))
    tensors = load_file(FAMILIES / TEXT_AND_IMAGES / "model.safetensors")
    block = modeling.Ernie4_5_VLMoeMoeTopKRouter(config)
    start = f"{layer.moe}.gate."
    state = {name.removeprefix(start): value for name, value in tensors.items() if name.startswith(start)}
    state["moe_statics.e_score_correction_bias"] += torch.tensor([0.0, 0.3, 0.0, -0.2])  # the export has zeros
    block.load_state_dict(state)
    routing = expert_routing(description.config.raw, layer)
    assert isinstance(routing, Routing)
    inputs = torch.randn(64, config.hidden_size, generator=torch.Generator().manual_seed(0))
    _, weights, ids = block(inputs)
    found = route(routing, inputs, state["weight"], state["moe_statics.e_score_correction_bias"].flatten())
    assert torch.equal(found[1], ids)
    torch.testing.assert_close(found[0], weights.float(), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("name", ["deepseek_v4-0.13-f2f", "deepseek_v4-0.13-eager"])
def test_token_ids_choose_experts_as_in_transformers(name: str) -> None:
    modeling = pytest.importorskip("transformers.models.deepseek_v4.modeling_deepseek_v4")
    config = AutoConfig.from_pretrained(FAMILIES / name)
    description = describe(FAMILIES / name)
    layer = description.int8_layers[0]
    tensors = load_file(FAMILIES / name / "model.safetensors")
    block = modeling.DeepseekV4HashRouter(config).float()
    state = {leaf: tensors[f"{layer.moe}.gate.{leaf}"] for leaf in ("weight", "tid2eid")}
    block.load_state_dict(state)
    with ThreadPoolExecutor(2) as pool, LayerReader(description, pool) as reader:
        router = router_of(layer, description.config.raw, reader)
    assert isinstance(router, Router)
    assert router.table is not None
    random = torch.Generator().manual_seed(0)
    inputs, tokens = torch.randn(64, config.hidden_size, generator=random), torch.randint(24, (64,), generator=random)
    _, weights, ids = block(inputs, tokens)
    found = route(router.routing, inputs, router.weight, chosen=router.table[tokens])
    assert torch.equal(found[1], ids)
    torch.testing.assert_close(found[0], weights, rtol=1e-6, atol=1e-7)
