"""The defects of a source that several readers meet, each as one error with its code.

The codes are those of :mod:`quarkconv.findings`: ``inspect`` reports the same defect under the same name.
"""

from __future__ import annotations

from pathlib import Path

from quarkconv.errors import COPY_AGAIN, SourceError


def missing_file(file: str, code: str) -> SourceError:
    """A file that the checkpoint needs does not exist."""
    return SourceError("The file does not exist", code=code, file=file, hint=COPY_AGAIN)


def unreadable_file(file: str, found: str | None, *, hint: str | None = None) -> SourceError:
    """The system refuses to read a file."""
    return SourceError("The file cannot be read", code="shard-missing", file=file, found=found, hint=hint)


def unreadable_tensor(file: str, tensor: str | None, found: str | None, *, hint: str | None = None) -> SourceError:
    """The system refuses to read the bytes of a tensor, or the file ends before them."""
    message = "A tensor cannot be read"
    return SourceError(message, code="shard-truncated", file=file, tensor=tensor, found=found, hint=hint)


def short_file(message: str, file: str, *, expected: str, found: str) -> SourceError:
    """A safetensors file ends before its header does."""
    return SourceError(message, code="shard-truncated", file=file, expected=expected, found=found, hint=COPY_AGAIN)


def invalid_header(
    file: str,
    *,
    message: str = "The safetensors header is not valid",
    tensor: str | None = None,
    expected: str | None = None,
    found: str,
    hint: str = COPY_AGAIN,
) -> SourceError:
    """A header breaks a rule of the safetensors format, or exceeds a limit."""
    return SourceError(
        message, code="header-invalid", file=file, tensor=tensor, expected=expected, found=found, hint=hint
    )


def unreadable_safetensors(message: str, file: str | Path, error: Exception) -> SourceError:
    """The library of safetensors cannot read a file that is not part of a checkpoint."""
    return SourceError(
        message,
        code="header-invalid",
        file=str(file),
        expected="a safetensors file",
        found=str(error)[:200],
        hint="name a file that safetensors.torch.save_file wrote, or write it again",
    )


def invalid_index(message: str, *, expected: str, found: str) -> SourceError:
    """The index is not a map from tensors to shards of this directory."""
    return SourceError(
        message,
        code="index-invalid",
        file="model.safetensors.index.json",
        expected=expected,
        found=found,
        hint=COPY_AGAIN,
    )


def invalid_quantization(message: str, *, expected: str, found: str, hint: str | None = None) -> SourceError:
    """A quantization_config exceeds a limit of its reader."""
    return SourceError(
        message, code="quant-config-invalid", file="config.json", expected=expected, found=found, hint=hint
    )
