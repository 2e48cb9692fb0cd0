"""Families without an export here: quantized by ``convert --quantize all``, against transformers' own forward."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from support.int8_error import largest_error
from support.logits import streamed, whole

from quarkconv import convert_checkpoint, evaluate_checkpoint
from quarkconv.evaluate.int8 import Int8Experts
from quarkconv.experts.function import ExpertActivation
from quarkconv.load.experts import FusedExperts

pytestmark = pytest.mark.long(10)

EXPERTS: Final = 4
IDENTITIES: Final = 2
_COMMON: Final[dict[str, Any]] = {
    "vocab_size": 48, "hidden_size": 32, "num_attention_heads": 2, "max_position_embeddings": 64,
    "initializer_range": 0.1, "pad_token_id": None, "bos_token_id": None, "eos_token_id": None,
}  # fmt: skip
_GRANITE: Final[dict[str, Any]] = {
    **_COMMON, "num_hidden_layers": 2, "num_key_value_heads": 2, "intermediate_size": 16, "num_local_experts": EXPERTS,
    "num_experts_per_tok": 2,
}  # fmt: skip
CONFIGS: Final[dict[str, tuple[str, dict[str, Any]]]] = {
    "granitemoe": ("GraniteMoeConfig", _GRANITE),
    "granitemoeshared": ("GraniteMoeSharedConfig", {**_GRANITE, "shared_intermediate_size": 16}),
    "longcat_flash": (
        "LongcatFlashConfig",
        {**_COMMON, "num_layers": 2, "q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4,
         "v_head_dim": 8, "head_dim": 4, "ffn_hidden_size": 16, "expert_ffn_hidden_size": 16,
         "n_routed_experts": EXPERTS, "zero_expert_num": IDENTITIES, "moe_topk": 2},
    ),
}  # fmt: skip
"""Model type -> class of its config, config."""
IN_A_ROW: Final = {"granitemoe": 4, "granitemoeshared": 4, "longcat_flash": 8}
"""INT8 products in a row: v and o of attention, gate and up, down; longcat_flash has two of these in a layer."""


def published(name: str, folder: Path) -> Path:
    """A model with random weights in bfloat16, as transformers saves it."""
    kind, config = CONFIGS[name]
    torch.manual_seed(3)
    made = transformers.AutoModelForCausalLM.from_config(getattr(transformers, kind)(**config), dtype=torch.bfloat16)
    made.save_pretrained(folder)
    identities = sum(f".experts.{EXPERTS}." in key for key in load_file(folder / "model.safetensors"))
    assert identities == (4 if name == "longcat_flash" else 0)  # gate and up in 2 layers, which conversion leaves out
    return folder


def with_identities(folder: Path) -> Path:
    """The model as transformers' class of longcat_flash stores it: with rows for identities, which it never reads."""
    (file,) = folder.glob("*.safetensors")
    stored = load_file(file)
    for key in [key for key in stored if ".experts.0." in key and "down_proj" not in key]:
        for number in range(EXPERTS, EXPERTS + IDENTITIES):
            stored[key.replace(".experts.0.", f".experts.{number}.")] = torch.full_like(stored[key], torch.nan)
    save_file(stored, file, {"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def ids(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three windows of 24 tokens."""
    path = tmp_path_factory.mktemp("tokens") / "ids.safetensors"
    save_file({"token_ids": torch.randint(0, 48, (3, 24), generator=torch.Generator().manual_seed(3))}, path)
    return path


@pytest.mark.parametrize("name", CONFIGS)
def test_families_run_in_float_as_in_transformers_and_in_int8_near_it(name: str, ids: Path, tmp_path: Path) -> None:
    original = published(name, tmp_path / "original")
    model = convert_checkpoint(original, "compressed-tensors", tmp_path / "int8", quantize="all").output
    floats = convert_checkpoint(model, "bf16", tmp_path / "bf16").output
    if name == "longcat_flash":
        floats = with_identities(floats)
    tokens = load_file(ids)["token_ids"]
    assert torch.equal(streamed(model, tokens), whole(floats, tokens))
    found = evaluate_checkpoint(model, token_ids=ids, batch=2, ablate=1, device="cpu", resume=False)
    assert (found.float_experts, found.float_linears) == ((), ())
    pairs = 3 * 24 * 2
    for layer in found.layers:
        assert 0 < layer.own < largest_error(IN_A_ROW[name], layer.routing_changed or 0)
        assert len(layer.load) == EXPERTS
        assert (sum(layer.load) < pairs) == (name == "longcat_flash")  # others go to identities
    assert len(found.ablations) == 2
    against = evaluate_checkpoint(model, original, token_ids=ids, batch=2, device="cpu", resume=False)
    assert against.int8 is not None
    assert found.int8 is not None
    assert 0 < found.int8.mean < 0.01
    assert 0 < against.int8.mean < 0.01


def test_an_identity_returns_its_input_times_the_weight() -> None:
    codes, scale = torch.randint(-9, 9, (2, 4, 8), dtype=torch.int8), torch.ones(2, 4, 1)
    down, down_scale = torch.randint(-9, 9, (2, 8, 2), dtype=torch.int8), torch.ones(2, 8, 1)
    experts = FusedExperts(0, "experts", codes, scale, down, down_scale, None, None, None, None)
    module = Int8Experts(experts, ExpertActivation("silu", None), identities=2)
    states = torch.randn(3, 8, generator=torch.Generator().manual_seed(1)).bfloat16()
    ids, weights = torch.tensor([[2, 3], [3, 2], [2, 2]]), torch.tensor([[0.5, 0.25], [1.0, 2.0], [0.0, 1.0]])
    assert torch.equal(module(states, ids, weights), (states.float() * weights.sum(-1, keepdim=True)).bfloat16())
