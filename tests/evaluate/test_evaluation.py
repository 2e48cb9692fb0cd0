"""Whole evaluations: figures, faults that are found, batches, resuming, bad input."""

from __future__ import annotations

import json
import math
import os
import signal
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from support.program import PROCESS_TIMEOUT, run_cli, start

from quarkconv import SourceError, UnsupportedError, UsageError, WriteError, convert_checkpoint, evaluate_checkpoint
from quarkconv.evaluate import evaluation as module
from quarkconv.evaluate import run
from quarkconv.evaluate import state as state_module
from quarkconv.evaluate.hidden_states import Streams
from quarkconv.evaluate.request import Limits
from quarkconv.evaluate.results import Evaluation
from quarkconv.evaluate.run import Run
from quarkconv.evaluate.state import EvaluationState

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
    for mine, theirs in zip(found.layers, plain.layers, strict=True):
        assert mine.own == pytest.approx(theirs.own, rel=0.05)


def test_several_devices_have_the_figures_of_one(
    quantized: Path, unquantized: Path, token_ids: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "pick_devices", lambda _: (torch.device("cpu"),) * 2)
    two = evaluate_checkpoint(quantized, unquantized, token_ids=token_ids, batch=2, ablate=1, resume=False)
    monkeypatch.setattr(module, "pick_devices", lambda _: (torch.device("cpu"),))
    one = evaluate_checkpoint(quantized, unquantized, token_ids=token_ids, batch=2, ablate=1, resume=False)
    assert two.device == "cpu + cpu"
    assert {**two.to_json(), "device": "cpu"} == {**one.to_json(), "device": "cpu"}


