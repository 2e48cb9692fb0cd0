"""Evaluations on GPUs: the figures of a CPU within rounding, and the same ones however hidden states are kept."""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from support.exports import DATA, restore
from support.glm_moe_dsa import shared_positions

from quarkconv import SourceError, evaluate_checkpoint
from quarkconv.evaluate import evaluation as module
from quarkconv.evaluate import runners
from quarkconv.evaluate.results import Evaluation
from quarkconv.evaluate.run import Run
from quarkconv.evaluate.streams import LayerRunner

pytestmark = pytest.mark.gpu

CUDA = "cuda:0"


@pytest.fixture(scope="module")
def plain(quantized: Path, unquantized: Path, token_ids: Path) -> Evaluation:
    """One undisturbed run in three batches."""
    return evaluate_checkpoint(quantized, unquantized, token_ids=token_ids, batch=2, device=CUDA, resume=False)


def assert_alike(one: Evaluation, other: Evaluation) -> None:
    """The figures differ by no more than products that sum in another order."""
    assert one.int8 is not None
    assert other.int8 is not None
    assert one.int8.mean == pytest.approx(other.int8.mean, rel=0.15)
    for layer, expected in zip(one.layers, other.layers, strict=True):
        assert layer.own == pytest.approx(expected.own, abs=0.01)
        assert sum(layer.load) == sum(expected.load)


def test_a_gpu_has_the_figures_of_a_cpu(plain: Evaluation, quantized: Path, unquantized: Path, token_ids: Path) -> None:
    """Products sum in another order: bfloat16 then rounds some elements the other way, as between sizes of batches.
    One of 120 tokens may so choose another expert in a layer: an error of about 0.1, 0.01 of the layer's.
    """
    found = evaluate_checkpoint(quantized, unquantized, token_ids=token_ids, batch=2, device="cpu", resume=False)
    assert_alike(plain, found)


def test_the_same_run_has_the_same_figures_again(
    plain: Evaluation, quantized: Path, unquantized: Path, token_ids: Path
) -> None:
    again = evaluate_checkpoint(quantized, unquantized, token_ids=token_ids, batch=2, device=CUDA, resume=False)
    assert again.to_json() == plain.to_json()


def limit_states_on_the_device(monkeypatch: pytest.MonkeyPatch, limit: int | None) -> None:
    """Keep at most so many bytes of hidden states on the device; None: as many as by default."""
    if limit is not None:
        monkeypatch.setattr(LayerRunner, "states_bytes", lambda *_: limit)


