"""Layers that hand on more than hidden states: GLM's sparse attention, whose layers share a choice of positions."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import quarkconv
from quarkconv import evaluate_checkpoint
from quarkconv.evaluate.run import Run
from quarkconv.evaluate.scores import TokenScores


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four layers in floats: two choose 4 of 24 positions, and the layer after each takes the same."""
    from transformers import AutoModelForCausalLM, GlmMoeDsaConfig

    torch.manual_seed(3)
    config = GlmMoeDsaConfig(
        vocab_size=48, hidden_size=32, intermediate_size=16, moe_intermediate_size=16, num_hidden_layers=4,
        num_attention_heads=2, num_key_value_heads=2, n_routed_experts=4, n_shared_experts=1, num_experts_per_tok=2,
        n_group=2, topk_group=1, kv_lora_rank=8, q_lora_rank=8, qk_nope_head_dim=4, qk_rope_head_dim=4, v_head_dim=8,
        index_head_dim=8, index_n_heads=2, index_topk=4, first_k_dense_replace=0, mlp_layer_types=["sparse"] * 4,
        indexer_types=["full", "shared", "full", "shared"], max_position_embeddings=64, initializer_range=0.3,
        pad_token_id=None,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    folder = tmp_path_factory.mktemp("shared") / "model"
    model.save_pretrained(folder)
    stored = json.loads((folder / "config.json").read_text("utf-8"))
    stored.pop("head_dim", None)  # as published
    (folder / "config.json").write_text(json.dumps(stored), "utf-8")
    return folder


@pytest.fixture(scope="module")
def ids(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three windows of 24 tokens."""
    path = tmp_path_factory.mktemp("tokens") / "ids.safetensors"
    save_file({"token_ids": torch.randint(0, 48, (3, 24), generator=torch.Generator().manual_seed(3))}, path)
    return path


def test_a_layer_takes_what_the_layer_before_hands_on(shared: Path, ids: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    scored: list[torch.Tensor] = []
    add = TokenScores.add

    def kept(self: TokenScores, logits: torch.Tensor, *rest: Any) -> None:
        scored.append(logits)
        add(self, logits, *rest)

    monkeypatch.setattr(TokenScores, "add", kept)
    evaluate_checkpoint(shared, token_ids=ids, batch=2, device="cpu", resume=False)
    tokens = load_file(ids)["token_ids"]
    with torch.no_grad():
        model = AutoModelForCausalLM.from_pretrained(shared).eval()
        expected = [
            model(input_ids=part, use_cache=False).logits[:, 12:-1].flatten(0, 1) for part in torch.split(tokens, 2)
        ]
    assert len(scored) == len(expected)
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(scored, expected, strict=True))


def test_int8_resumes_with_what_was_handed_on(
    shared: Path, ids: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = quarkconv.convert_checkpoint(shared, "compressed-tensors", tmp_path / "int8", quantize="all").output
    run_layer, ran = Run._layer, []

    def stops(self: Run, number: int, *rest: Any) -> None:
        ran.append(number)
        if ran == [0, 1]:
            raise KeyboardInterrupt
        run_layer(self, number, *rest)

    monkeypatch.setattr(Run, "_layer", stops)
    with pytest.raises(KeyboardInterrupt):
        evaluate_checkpoint(model, shared, token_ids=ids, batch=2, device="cpu")
    resumed = evaluate_checkpoint(model, shared, token_ids=ids, batch=2, device="cpu")
    assert ran == [0, 1, 1, 2, 3]
    whole = evaluate_checkpoint(model, shared, token_ids=ids, batch=2, device="cpu", resume=False)
    assert resumed.to_json() == whole.to_json()
    assert whole.int8 is not None
    assert whole.int8.mean > 0
