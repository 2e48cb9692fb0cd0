"""The whole model against its twin in float64: INT8, and dequantized."""

from __future__ import annotations

import json
import math
import shutil
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from support.qwen3_moe_twin import Array, Twin

from quarkconv import evaluate_checkpoint
from quarkconv.description.description import describe
from quarkconv.evaluate.forward import final_logits
from quarkconv.evaluate.run import Run
from quarkconv.evaluate.runners import layer_runners
from quarkconv.evaluate.windows import Windows, windows_of_text
from quarkconv.progress import SILENT


@pytest.fixture(scope="module")
def windows(quantized: Path) -> Windows:
    """Three windows of 96 tokens of real text."""
    return windows_of_text(quantized.parent / "heldout.txt", quantized / "tokenizer.json", 96, 3)


@pytest.fixture(scope="module")
def twins(quantized: Path, windows: Windows) -> dict[str, Array]:
    """Log-probabilities [W, L, V] of the twin."""
    return {
        name: log_softmax(Twin.of(quantized, int8=name == "int8").logits(windows.ids.numpy()))
        for name in ("int8", "dequantized")
    }


def log_softmax(logits: Array) -> Array:
    shifted = logits - logits.max(-1, keepdims=True)
    result: Array = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    return result


def divergence(log_p: Array, log_q: Array) -> Array:
    """KL divergence of each position."""
    result: Array = (np.exp(log_p) * (log_p - log_q)).sum(-1)
    return result


def streamed(folder: Path, windows: Windows) -> dict[str, Array]:
    """Log-probabilities [W, L, V] of every variant, as evaluate computes them."""
    with ExitStack() as stack:
        runner = layer_runners(describe(folder), None, [torch.device("cpu")], None, stack)[0]
        run = Run([runner], windows, None, SILENT)
        streams = run.layers_of(run.variants, None)
        positions = torch.arange(windows.length)
        logits = {
            name: final_logits(runner.quantized.skeleton, windows.ids, streams.states(name), positions)
            for name in run.variants
        }
    return {name: log_softmax(values.double().numpy()) for name, values in logits.items()}


@pytest.fixture(scope="module")
def in_float32(quantized: Path, windows: Windows, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Array]:
    """The same checkpoint with everything but codes computed in float32."""
    folder = shutil.copytree(quantized, tmp_path_factory.mktemp("float32") / "model")
    config = json.loads((folder / "config.json").read_text("utf-8"))
    (folder / "config.json").write_text(json.dumps({**config, "dtype": "float32"}), "utf-8")
    return streamed(folder, windows)


def test_the_dequantized_model_in_float32_equals_its_twin(
    in_float32: dict[str, Array], twins: dict[str, Array]
) -> None:
    """About 100 roundings of 2^-24 one after the other, on log-probabilities of about 10: 1e-4 at most."""
    assert np.abs(in_float32["dequantized"] - twins["dequantized"]).max() < 1e-4


def test_the_int8_model_in_float32_equals_its_twin_but_where_a_rounding_falls_the_other_way(
    in_float32: dict[str, Array], twins: dict[str, Array]
) -> None:
    """Errors of float32 decide about one in 10^5 roundings to codes or to bfloat16 of experts, and a token has 10^3 of
    them in a layer: most tokens equal the twin as closely as without codes. In the others, and through attention in
    those that follow, one code of thousands is off by one: far less than what rounding all of them costs.
    """
    found, twin = in_float32["int8"], twins["int8"]
    largest = np.abs(found - twin).max(-1)
    assert np.median(largest) < 1e-4
    assert (largest < 1e-4).mean() > 0.5
    cost = divergence(twins["dequantized"], twin).mean()
    assert divergence(twin, found).mean() < cost / 30
    assert divergence(twins["dequantized"], found).mean() == pytest.approx(cost, rel=0.1)


