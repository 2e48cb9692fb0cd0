"""Windows from texts and token ids, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from quarkconv.errors import SourceError, UsageError
from quarkconv.evaluate.windows import Windows, windows_of_ids, windows_of_text


@pytest.fixture
def tokenizer(tmp_path: Path) -> Path:
    from tokenizers import Tokenizer, models, pre_tokenizers

    alphabet = {letter: number for number, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=alphabet, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    path = tmp_path / "tokenizer.json"
    tokenizer.save(str(path))
    return path


def test_a_text_is_cut_into_windows_and_the_rest_is_not_used(tmp_path: Path, tokenizer: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("abcdefghijk")
    windows = windows_of_text(text, tokenizer, 4)
    letters = {number: letter for letter, number in json.loads(tokenizer.read_text("utf-8"))["model"]["vocab"].items()}
    assert ["".join(letters[number] for number in window) for window in windows.ids.tolist()] == ["abcd", "efgh"]
    assert windows_of_text(text, tokenizer, 4, count=1).count == 1


def test_the_second_half_of_a_window_is_scored() -> None:
    windows = Windows(torch.zeros(3, 8, dtype=torch.int64), "")
    assert list(windows.scored) == [4, 5, 6]  # each predicts the token after it


def test_a_text_shorter_than_a_window_is_refused(tmp_path: Path, tokenizer: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("abc")
    with pytest.raises(UsageError, match="shorter than a window") as caught:
        windows_of_text(text, tokenizer, 4)
    assert (caught.value.expected, caught.value.found) == ("at least 4 tokens", "3 tokens")


@pytest.mark.parametrize(
    "tensors",
    [
        {"ids": torch.zeros(2, 8, dtype=torch.int64)},
        {"token_ids": torch.zeros(2, 8, dtype=torch.int32)},
        {"token_ids": torch.zeros(16, dtype=torch.int64)},
        {"token_ids": torch.zeros(2, 3, dtype=torch.int64)},
    ],
)
def test_other_tensors_are_refused(tmp_path: Path, tensors: dict[str, torch.Tensor]) -> None:
    path = tmp_path / "ids.safetensors"
    save_file(tensors, path)
    with pytest.raises(UsageError, match="no windows of token ids"):
        windows_of_ids(path)


def test_a_file_that_is_not_safetensors_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "ids.safetensors"
    path.write_text("no header")
    with pytest.raises(SourceError, match="token ids cannot be read"):
        windows_of_ids(path)


@pytest.mark.parametrize("token", [-1, 320])
def test_tokens_outside_of_the_vocabulary_are_refused(token: int) -> None:
    windows = Windows(torch.tensor([[1, 2, token, 3]]), "ids")
    with pytest.raises(UsageError, match="outside the vocabulary") as caught:
        windows.check_vocabulary(320)
    assert caught.value.found == f"{token} in window 0, position 2"


def test_a_model_without_a_tokenizer_wants_token_ids(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("abcdefgh")
    with pytest.raises(SourceError) as caught:
        windows_of_text(text, tmp_path / "tokenizer.json", 4)
    assert "--token-ids" in str(caught.value.hint)
