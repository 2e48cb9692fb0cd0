"""What is in memory at a time: two layers of each model, a block of logits."""

from __future__ import annotations

import gc
import shutil
import time
import weakref
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.exports import DATA, restore

from quarkconv import SourceError, UnsupportedError, evaluate_checkpoint
from quarkconv.description.description import describe
from quarkconv.evaluate import evaluation, runners
from quarkconv.evaluate import scoring as module
from quarkconv.evaluate.float_experts import OwnWeights
from quarkconv.evaluate.results import Evaluation
from quarkconv.evaluate.run import Run
from quarkconv.evaluate.scores import Distributions, TokenScores
from quarkconv.evaluate.streams import LayerRunner
from quarkconv.evaluate.weights import CheckpointWeights, LayerWeights
from quarkconv.load.experts import FusedExperts


def fill_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have a layer filled while the one before runs, as on a GPU."""
    monkeypatch.setattr(LayerRunner, "fills_ahead", True)


def filled_layers(run: Run) -> list[int]:
    """How many layers hold weights, of each model."""
    runner = run.runners[0]
    return [
        sum(
            any(not parameter.is_meta for parameter in decoder_layer.parameters())
            for decoder_layer in model.skeleton.layers
        )
        for model in (runner.quantized, runner.unquantized)
        if model is not None
    ]


@pytest.mark.parametrize("ahead", [False, True])
def test_at_most_two_layers_of_each_model_are_in_memory(
    ahead: bool, monkeypatch: pytest.MonkeyPatch, quantized: Path, unquantized: Path, token_ids: Path
) -> None:
    """The one that runs, and the one that is read, or filled, meanwhile."""
    held: list[weakref.ref[LayerWeights]] = []
    counts: list[int] = []
    filled: list[list[int]] = []
    after: list[list[int]] = []
    read, run_layer = CheckpointWeights.layer, Run._layer

    class Held(LayerWeights):
        """With room for weak references, which slots leave out."""

    def layer(self: CheckpointWeights, number: int | None) -> LayerWeights:
        found = read(self, number)
        kept = Held(found.floats, found.matrices, found.linears, found.experts, found.classes)
        held.append(weakref.ref(kept))
        return kept

    def running(self: Run, number: int, *rest: Any) -> None:
        last = number == 3
        until = time.monotonic() + 20
        while ahead and not last and number + 1 not in self.runners[0]._filled and time.monotonic() < until:
            time.sleep(0.01)
        filled.append(filled_layers(self))
        run_layer(self, number, *rest)
        gc.collect()
        after.append(filled_layers(self))
        counts.append(sum(reference() is not None for reference in held))

    if ahead:
        fill_ahead(monkeypatch)
    monkeypatch.setattr(CheckpointWeights, "layer", layer)
    monkeypatch.setattr(Run, "_layer", running)
    evaluate_checkpoint(quantized, unquantized, token_ids=token_ids, device="cpu", resume=False)
    assert len(counts) == 4
    assert max(counts) <= 2 * 2
    ahead_of_each = int(ahead)
    assert filled == [[1 + ahead_of_each] * 2] * 3 + [[1, 1]]
    assert after == [[ahead_of_each] * 2] * 3 + [[0, 0]]  # emptied after each layer


def test_reading_does_not_wait_for_filling(
    quantized: Path, unquantized: Path, token_ids: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once layer 0 is empty, layer 2 of both models is read, though layer 1 is not filled."""
    begun: set[tuple[bool, int | None]] = set()
    seen: list[bool] = []
    read, fill = CheckpointWeights.layer, LayerRunner.fill

    def layer(self: CheckpointWeights, number: int | None) -> LayerWeights:
        begun.add((bool(self.description.schemes), number))
        return read(self, number)

    def filling(self: LayerRunner, number: int, weights: LayerWeights) -> None:
        until = time.monotonic() + 20
        while number == 1 and not {(True, 2), (False, 2)} <= begun and time.monotonic() < until:
            time.sleep(0.01)
        if number == 1:
            seen.append({(True, 2), (False, 2)} <= begun)
        fill(self, number, weights)

    fill_ahead(monkeypatch)
    monkeypatch.setattr(CheckpointWeights, "layer", layer)
    monkeypatch.setattr(LayerRunner, "fill", filling)
    evaluate_checkpoint(quantized, unquantized, token_ids=token_ids, device="cpu", resume=False)
    assert seen == [True]


