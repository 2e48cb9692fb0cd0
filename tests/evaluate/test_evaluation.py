"""Whole evaluations: figures, batches, devices, faults that are found, recorded inputs, and the command."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support.changed import damaged, with_config
from support.program import run_cli

from quarkconv import SourceError, evaluate_checkpoint
from quarkconv.evaluate import evaluation as module
from quarkconv.evaluate.results import Evaluation

pytestmark = pytest.mark.long(10)


@pytest.fixture(scope="module")
def plain(quantized: Path, unquantized: Path, token_ids: Path) -> Evaluation:
    """One undisturbed run."""
    return evaluate_checkpoint(quantized, unquantized, token_ids=token_ids, device="cpu", resume=False)


def test_int8_costs_a_little_and_its_parts_add_up(plain: Evaluation) -> None:
    assert plain.int8 is not None
    assert plain.dequantized is not None
    assert plain.baseline == "unquantized"
    assert plain.scored == 5 * 11
    assert plain.remarks == []
    assert 0 < plain.dequantized.mean < 0.02
    assert 0 < plain.int8.mean < 0.02
    assert set(plain.perplexity) == {"int8", "dequantized", "unquantized"}
    assert [layer.index for layer in plain.layers] == [0, 1, 2, 3]
    first = plain.layers[0]
    assert first.drift == pytest.approx(first.own, rel=1e-6)  # nothing has accumulated before the first layer
    assert all(0 < layer.own < 0.1 and layer.cosine > 0.99 for layer in plain.layers)
    assert all(sum(layer.load) == 5 * 24 * 2 for layer in plain.layers)  # every token chooses two experts


def test_perplexity_of_the_unquantized_model_is_that_of_transformers(
    plain: Evaluation, unquantized: Path, token_ids: Path
) -> None:
    from transformers import AutoModelForCausalLM

    ids = load_file(token_ids)["token_ids"]
    with torch.no_grad():
        logits = AutoModelForCausalLM.from_pretrained(unquantized)(input_ids=ids, use_cache=False).logits
    log_p = logits.double().log_softmax(-1)[:, 12:-1]
    nll = -log_p.gather(-1, ids[:, 13:, None]).mean().item()
    found = plain.perplexity["unquantized"]
    assert found is not None
    assert found.value == pytest.approx(math.exp(nll), rel=1e-5)


def test_without_the_unquantized_model_int8_is_compared_with_the_dequantized_one(
    quantized: Path, token_ids: Path
) -> None:
    found = evaluate_checkpoint(quantized, token_ids=token_ids, device="cpu", resume=False)
    assert found.baseline == "dequantized"
    assert found.perplexity["unquantized"] is None
    assert found.int8 is not None
    assert found.int8.mean > 0


def test_a_model_in_floats_has_a_perplexity_and_no_divergence(unquantized: Path, token_ids: Path) -> None:
    found = evaluate_checkpoint(unquantized, token_ids=token_ids, device="cpu", resume=False)
    assert found.scheme is None
    assert found.int8 is None
    assert found.perplexity["dequantized"] is not None


@pytest.mark.parametrize("batch", [1, 2, 5])
def test_batches_change_nothing_but_the_last_bits(
    plain: Evaluation, quantized: Path, unquantized: Path, token_ids: Path, batch: int
) -> None:
    """Products of another shape may sum in another order: bfloat16 then rounds some elements the other way."""
    found = evaluate_checkpoint(quantized, unquantized, token_ids=token_ids, batch=batch, device="cpu", resume=False)
    assert found.int8 is not None
    assert plain.int8 is not None
    assert found.int8.mean == pytest.approx(plain.int8.mean, rel=0.15)
    for layer, of_plain in zip(found.layers, plain.layers, strict=True):
        assert layer.own == pytest.approx(of_plain.own, rel=0.05)


def test_layers_that_do_not_run_in_int8_have_the_load_of_all_experts(quantized: Path, token_ids: Path) -> None:
    """Batches choose different experts; their loads had the length of the highest one chosen."""
    found = evaluate_checkpoint(quantized, token_ids=token_ids, layers={3}, batch=1, device="cpu", resume=False)
    assert {len(layer.load) for layer in found.layers} == {8}
    assert {sum(layer.load) for layer in found.layers} == {5 * 24 * 2}
    assert [layer.own > 0 for layer in found.layers] == [False, False, False, True]


@pytest.mark.parametrize(("batch", "windows", "ablate"), [(2, None, 1), (4, 1, 0)])
def test_several_devices_have_the_figures_of_one(
    quantized: Path,
    unquantized: Path,
    token_ids: Path,
    monkeypatch: pytest.MonkeyPatch,
    batch: int,
    windows: int | None,
    ablate: int,
) -> None:
    """Also where there are fewer batches than devices."""
    found = []
    for count in (2, 1):
        monkeypatch.setattr(module, "pick_devices", lambda _, count=count: (torch.device("cpu"),) * count)
        found.append(
            evaluate_checkpoint(
                quantized, unquantized, token_ids=token_ids, batch=batch, windows=windows, ablate=ablate, resume=False
            )
        )
    two, one = found
    assert two.device == "cpu + cpu"
    assert {**two.to_json(), "device": "cpu"} == {**one.to_json(), "device": "cpu"}


def test_a_fault_in_one_layer_makes_it_the_worst(
    quantized: Path, unquantized: Path, token_ids: Path, tmp_path: Path
) -> None:
    bad = damaged(quantized, tmp_path / "bad", "model.layers.1.mlp.experts.3.down_proj.weight_scale", 4.0)
    found = evaluate_checkpoint(bad, unquantized, token_ids=token_ids, device="cpu", ablate=1, resume=False)
    assert found.worst_layers[0].index == 1
    assert (found.experts[0].layer, found.experts[0].expert) == (1, 3)
    assert [(item.index, item.expert) for item in found.ablations] == [(1, None), (1, 3)]
    # Nearly all of the divergence goes when that layer, or that expert, is left unquantized.
    assert all(item.share > 0.9 for item in found.ablations)


def test_states_that_are_not_finite_name_the_first_layer(quantized: Path, token_ids: Path, tmp_path: Path) -> None:
    bad = damaged(quantized, tmp_path / "bad", "model.layers.1.input_layernorm.weight", math.nan)
    with pytest.raises(SourceError, match="not finite") as caught:
        evaluate_checkpoint(bad, token_ids=token_ids, device="cpu", resume=False)
    assert caught.value.tensor == "model.layers.1"


@pytest.mark.parametrize(
    ("tensor", "words"),
    [("model.embed_tokens.weight", "embeddings are not finite"), ("lm_head.weight", "logits are not finite")],
)
def test_what_is_not_finite_outside_of_the_layers_is_named(
    tensor: str, words: str, quantized: Path, token_ids: Path, tmp_path: Path
) -> None:
    bad = damaged(quantized, tmp_path / "bad", tensor, math.nan)
    with pytest.raises(SourceError, match=words) as caught:
        evaluate_checkpoint(bad, token_ids=token_ids, device="cpu", resume=False)
    assert caught.value.exit_code == 3


def test_the_unquantized_model_that_is_not_finite_is_named(
    quantized: Path, unquantized: Path, token_ids: Path, tmp_path: Path
) -> None:
    bad = damaged(unquantized, tmp_path / "bad", "model.layers.1.input_layernorm.weight", math.nan)
    with pytest.raises(SourceError, match="not finite") as caught:
        evaluate_checkpoint(quantized, bad, token_ids=token_ids, device="cpu", resume=False)
    assert caught.value.file == str(bad)


def test_layers_that_are_not_named_run_unquantized(quantized: Path, unquantized: Path, token_ids: Path) -> None:
    found = evaluate_checkpoint(quantized, unquantized, token_ids=token_ids, layers={1}, device="cpu", resume=False)
    assert found.layers[0].own < found.layers[1].own  # rounding of weights alone


def test_recorded_inputs_are_taken_by_verify(quantized: Path, token_ids: Path, tmp_path: Path) -> None:
    import quarkconv

    record = tmp_path / "inputs.safetensors"
    for _ in range(2):  # an earlier recording is replaced
        evaluate_checkpoint(quantized, token_ids=token_ids, device="cpu", record=record, resume=False)
    assert {name: list(tensor.shape) for name, tensor in load_file(record).items()} == {
        f"model.layers.{number}.mlp": [5 * 24, 128] for number in range(4)
    }
    verification = quarkconv.verify_checkpoint(quantized, device="cpu", activations=record, stages=("numbers",))
    assert verification.ok


def test_recorded_inputs_do_not_depend_on_the_number_of_devices(
    quantized: Path, token_ids: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorded = []
    for count in (1, 2):
        monkeypatch.setattr(module, "pick_devices", lambda _, count=count: (torch.device("cpu"),) * count)
        evaluate_checkpoint(quantized, token_ids=token_ids, batch=2, record=tmp_path / f"{count}", resume=False)
        recorded.append(load_file(tmp_path / f"{count}"))
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_file()) == ["1", "2"]
    assert recorded[0].keys() == recorded[1].keys()
    for name, inputs in recorded[0].items():
        assert inputs.count_nonzero() > 0.9 * inputs.numel()
        assert torch.equal(inputs, recorded[1][name])


def test_settings_that_differ_are_named(quantized: Path, unquantized: Path, token_ids: Path, tmp_path: Path) -> None:
    other = with_config(
        unquantized, tmp_path / "other", num_experts_per_tok=1, transformers_version="0", use_cache=False
    )
    found = evaluate_checkpoint(quantized, other, token_ids=token_ids, device="cpu", resume=False)
    assert found.config_differences == ("num_experts_per_tok: 2, unquantized 1",)
    assert found.remarks == ["the two models have different settings: num_experts_per_tok: 2, unquantized 1"]


def test_windows_longer_than_the_positions_of_a_model_are_named(
    quantized: Path, token_ids: Path, tmp_path: Path
) -> None:
    model = with_config(quantized, tmp_path / "model", max_position_embeddings=20)
    found = evaluate_checkpoint(model, token_ids=token_ids, device="cpu", resume=False)
    assert found.remarks == ["windows of 24 tokens are longer than the model's 20 positions"]


def test_the_command_prints_one_object_and_exits_1_beyond_a_limit(
    capsys: pytest.CaptureFixture[str], quantized: Path, unquantized: Path, token_ids: Path, tmp_path: Path
) -> None:
    words: list[str | Path] = [
        "evaluate",
        quantized,
        "--unquantized",
        unquantized,
        "--token-ids",
        token_ids,
        "--device",
        "cpu",
    ]
    status, out, _ = run_cli(capsys, *words, "--json", "--max-kl", "0.5", "--min-agreement", "0.5")
    found = json.loads(out)
    assert (status, found["schema"], found["ok"]) == (0, "quarkconv.evaluate/1", True)
    assert {"perplexity", "kl", "agreement", "layers"} <= found.keys()
    assert {"value", "standard_error"} == found["perplexity"]["int8"].keys()
    assert {"index", "module", "drift", "own", "routing_changed"} <= found["layers"][0].keys()
    report = tmp_path / "report.html"
    status, out, _ = run_cli(capsys, *words, "--max-kl", "1e-9", "--no-resume", "--report", report)
    assert "exceeds --max-kl" in report.read_text("utf-8")
    assert status == 1
    assert "exceeds --max-kl" in out
    status, out, _ = run_cli(capsys, *words, "--min-agreement", "1", "--max-kl", "0.5", "--no-resume")
    assert status == 1
    assert "is below --min-agreement" in out
