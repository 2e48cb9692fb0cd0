"""Text or token ids -> windows of equal length.

A window is evaluated by itself, and its second half is scored, so that a scored token has at least half a window of
context. llama.cpp's ``llama-perplexity`` cuts and scores in the same way, so its figures compare.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Final

import torch
from safetensors import safe_open
from torch import Tensor

from quarkconv.defects import unreadable_safetensors
from quarkconv.errors import SourceError, UsageError

TOKEN_IDS: Final = "token_ids"
"""Name of the tensor in a file of token ids."""
MIN_WINDOW: Final = 4


@dataclass(frozen=True, slots=True)
class Windows:
    """Token ids, int64 [W, L]: W windows of L tokens.

    Attributes:
        ids: the tokens.
        source: the file, for messages.
    """

    ids: Tensor
    source: str

    @property
    def count(self) -> int:
        """W."""
        return self.ids.shape[0]

    @property
    def length(self) -> int:
        """L."""
        return self.ids.shape[1]

    @property
    def scored(self) -> range:
        """Positions whose next token is scored: the second half of a window, without its last token."""
        return range(self.length // 2, self.length - 1)

    def check_vocabulary(self, size: int) -> None:
        """Refuse tokens that a model does not have.

        Raises:
            UsageError: a token id is negative, or not below ``size``.
        """
        outside = ((self.ids < 0) | (self.ids >= size)).nonzero()
        if len(outside):
            window, place = outside[0].tolist()
            raise UsageError(
                "A token id is outside the vocabulary",
                file=self.source,
                expected=f"0 to {size - 1}",
                found=f"{int(self.ids[window, place])} in window {window}, position {place}",
                hint="use the tokenizer of this model",
            )


def windows_of_ids(path: str | Path, count: int | None = None) -> Windows:
    """Windows from a safetensors file with ``token_ids`` int64 [W, L].

    Args:
        path: the file.
        count: how many windows to take; None for all.

    Raises:
        SourceError: the file cannot be read.
        UsageError: it holds no such tensor, or windows that are too short.
    """
    try:
        with safe_open(path, framework="pt") as handle:
            names = list(handle.keys())
            ids: Tensor | None = handle.get_tensor(TOKEN_IDS) if TOKEN_IDS in names else None
    except Exception as error:  # safetensors raises its own type for headers, OSError for the rest
        raise unreadable_safetensors("The token ids cannot be read", path, error) from error
    if ids is None or ids.dtype != torch.int64 or ids.dim() != 2 or ids.shape[0] == 0 or ids.shape[1] < MIN_WINDOW:
        found = "no such tensor" if ids is None else f"{str(ids.dtype).removeprefix('torch.')} {list(ids.shape)}"
        raise UsageError(
            "The file has no windows of token ids",
            file=str(path),
            tensor=TOKEN_IDS,
            expected=f"int64 [windows, window], windows of at least {MIN_WINDOW} tokens",
            found=found,
        )
    return Windows(ids[:count].contiguous(), str(path))


def windows_of_text(path: str | Path, tokenizer_file: Path, length: int, count: int | None = None) -> Windows:
    """Windows from a UTF-8 text, by the model's own ``tokenizer.json``.

    The whole text is tokenized once and cut into windows; a shorter rest at the end is not used.

    Args:
        path: the text.
        tokenizer_file: ``tokenizer.json`` of the model.
        length: tokens of a window.
        count: how many windows to take; None for all.

    Raises:
        SourceError: the text or the tokenizer cannot be read.
        UsageError: the text is shorter than a window.
    """
    if length < MIN_WINDOW:
        raise UsageError("The window is too short", expected=f"at least {MIN_WINDOW} tokens", found=str(length))
    try:
        text = Path(path).read_text("utf-8")
    except OSError as error:
        raise SourceError(
            "The text cannot be read",
            code="text-invalid",
            file=str(path),
            expected="a UTF-8 text file",
            found=error.strerror or str(error),
            hint="give --text a file that exists and can be read",
        ) from error
    except UnicodeDecodeError as error:
        raise SourceError(
            "The text is not UTF-8",
            code="text-invalid",
            file=str(path),
            expected="a UTF-8 text file",
            found=f"{error.reason} at byte {error.start}",
            hint="convert it first: iconv -t UTF-8",
        ) from error
    ids = load_tokenizer(tokenizer_file).encode(text).ids
    windows = len(ids) // length
    if windows == 0:
        raise UsageError(
            "The text is shorter than a window",
            file=str(path),
            expected=f"at least {length:,} tokens",
            found=f"{len(ids):,} tokens",
            hint="give a longer text" + (", or a smaller --window" if len(ids) >= MIN_WINDOW else ""),
        )
    windows = windows if count is None else min(windows, count)
    return Windows(torch.tensor(ids[: windows * length], dtype=torch.int64).reshape(windows, length), str(path))


def load_tokenizer(path: Path):  # type: ignore[no-untyped-def]  # tokenizers ships no types
    """The tokenizer in a ``tokenizer.json``.

    Raises:
        SourceError: the file is missing or invalid.
        UsageError: the package ``tokenizers`` is missing.
    """
    try:
        from tokenizers import Tokenizer
    except ImportError as error:
        raise UsageError(
            "--text needs the package tokenizers", hint="pip install 'transformers>=5' tokenizers, or give --token-ids"
        ) from error
    if not path.is_file():
        raise SourceError(
            "The model has no tokenizer.json",
            code="tokenizer-missing",
            file=str(path),
            hint="give token ids instead of text: --token-ids FILE.safetensors",
        )
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # the package raises plain Exception
        raise SourceError(
            "The tokenizer cannot be read",
            code="tokenizer-invalid",
            file=str(path),
            found=str(error)[:200],
            hint="download or copy the file again, or give token ids instead of text: --token-ids FILE.safetensors",
        ) from error