@pytest.mark.parametrize("ablate", [0, 1])
def test_layers_that_are_filled_while_others_run_change_nothing(
    ablate: int, quantized: Path, unquantized: Path, token_ids: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def evaluated() -> Evaluation:
        return evaluate_checkpoint(
            quantized, unquantized, token_ids=token_ids, device="cpu", batch=2, ablate=ablate, resume=False
        )

    plain = evaluated()
    fill_ahead(monkeypatch)
    assert evaluated().to_json() == plain.to_json()


def test_an_error_of_a_layer_that_is_filled_ahead_is_reported(
    quantized: Path, token_ids: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bad = shutil.copytree(quantized, tmp_path / "bad")
    file = bad / "model.safetensors"
    tensors = load_file(file)
    name = "model.layers.2.mlp.gate.weight"
    save_file({**tensors, name: tensors[name][:-1].contiguous()}, file, metadata={"format": "pt"})
    fill_ahead(monkeypatch)
    with pytest.raises(SourceError) as caught:
        evaluate_checkpoint(bad, token_ids=token_ids, device="cpu", resume=False)
    assert caught.value.tensor == name


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


def in_groups(monkeypatch: pytest.MonkeyPatch, group: int) -> list[int]:
    """Have experts run in groups; returns how many of a layer were on the device at a time."""
    sizes: list[int] = []
    monkeypatch.setattr(runners, "experts_at_once", lambda *_: group)
    for kind in (FusedExperts, OwnWeights):  # in int8, and in floats

        def taken(self: Any, first: int, last: int, *rest: Any, part: Any = kind.part) -> Any:
            sizes.append(last - first)
            return part(self, first, last, *rest)

        monkeypatch.setattr(kind, "part", taken)
    return sizes


@pytest.mark.parametrize("ablate", [0, 1])
@pytest.mark.parametrize("group", [1, 3])
def test_experts_in_groups_change_nothing(
    group: int, ablate: int, quantized: Path, unquantized: Path, token_ids: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def evaluated() -> Evaluation:
        return evaluate_checkpoint(
            quantized, unquantized, token_ids=token_ids, device="cpu", batch=2, ablate=ablate, resume=False
        )

    whole = evaluated()
    sizes = in_groups(monkeypatch, group)
    assert evaluated().to_json() == whole.to_json()
    assert max(sizes) == group


def test_several_devices_run_experts_in_groups_to_the_same_figures(
    quantized: Path, unquantized: Path, token_ids: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of devices with less and with more memory, the group is that of the first kind."""
    found = []
    for groups in ([None], [3, None]):
        left, devices = iter(groups), tuple(torch.device("cpu") for _ in groups)
        monkeypatch.setattr(evaluation, "pick_devices", lambda _, devices=devices: devices)
        monkeypatch.setattr(runners, "experts_at_once", lambda *_, left=left: next(left))
        found.append(evaluate_checkpoint(quantized, unquantized, token_ids=token_ids, batch=2, resume=False).to_json())
    assert {**found[1], "device": "cpu"} == found[0]


@pytest.mark.parametrize("name", [path.name for path in sorted((DATA / "families").iterdir()) if path.is_dir()])
def test_experts_of_every_family_in_groups_change_nothing(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = restore(DATA / "families" / name, tmp_path / "source")
    ids = tmp_path / "ids.safetensors"
    save_file({"token_ids": torch.randint(0, 24, (2, 12), generator=torch.Generator().manual_seed(3))}, ids)
    try:
        whole = evaluate_checkpoint(source, token_ids=ids, device="cpu", resume=False)
    except UnsupportedError:
        return
    in_groups(monkeypatch, 2)
    assert evaluate_checkpoint(source, token_ids=ids, device="cpu", resume=False).to_json() == whole.to_json()


def test_embeddings_and_head_of_both_models_are_in_memory_once(quantized: Path, unquantized: Path) -> None:
    with ExitStack() as stack:
        runner = runners.layer_runners(describe(quantized), describe(unquantized), [torch.device("cpu")], None, stack)[
            0
        ]
        assert runner.unquantized is not None
        quantized_model, original = (
            dict(model.skeleton.model.named_parameters()) for model in (runner.quantized, runner.unquantized)
        )
    for name in ("model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"):
        assert quantized_model[name].data_ptr() == original[name].data_ptr()