@pytest.mark.parametrize("batches_on_the_device", [0, 1, 4])
def test_hidden_states_in_page_locked_memory_change_nothing(
    batches_on_the_device: int,
    plain: Evaluation,
    quantized: Path,
    unquantized: Path,
    token_ids: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    limit_states_on_the_device(monkeypatch, batches_on_the_device * 2 * 24 * 128 * 2)
    found = evaluate_checkpoint(quantized, unquantized, token_ids=token_ids, batch=2, device=CUDA, resume=False)
    assert found.to_json() == plain.to_json()


@pytest.mark.parametrize("limit", [None, 0])
def test_an_interrupted_run_resumes_to_the_same_figures(
    limit: int | None,
    plain: Evaluation,
    quantized: Path,
    unquantized: Path,
    token_ids: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    limit_states_on_the_device(monkeypatch, limit)
    run_layer = Run._layer
    ran: list[int] = []

    def stops(self: Run, number: int, *rest: Any) -> None:
        ran.append(number)
        if ran == [0, 1, 2]:
            raise KeyboardInterrupt
        run_layer(self, number, *rest)

    monkeypatch.setattr(Run, "_layer", stops)
    with pytest.raises(KeyboardInterrupt):
        evaluate_checkpoint(quantized, unquantized, token_ids=token_ids, batch=2, device=CUDA)
    again = evaluate_checkpoint(quantized, unquantized, token_ids=token_ids, batch=2, device=CUDA)
    assert ran == [0, 1, 2, 2, 3]
    assert again.to_json() == plain.to_json()


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_two_gpus_have_the_figures_of_one(
    plain: Evaluation, quantized: Path, unquantized: Path, token_ids: Path
) -> None:
    two = evaluate_checkpoint(quantized, unquantized, token_ids=token_ids, batch=2, device="cuda", resume=False)
    assert {**two.to_json(), "device": CUDA} == plain.to_json()


def test_one_gpu_named_twice_deals_out_the_windows_to_the_same_figures(
    plain: Evaluation, quantized: Path, unquantized: Path, token_ids: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "pick_devices", lambda _: (torch.device(CUDA),) * 2)
    two = evaluate_checkpoint(quantized, unquantized, token_ids=token_ids, batch=2, resume=False)
    assert {**two.to_json(), "device": CUDA} == plain.to_json()


def test_experts_in_groups_have_the_figures_of_whole_layers(
    plain: Evaluation, quantized: Path, unquantized: Path, token_ids: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows of a group are fewer, and a product of fewer rows may sum in another order."""
    monkeypatch.setattr(runners, "experts_at_once", lambda *_: 3)
    found = evaluate_checkpoint(quantized, unquantized, token_ids=token_ids, batch=2, device=CUDA, resume=False)
    assert_alike(found, plain)


def test_a_layer_takes_what_the_layer_before_hands_on(tmp_path: Path) -> None:
    """Two of four layers choose positions, and the layer after each takes the same."""
    from transformers import AutoModelForCausalLM

    model, ids = tmp_path / "model", tmp_path / "ids.safetensors"
    shared_positions(model)
    save_file({"token_ids": torch.randint(0, 48, (3, 24), generator=torch.Generator().manual_seed(3))}, ids)
    found = evaluate_checkpoint(model, token_ids=ids, batch=3, device=CUDA, resume=False)
    tokens = load_file(ids)["token_ids"].to(CUDA)
    with torch.no_grad():
        whole = AutoModelForCausalLM.from_pretrained(model).eval().to(CUDA)
        log_p = whole(input_ids=tokens, use_cache=False).logits.double().log_softmax(-1)[:, 12:-1]
    expected = math.exp(-log_p.gather(-1, tokens[:, 13:, None]).mean().item())
    perplexity = found.perplexity["dequantized"]
    assert perplexity is not None
    # One that chose other positions is off by tens of percent.
    assert perplexity.value == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("name", ["dbrx-0.13-eager", "gpt_oss-0.13-f2f", "deepseek_v4-0.13-f2f", "llama4-0.13-f2f"])
def test_families_have_the_figures_of_a_cpu(name: str, tmp_path: Path) -> None:
    if name.startswith("dbrx") and transformers.__version__.startswith("5.17."):
        pytest.skip("transformers 5.17 does not read this config.json; 5.24 does")
    source = restore(DATA / "families" / name, tmp_path / "source")
    ids = tmp_path / "ids.safetensors"
    save_file({"token_ids": torch.randint(0, 24, (3, 16), generator=torch.Generator().manual_seed(3))}, ids)
    found, expected = (
        evaluate_checkpoint(source, token_ids=ids, batch=2, device=device, resume=False) for device in (CUDA, "cpu")
    )
    for layer, of_cpu in zip(found.layers, expected.layers, strict=True):
        assert layer.own == pytest.approx(of_cpu.own, rel=0.2)
    one, other = found.perplexity["dequantized"], expected.perplexity["dequantized"]
    assert one is not None
    assert other is not None
    assert one.value == pytest.approx(other.value, rel=0.01)


def test_states_that_are_not_finite_name_the_first_layer(quantized: Path, token_ids: Path, tmp_path: Path) -> None:
    bad = shutil.copytree(quantized, tmp_path / "bad")
    name = "model.layers.1.input_layernorm.weight"
    tensors = load_file(bad / "model.safetensors")
    save_file({**tensors, name: tensors[name] * math.nan}, bad / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(SourceError, match="not finite") as caught:
        evaluate_checkpoint(bad, token_ids=token_ids, device=CUDA, resume=False)
    assert caught.value.tensor == "model.layers.1"