def test_the_figures_of_each_layer_are_those_of_twins(quantized: Path, windows: Windows, tmp_path: Path) -> None:
    """Drift, own error, experts that change, and their load. In float32 a rounding that falls the other way moves a
    code by one, and may move a token to another expert: at most 3 of 288 tokens in a layer.
    """
    folder = shutil.copytree(quantized, tmp_path / "model")
    config = json.loads((folder / "config.json").read_text("utf-8"))
    (folder / "config.json").write_text(json.dumps({**config, "dtype": "float32"}), "utf-8")
    save_file({"token_ids": windows.ids}, tmp_path / "ids.safetensors")
    found = evaluate_checkpoint(folder, token_ids=tmp_path / "ids.safetensors", device="cpu", resume=False)

    int8, base = Twin.of(quantized, int8=True), Twin.of(quantized, int8=False)
    drifting = states = base.embed(windows.ids.numpy())
    tokens = windows.ids.numel()
    changes = []
    for layer in found.layers:
        own, _ = int8.layer(layer.index, states)
        drifting, chosen = int8.layer(layer.index, drifting)
        states, base_chosen = base.layer(layer.index, states)
        norm = np.linalg.norm(states)
        assert layer.own == pytest.approx(np.linalg.norm(own - states) / norm, rel=0.03)
        assert layer.drift == pytest.approx(np.linalg.norm(drifting - states) / norm, rel=0.03)
        cosine = (drifting * states).sum() / np.linalg.norm(drifting) / norm
        assert 1 - layer.cosine == pytest.approx(1 - cosine, rel=0.06)
        changed = (np.sort(chosen, -1) != np.sort(base_chosen, -1)).any(-1).sum()
        assert layer.routing_changed is not None
        assert abs(layer.routing_changed * tokens - changed) <= 3
        assert np.abs(np.array(layer.load) - np.bincount(chosen.ravel(), minlength=len(layer.load))).sum() <= 6
        changes.append(changed)
    assert sum(changes) > 3  # or nothing was tested


def test_ablations_have_the_divergence_of_twins_that_compute_that_expert_or_layer_unquantized(
    quantized: Path, unquantized: Path, windows: Windows, tmp_path: Path
) -> None:
    """Expert 3 of layer 1 is damaged; the twin without it takes that expert, or layer 1, from the unquantized model."""
    fault = "model.layers.1.mlp.experts.3.down_proj.weight_scale"
    bad, original = (shutil.copytree(folder, tmp_path / folder.name) for folder in (quantized, unquantized))
    tensors = load_file(bad / "model.safetensors")
    save_file({**tensors, fault: tensors[fault] * 4}, bad / "model.safetensors")
    for folder in (bad, original):
        config = json.loads((folder / "config.json").read_text("utf-8"))
        (folder / "config.json").write_text(json.dumps({**config, "dtype": "float32"}), "utf-8")
    save_file({"token_ids": windows.ids}, tmp_path / "ids.safetensors")
    found = evaluate_checkpoint(
        bad, original, token_ids=tmp_path / "ids.safetensors", ablate=1, device="cpu", resume=False
    )
    assert [(item.index, item.expert) for item in found.ablations] == [(1, None), (1, 3)]

    base = Twin.of(original, int8=False)
    log_p = log_softmax(base.logits(windows.ids.numpy()))[:, windows.scored]
    places: dict[str, list[tuple[int, int | None]]] = {"whole": [], "layer": [(1, None)], "expert": [(1, 3)]}
    expected = {
        name: divergence(
            log_p,
            log_softmax(Twin.of(bad, int8=True, left_out=dict.fromkeys(left_out, base)).logits(windows.ids.numpy()))[
                :, windows.scored
            ],
        ).mean()
        for name, left_out in places.items()
    }
    assert found.int8 is not None
    assert found.int8.mean == pytest.approx(expected["whole"], rel=0.02)
    layer, expert = found.ablations
    for item, name in ((layer, "layer"), (expert, "expert")):
        assert item.kl == pytest.approx(expected[name], rel=0.1)
        assert item.share == pytest.approx(1 - expected[name] / expected["whole"], abs=0.02)


def test_the_int8_model_as_it_runs_has_the_perplexity_of_its_twin(
    quantized: Path, windows: Windows, twins: dict[str, Array]
) -> None:
    """In bfloat16 every operation rounds: single tokens differ, with errors of either sign. Their mean is zero within
    three of its standard errors.
    """
    found = streamed(quantized, windows)
    for name in ("int8", "dequantized"):
        targets = windows.ids[:, 1:, None].numpy()
        of_model, of_twin = (
            np.take_along_axis(item[:, :-1], targets, -1).ravel() for item in (found[name], twins[name])
        )
        difference = of_model - of_twin
        assert 0 < difference.std() < 0.1
        assert abs(difference.mean()) < 3 * difference.std() / math.sqrt(len(difference))
