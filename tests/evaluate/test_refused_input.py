"""Models, texts, options and files that an evaluation refuses."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from support.changed import damaged, with_config
from support.exports import DATA, restore
from support.program import run_cli

from quarkconv import SourceError, UnsupportedError, UsageError, WriteError, convert_checkpoint, evaluate_checkpoint
from quarkconv.evaluate.request import Limits
from quarkconv.evaluate.run import Run

pytestmark = pytest.mark.long(10)


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
    with pytest.raises(UsageError, match="--record would overwrite an unrelated file"):
        evaluate_checkpoint(quantized, **options, record=token_ids, device="cpu", resume=False)
    assert token_ids.read_bytes() == before


def test_another_model_as_the_unquantized_one_is_refused(
    quantized: Path, checkpoints: Any, token_ids: Path, tmp_path: Path
) -> None:
    other = convert_checkpoint(checkpoints("mixtral-quark0.11-eager"), "bf16", tmp_path / "other").output
    with pytest.raises(UsageError, match="different class"):
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


@pytest.mark.parametrize("option", ["--record", "--report"])
def test_a_file_that_cannot_be_created_is_refused_before_anything_runs(
    option: str, capsys: pytest.CaptureFixture[str], quantized: Path, token_ids: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Run, "layers_of", lambda *_: pytest.fail("it ran"))
    words = ("evaluate", quantized, "--token-ids", token_ids, "--device", "cpu", option, "/does/not/exist/file")
    status, _, err = run_cli(capsys, *words)
    assert status == 5
    assert f"The folder for {option} does not exist" in err


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


def test_another_tokenizer_in_the_unquantized_model_is_refused(
    quantized: Path, unquantized: Path, token_ids: Path, tmp_path: Path
) -> None:
    other = shutil.copytree(unquantized, tmp_path / "other")
    tokenizer = json.loads((other / "tokenizer.json").read_text("utf-8"))
    vocabulary = tokenizer["model"]["vocab"]
    first, second = list(vocabulary)[300:302]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    (other / "tokenizer.json").write_text(json.dumps(tokenizer), "utf-8")
    with pytest.raises(UsageError, match="different tokenizer") as caught:
        evaluate_checkpoint(quantized, other, token_ids=token_ids, resume=False)
    assert caught.value.exit_code == 2
    assert caught.value.expected == f"{len(vocabulary)} tokens, {first!r} is {vocabulary[second]}"
    assert caught.value.found == f"{len(vocabulary)} tokens, {first!r} is {vocabulary[first]}"


def test_other_embeddings_in_the_unquantized_model_are_refused(
    quantized: Path, unquantized: Path, token_ids: Path, tmp_path: Path
) -> None:
    other = damaged(unquantized, tmp_path / "other", "model.embed_tokens.weight", 2.0)
    with pytest.raises(UsageError, match="embeddings of the two models differ"):
        evaluate_checkpoint(quantized, other, token_ids=token_ids, device="cpu", resume=False)


def test_a_token_outside_of_the_vocabulary_is_refused(quantized: Path, tmp_path: Path) -> None:
    ids = tmp_path / "ids.safetensors"
    save_file({"token_ids": torch.full((2, 8), 512)}, ids)
    with pytest.raises(UsageError, match="outside the vocabulary"):
        evaluate_checkpoint(quantized, token_ids=ids, device="cpu", resume=False)


def test_a_text_shorter_than_a_window_is_refused(quantized: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("In the beginning")
    with pytest.raises(UsageError, match="shorter than a window"):
        evaluate_checkpoint(quantized, text=text, device="cpu", resume=False)


def test_a_model_type_without_a_class_is_unsupported(quantized: Path, token_ids: Path, tmp_path: Path) -> None:
    model = shutil.copytree(quantized, tmp_path / "model")
    config = json.loads((model / "config.json").read_text("utf-8"))
    (model / "config.json").write_text(json.dumps({**config, "model_type": "grok-1"}), "utf-8")
    with pytest.raises(UnsupportedError, match="no class") as caught:
        evaluate_checkpoint(model, token_ids=token_ids, resume=False)
    assert caught.value.exit_code == 4


@pytest.mark.parametrize("name", ["deepseek_v3-0.13-eager", "deepseek_v3-0.13-f2f"])
def test_a_head_dim_that_the_class_fails_with_is_named(name: str, tmp_path: Path) -> None:
    model, ids = restore(DATA / "families" / name, tmp_path / "model"), few_ids(tmp_path)
    with pytest.raises(UnsupportedError, match="cannot be run layer by layer") as caught:
        evaluate_checkpoint(model, token_ids=ids, device="cpu", resume=False)
    assert caught.value.hint == (
        "config.json has head_dim 8 and qk_rope_head_dim 4: classes with MLA rotate head_dim elements; "
        "remove head_dim from config.json"
    )
    config = json.loads((model / "config.json").read_text("utf-8"))
    del config["head_dim"]
    (model / "config.json").write_text(json.dumps(config), "utf-8")
    assert evaluate_checkpoint(model, token_ids=ids, device="cpu", resume=False).int8 is not None


def test_experts_of_two_sizes_are_refused_and_evaluate_dequantized(tmp_path: Path) -> None:
    """As the hint says: ernie4_5_vl_moe file to file, whose experts of text and of images lie under one module."""
    model, ids = restore(DATA / "families" / "ernie4_5_vl_moe-0.13-f2f", tmp_path / "model"), few_ids(tmp_path)
    with pytest.raises(UnsupportedError, match="differ in size: intermediate sizes 8, 4") as caught:
        evaluate_checkpoint(model, token_ids=ids, device="cpu", resume=False)
    assert caught.value.exit_code == 4
    assert "`quarkconv convert --to bf16`" in str(caught.value.hint)
    floats = convert_checkpoint(model, "bf16", tmp_path / "floats").output
    found = evaluate_checkpoint(floats, floats, token_ids=ids, device="cpu", resume=False)
    assert found.int8 is None
    assert found.dequantized is not None
    assert found.dequantized.mean == 0


def few_ids(folder: Path) -> Path:
    """Two windows of eight tokens of the smallest vocabulary."""
    save_file({"token_ids": torch.arange(16).reshape(2, 8)}, folder / "ids.safetensors")
    return folder / "ids.safetensors"


def test_an_empty_name_of_a_text_is_refused(quantized: Path) -> None:
    with pytest.raises(UsageError, match="--text is empty"):
        evaluate_checkpoint(quantized, text="", device="cpu")


@pytest.mark.parametrize(("text", "ids"), [(None, None), ("a", "b")])
def test_neither_or_both_of_a_text_and_token_ids_are_refused(
    quantized: Path, text: str | None, ids: str | None
) -> None:
    with pytest.raises(UsageError, match="either a text or token ids"):
        evaluate_checkpoint(quantized, text=text, token_ids=ids)