def test_an_interrupted_run_resumes_after_its_last_layer(
    quantized: Path, unquantized: Path, token_ids: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = evaluate_checkpoint(quantized, unquantized, token_ids=token_ids, device="cpu")
    run_layer = Run._layer
    ran: list[int] = []

    def stops(self: Run, number: int, *rest: Any) -> None:
        if number == 2 and 2 not in ran:
            ran.append(2)
            raise KeyboardInterrupt
        ran.append(number)
        run_layer(self, number, *rest)

    monkeypatch.setattr(Run, "_layer", stops)
    with pytest.raises(KeyboardInterrupt):
        evaluate_checkpoint(quantized, unquantized, token_ids=token_ids, device="cpu")
    assert ran == [0, 1, 2]
    again = evaluate_checkpoint(quantized, unquantized, token_ids=token_ids, device="cpu")
    assert ran == [0, 1, 2, 2, 3]
    assert again.to_json() == whole.to_json()


def test_a_run_that_records_begins_anew_after_an_interrupt(
    quantized: Path, token_ids: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_layer = Run._layer

    def stops(self: Run, number: int, *rest: Any) -> None:
        if number == 2:
            raise KeyboardInterrupt
        run_layer(self, number, *rest)

    record = tmp_path / "inputs.safetensors"
    with monkeypatch.context() as patch:
        patch.setattr(Run, "_layer", stops)
        with pytest.raises(KeyboardInterrupt):
            evaluate_checkpoint(quantized, token_ids=token_ids, device="cpu", record=record)
    evaluate_checkpoint(quantized, token_ids=token_ids, device="cpu", record=record)
    assert len(load_file(record)) == 4


def damaged(source: Path, out: Path, tensor: str, change: float) -> Path:
    """A copy of a checkpoint with one tensor multiplied."""
    import shutil

    shutil.copytree(source, out)
    for file in out.glob("*.safetensors"):
        tensors = load_file(file)
        if tensor in tensors:
            tensors[tensor] = tensors[tensor] * change
            save_file(tensors, file, metadata={"format": "pt"})
    return out


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


@pytest.mark.parametrize(("layers", "found"), [(set(), "none"), ({1, 4, 9}, "4, 9")])
def test_layers_that_do_not_exist_are_refused(layers: set[int], found: str, quantized: Path, token_ids: Path) -> None:
    """Without any layer in INT8 there would be no divergence, and every limit would hold."""
    with pytest.raises(UsageError, match="The decoder layer does not exist") as caught:
        evaluate_checkpoint(quantized, token_ids=token_ids, layers=layers, device="cpu", resume=False)
    assert (caught.value.expected, caught.value.found) == ("0 to 3", found)


@pytest.mark.parametrize("name", ["text", "token_ids"])
def test_a_record_replaces_an_earlier_one_and_no_other_file(name: str, quantized: Path, token_ids: Path) -> None:
    """``--record`` with the file that is evaluated on took its place."""
    before, options = token_ids.read_bytes(), dict[str, Any]({name: token_ids})
    with pytest.raises(UsageError, match="--record would replace another file"):
        evaluate_checkpoint(quantized, **options, record=token_ids, device="cpu", resume=False)
    assert token_ids.read_bytes() == before


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


def test_another_model_as_the_unquantized_one_is_refused(
    quantized: Path, checkpoints: Any, token_ids: Path, tmp_path: Path
) -> None:
    other = convert_checkpoint(checkpoints("mixtral-quark0.11-eager"), "bf16", tmp_path / "other").output
    with pytest.raises(UsageError, match="another class"):
        evaluate_checkpoint(quantized, other, token_ids=token_ids, resume=False)


def test_a_quantized_model_as_the_unquantized_one_is_refused(quantized: Path, token_ids: Path) -> None:
    with pytest.raises(UsageError, match="is quantized") as caught:
        evaluate_checkpoint(quantized, quantized, token_ids=token_ids, device="cpu", resume=False)
    assert caught.value.found == "ptpc_int8"


@pytest.mark.parametrize("limits", [{"max_kl": math.nan}, {"max_kl": -1.0}, {"min_agreement": 98.0}])
def test_a_bound_out_of_range_is_refused(limits: dict[str, float]) -> None:
    with pytest.raises(UsageError, match="is out of range") as caught:
        Limits(**limits)
    assert caught.value.exit_code == 2


def test_layers_do_not_wait_for_a_slow_disk(quantized: Path, token_ids: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved: list[int] = []
    save, run_layer, last = EvaluationState.save, Run._layer, threading.Event()

    def slow(self: EvaluationState, streams: Streams) -> None:
        assert last.wait(60)
        saved.append(streams.finished)
        save(self, streams)

    def running(self: Run, number: int, *rest: Any) -> None:
        run_layer(self, number, *rest)
        if number == 3:
            last.set()

    monkeypatch.setattr(run, "_PATIENCE", 0.0)
    monkeypatch.setattr(EvaluationState, "save", slow)
    monkeypatch.setattr(Run, "_layer", running)
    found = evaluate_checkpoint(quantized, token_ids=token_ids, device="cpu")
    assert saved in ([1], [1, 4])
    monkeypatch.undo()
    assert found.to_json() == evaluate_checkpoint(quantized, token_ids=token_ids, device="cpu", resume=False).to_json()


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


@pytest.mark.parametrize("option", ["--record", "--report"])
def test_a_file_that_cannot_be_created_is_refused_before_anything_runs(
    option: str, capsys: pytest.CaptureFixture[str], quantized: Path, token_ids: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Run, "layers_of", lambda *_: pytest.fail("it ran"))
    words = ("evaluate", quantized, "--token-ids", token_ids, "--device", "cpu", option, "/does/not/exist/file")
    status, _, err = run_cli(capsys, *words)
    assert status == 5
    assert "The folder of a file to write does not exist" in err


def test_a_directory_is_refused_as_a_file_to_write(quantized: Path, token_ids: Path, tmp_path: Path) -> None:
    with pytest.raises(WriteError, match="is a directory"):
        evaluate_checkpoint(quantized, token_ids=token_ids, device="cpu", record=tmp_path)


def test_a_model_that_does_not_exist_is_named_before_its_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="does not exist"):
        evaluate_checkpoint(tmp_path / "missing", text=tmp_path / "text.txt", device="cpu")


@pytest.mark.parametrize("options", [{"limits": Limits(max_kl=0.1)}, {"layers": {1}}, {"ablate": 1}])
def test_limits_and_layers_without_int8_modules_are_refused(
    options: dict[str, Any], unquantized: Path, token_ids: Path
) -> None:
    with pytest.raises(UnsupportedError, match="there is no divergence") as caught:
        evaluate_checkpoint(unquantized, token_ids=token_ids, device="cpu", **options)
    assert caught.value.exit_code == 4


def test_tensors_of_another_size_than_the_config_are_named_with_both_shapes(
    quantized: Path, token_ids: Path, tmp_path: Path
) -> None:
    other = with_config(quantized, tmp_path / "other", vocab_size=500)
    with pytest.raises(SourceError, match="does not fit") as caught:
        evaluate_checkpoint(other, token_ids=token_ids, device="cpu", resume=False)
    assert (caught.value.expected, caught.value.found) == ("[500, 128]", "[512, 128]")


def with_config(source: Path, out: Path, **settings: Any) -> Path:
    """A copy of a checkpoint with other settings."""
    import shutil

    shutil.copytree(source, out)
    config = json.loads((out / "config.json").read_text("utf-8"))
    (out / "config.json").write_text(json.dumps(config | settings), "utf-8")
    return out


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


def test_a_full_disk_is_an_error_of_writing(quantized: Path, token_ids: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(state_module, "save_file", full)
    with pytest.raises(WriteError, match="hidden states cannot be written") as caught:
        evaluate_checkpoint(quantized, token_ids=token_ids, device="cpu")
    assert "No space left" in str(caught.value.found)
    assert caught.value.exit_code == 5


def test_another_tokenizer_in_the_unquantized_model_is_refused(
    quantized: Path, unquantized: Path, token_ids: Path, tmp_path: Path
) -> None:
    import shutil

    other = shutil.copytree(unquantized, tmp_path / "other")
    tokenizer = json.loads((other / "tokenizer.json").read_text("utf-8"))
    vocabulary = tokenizer["model"]["vocab"]
    first, second = list(vocabulary)[300:302]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    (other / "tokenizer.json").write_text(json.dumps(tokenizer), "utf-8")
    with pytest.raises(UsageError, match="another tokenizer") as caught:
        evaluate_checkpoint(quantized, other, token_ids=token_ids, resume=False)
    assert caught.value.exit_code == 2


def test_other_embeddings_in_the_unquantized_model_are_refused(
    quantized: Path, unquantized: Path, token_ids: Path, tmp_path: Path
) -> None:
    other = damaged(unquantized, tmp_path / "other", "model.embed_tokens.weight", 2.0)
    with pytest.raises(UnsupportedError, match="embeddings of the two models differ"):
        evaluate_checkpoint(quantized, other, token_ids=token_ids, device="cpu", resume=False)


def test_a_token_outside_of_the_vocabulary_is_refused(quantized: Path, tmp_path: Path) -> None:
    ids = tmp_path / "ids.safetensors"
    save_file({"token_ids": torch.full((2, 8), 512)}, ids)
    with pytest.raises(UsageError, match="outside of the vocabulary"):
        evaluate_checkpoint(quantized, token_ids=ids, device="cpu", resume=False)


def test_a_text_shorter_than_a_window_is_refused(quantized: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("In the beginning")
    with pytest.raises(UsageError, match="shorter than a window"):
        evaluate_checkpoint(quantized, text=text, device="cpu", resume=False)


def test_a_model_type_without_a_class_is_unsupported(checkpoints: Any, token_ids: Path) -> None:
    with pytest.raises(UnsupportedError, match="no class") as caught:
        evaluate_checkpoint(checkpoints("step3p5-like-3key_fused"), token_ids=token_ids, resume=False)
    assert caught.value.exit_code == 4


def test_an_empty_name_of_a_text_is_refused(quantized: Path) -> None:
    with pytest.raises(UsageError, match="--text is empty"):
        evaluate_checkpoint(quantized, text="", device="cpu")


@pytest.mark.parametrize(("text", "ids"), [(None, None), ("a", "b")])
def test_a_text_or_token_ids_but_not_both(quantized: Path, text: str | None, ids: str | None) -> None:
    with pytest.raises(UsageError, match="either a text or token ids"):
        evaluate_checkpoint(quantized, text=text, token_ids=ids)


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


KILLED_IN_THE_SECOND_LAYER = """
import os, signal, sys
from quarkconv.cli.main import main
from quarkconv.evaluate.state import EvaluationState

save, calls = EvaluationState.save, 0

def save_once(self, streams):
    global calls
    calls += 1
    if calls == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    save(self, streams)

EvaluationState.save = save_once
main(sys.argv[1:])
"""
"""Kills itself when the second layer has run, before that is kept."""


def test_a_killed_run_resumes_from_its_last_finished_layer(
    quantized: Path, token_ids: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ("--token-ids", token_ids, "--batch", "1", "--device", "cpu", "--json")
    process = start(KILLED_IN_THE_SECOND_LAYER, "evaluate", quantized, *options)
    process.communicate(timeout=PROCESS_TIMEOUT)
    assert process.returncode == -signal.SIGKILL
    assert list((tmp_path / "cache" / "quarkconv" / "evaluate").glob("*.safetensors"))
    ran: list[int] = []
    run_layer = Run._layer

    def counted(self: Run, number: int, *rest: Any) -> None:
        ran.append(number)
        run_layer(self, number, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(Run, "_layer", counted)
        resumed = evaluate_checkpoint(quantized, token_ids=token_ids, batch=1, device="cpu")
    assert ran == [1, 2, 3]
    whole = evaluate_checkpoint(quantized, token_ids=token_ids, batch=1, device="cpu", resume=False)
    assert resumed.to_json() == whole.to_json()


def test_nothing_is_kept_without_resuming(
    quantized: Path, token_ids: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stops(self: Run, states: Any) -> None:  # noqa: ARG001
        raise KeyboardInterrupt

    monkeypatch.setattr(Run, "scores", stops)
    with pytest.raises(KeyboardInterrupt):
        evaluate_checkpoint(quantized, token_ids=token_ids, device="cpu", resume=False)
    assert not list((tmp_path / "cache").rglob("*"))


def test_a_state_that_cannot_be_read_is_not_used(tmp_path: Path) -> None:
    state = EvaluationState("key", tmp_path)
    state.path.write_bytes(b"cut off")
    left, alive = (state.path.with_suffix(f".{number}") for number in (2**30, os.getpid()))
    left.write_bytes(b"of a process that was killed")
    alive.write_bytes(b"of one that is writing")
    assert state.load() is None
    assert (left.exists(), alive.exists()) == (False, True)
    state.remove()
