"""Structure: do headers, index, config and manifest tell the same story."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from quarkconv.description.description import Description
from quarkconv.errors import SourceError, UnsupportedError
from quarkconv.findings import CODES, Finding
from quarkconv.headers.checkpoint import Checkpoint
from quarkconv.plan.manifest import Manifest
from quarkconv.verify.places import layer_of
from quarkconv.verify.results import Problem, StructureResult

DEQUANTIZED: Final = "bf16"
"""The target that leaves nothing quantized."""

_LOADED: Final = frozenset({".safetensors", ".py", ".bin", ".pt", ".gguf"})
"""Suffixes of files that loaders pick up by themselves."""


def check_structure(description: Description, manifest: Manifest | None) -> tuple[StructureResult, list[Problem]]:
    """Compare the headers, index and config of a checkpoint with each other, and with its manifest.

    Args:
        description: the checkpoint.
        manifest: its manifest, or None.

    Returns:
        What was compared, and what is wrong.
    """
    damage = list(_truncated(description))
    if manifest is not None:
        damage += _against_manifest(description, description.checkpoint, manifest)
    problems = [
        Problem("structure", layer_of(description, item.subject), item.subject, f"{item.code}: {item.message}",
                item.count)
        for item in _unexpected_errors(description, manifest)
    ]  # fmt: skip
    broken = any(CODES[item.code].blocks is SourceError for item in description.errors())
    checkpoint = description.checkpoint
    result = StructureResult(
        len(checkpoint.shards), len(checkpoint.types), manifest is not None, not damage and not broken
    )
    return result, problems + damage


def _unexpected_errors(description: Description, manifest: Manifest | None) -> Iterator[Finding]:
    """The errors of a checkpoint; that a dequantized one is not quantized is none."""
    dequantized = manifest is not None and manifest.target == DEQUANTIZED
    for item in description.errors():
        if not dequantized or CODES[item.code].blocks is not UnsupportedError:
            yield item


def _truncated(description: Description) -> Iterator[Problem]:
    for shard in description.checkpoint.shards:
        if shard.truncated:
            available = shard.size - shard.data_start
            for name, end in zip(shard.names, shard.ends, strict=True):
                if end > available:
                    message = f"{shard.file} ends {shard.truncated} bytes too early and cuts this tensor"
                    yield Problem("structure", layer_of(description, name), name, message)


def _against_manifest(description: Description, checkpoint: Checkpoint, manifest: Manifest) -> Iterator[Problem]:
    """Every file and tensor of the manifest is there as it says, and nothing else is."""
    refs = checkpoint.refs()
    sizes = {shard.file: shard.size for shard in checkpoint.shards}
    for written in manifest.shards:
        if written.file not in sizes:
            yield Problem("structure", None, written.file, "The manifest names this file, and it is not there")
            continue
        if sizes[written.file] != written.size:
            message = f"The file has {sizes[written.file]} bytes, the manifest says {written.size}"
            yield Problem("structure", None, written.file, message)
        position = written.header
        for tensor in written.tensors:
            ref = refs.pop(tensor.name, None)
            found = None if ref is None else (ref.dtype, ref.shape, ref.file, ref.start, ref.end)
            expected = (tensor.dtype, tensor.shape, written.file, position, position + tensor.nbytes)
            position += tensor.nbytes
            if found is None:
                message = f"The manifest says that {written.file} holds this tensor, and no header has it"
                yield Problem("structure", layer_of(description, tensor.name), tensor.name, message)
            elif found != expected:
                message = f"The header says {_shown(found)}, the manifest {_shown(expected)}"
                yield Problem("structure", layer_of(description, tensor.name), tensor.name, message)
    for name in refs:
        yield Problem("structure", layer_of(description, name), name, "The manifest does not know this tensor")
    known = set(manifest.file_names())
    for path in checkpoint.files():
        if path.suffix in _LOADED and path.as_posix() not in known:
            yield Problem(
                "structure", None, path.as_posix(), "The manifest does not know this file, and loaders may use it"
            )
    for file in manifest.files:
        size = checkpoint.store.size(file.name)
        if size is None:
            yield Problem("structure", None, file.name, "The manifest names this file, and it is not there")
        elif size != file.size:
            message = f"The file has {size} bytes, the manifest says {file.size}"
            yield Problem("structure", None, file.name, message)


def _shown(place: tuple[str, tuple[int, ...], str, int, int]) -> str:
    dtype, shape, file, start, end = place
    return f"{dtype} {list(shape)} at {start}..{end} of {file}"
