"""Layers that take more than hidden states: a choice of positions of the layer before (GLM), tokens (DeepSeek-V4)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from support.deepseek_v4 import every_kind_of_layer
from support.glm_moe_dsa import shared_positions

import quarkconv
from quarkconv import evaluate_checkpoint
from quarkconv.evaluate.run import Run
from quarkconv.evaluate.scores import Distributions, TokenScores


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return shared_positions(tmp_path_factory.mktemp("shared") / "model")


@pytest.fixture(scope="module")
def compressed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return every_kind_of_layer(tmp_path_factory.mktemp("compressed") / "model")


@pytest.fixture(scope="module")
def ids(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three windows of 24 tokens."""
    path = tmp_path_factory.mktemp("tokens") / "ids.safetensors"
    save_file({"token_ids": torch.randint(0, 48, (3, 24), generator=torch.Generator().manual_seed(3))}, path)
    return path


def test_a_layer_takes_what_the_layer_before_hands_on(shared: Path, ids: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert_transformers_own(shared, ids, monkeypatch)


def test_layers_that_route_by_token_or_attend_to_compressed_entries_run_as_in_transformers(
    compressed: Path, ids: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert_transformers_own(compressed, ids, monkeypatch)


def test_such_layers_run_in_int8(compressed: Path, ids: Path, tmp_path: Path) -> None:
    model = quarkconv.convert_checkpoint(compressed, "compressed-tensors", tmp_path / "int8", quantize="all").output
    found = evaluate_checkpoint(model, compressed, token_ids=ids, batch=2, device="cpu", resume=False)
    assert found.int8 is not None
    assert 0 < found.int8.mean < 0.05
    by_token = [layer.routing_changed == 0 for layer in found.layers]
    assert by_token[0]
    assert by_token[3]
    assert all(sum(layer.load) == 3 * 24 * 2 for layer in found.layers)


def assert_transformers_own(model: Path, ids: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Scored logits are those of transformers' own forward, bit for bit."""
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    scored: list[torch.Tensor] = []
    add = TokenScores.add

    def kept(self: TokenScores, found: Distributions, *rest: Any) -> None:
        scored.append(found.logits)
        add(self, found, *rest)

    monkeypatch.setattr(TokenScores, "add", kept)
    evaluate_checkpoint(model, token_ids=ids, batch=2, device="cpu", resume=False)
    tokens = load_file(ids)["token_ids"]
    with torch.no_grad():
        whole = AutoModelForCausalLM.from_pretrained(model).eval()
        expected = [
            whole(input_ids=part, use_cache=False).logits[:, 12:-1].flatten(0, 1) for part in torch.split(tokens, 2)
        ]
    assert len(scored) == len(expected)
    assert all(torch.equal(logits, whole_logits) for logits, whole_logits in zip(scored, expected, strict=True))


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
