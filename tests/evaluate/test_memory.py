"""What is in memory at a time: two layers of each model, a block of logits."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path
from typing import Any

import pytest

from quarkconv import evaluate_checkpoint
from quarkconv.evaluate import scoring as module
from quarkconv.evaluate.run import Run
from quarkconv.evaluate.scores import Distributions, TokenScores
from quarkconv.evaluate.weights import CheckpointWeights, LayerWeights


def test_at_most_two_layers_of_each_model_are_in_memory(
    monkeypatch: pytest.MonkeyPatch, quantized: Path, unquantized: Path, token_ids: Path
) -> None:
    """The one that runs, and the one that is read meanwhile."""
    held: list[weakref.ref[LayerWeights]] = []
    counts: list[int] = []
    filled: list[int] = []
    read, run_layer = CheckpointWeights.layer, Run._layer

    class Held(LayerWeights):
        """With room for weak references, which slots leave out."""

    def layer(self: CheckpointWeights, number: int | None) -> LayerWeights:
        found = read(self, number)
        kept = Held(found.floats, found.matrices, found.linears, found.experts, found.classes)
        held.append(weakref.ref(kept))
        return kept

    def running(self: Run, number: int, *rest: Any) -> None:
        run_layer(self, number, *rest)
        gc.collect()
        counts.append(sum(reference() is not None for reference in held))
        models = (self.runners[0].quantized, self.runners[0].unquantized)
        filled.append(
            sum(
                any(not parameter.is_meta for parameter in decoder_layer.parameters())
                for model in models
                if model is not None
                for decoder_layer in model.skeleton.layers
            )
        )

    monkeypatch.setattr(CheckpointWeights, "layer", layer)
    monkeypatch.setattr(Run, "_layer", running)
    evaluate_checkpoint(quantized, unquantized, token_ids=token_ids, device="cpu", resume=False)
    assert len(counts) == 4
    assert max(counts) <= 2 * 2
    assert filled == [0] * 4  # emptied after each layer


def test_logits_are_never_whole(
    monkeypatch: pytest.MonkeyPatch, quantized: Path, unquantized: Path, token_ids: Path
) -> None:
    whole = evaluate_checkpoint(quantized, unquantized, token_ids=token_ids, device="cpu", resume=False)
    sizes: list[int] = []
    add = TokenScores.add

    def added(self: TokenScores, found: Distributions, *rest: Any) -> None:
        sizes.append(found.logits.numel())
        add(self, found, *rest)

    monkeypatch.setattr(TokenScores, "add", added)
    monkeypatch.setattr(module, "block_logits", lambda _: 5 * 512 * 2)
    parts = evaluate_checkpoint(quantized, unquantized, token_ids=token_ids, device="cpu", resume=False)
    assert max(sizes) <= 5 * 512 * 2
    assert sum(sizes) == 3 * whole.scored * 512
    # The head multiplies fewer rows at a time, which may sum in another order.
    for name, value in whole.perplexity.items():
        found = parts.perplexity[name]
        assert value is not None
        assert found is not None
        assert found.value == pytest.approx(value.value, rel=1e-3)
