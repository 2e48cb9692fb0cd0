"""Structure: headers, index, config and manifest compared with each other."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

from quarkconv.description.description import Description
from quarkconv.errors import SourceError, UnsupportedError
from quarkconv.experts.function import Unknown
from quarkconv.experts.knowledge import expert_activation, expert_routing
from quarkconv.experts.layer import MoELayer
from quarkconv.findings import CODES, NOT_UNDERSTOOD, Finding
from quarkconv.headers.checkpoint import Checkpoint
from quarkconv.headers.file_names import ASCEND_NAME, MODELOPT_NAME
from quarkconv.plan.manifest import Manifest
from quarkconv.verify.places import layer_of
from quarkconv.verify.results import Problem, StructureResult

DEQUANTIZED: Final = "bf16"
"""The target without quantized weights."""

_LOADED: Final = frozenset({".safetensors", ".py", ".bin", ".pt", ".gguf"})
"""Suffixes of files that loaders open by default."""
_DECLARING: Final = frozenset({MODELOPT_NAME, ASCEND_NAME})
"""Files by which engines take a model for quantized."""


def check_structure(description: Description, manifest: Manifest | None) -> tuple[StructureResult, list[Problem]]:
    """Compare the headers, index and config of a checkpoint with each other, and with its manifest.

    Args:
        description: the checkpoint.
        manifest: its manifest, or None.

    Returns:
        What was compared, and the problems found.
    """
    damage = list(_truncated(description))
    if manifest is not None:
        damage += _against_manifest(description, description.checkpoint, manifest)
    problems = []
    for item in _unexpected_errors(description, manifest):
        layer, message = layer_of(description, item.subject), f"{item.code}: {item.message}"
        problems.append(Problem("structure", layer, item.subject, message, item.count))
    broken = any(CODES[item.code].blocks is SourceError for item in description.errors())
    checkpoint = description.checkpoint
    result = StructureResult(
        len(checkpoint.shards), len(checkpoint.types), manifest is not None, not damage and not broken
    )
    return result, problems + damage


def function_problems(description: Description, source: Description, layers: Sequence[MoELayer]) -> Iterator[Problem]:
    """Layers of which the config says another routing or activation than the config of the source."""
    for layer in layers:
        for what, function in (("activation", _activation_of), ("routing", _routing_of)):
            found, expected = (function(each.config.raw, layer) for each in (description, source))
            if found != expected:
                message = f"config.json gives the {what} {found}, but the source's gives {expected}"
                yield Problem("structure", layer.index, layer.prefix, message)


def _activation_of(config: Mapping[str, Any], layer: MoELayer) -> str:
    found = expert_activation(config, layer)
    return f"unknown: {found.reason}" if isinstance(found, Unknown) else found.describe()


def _routing_of(config: Mapping[str, Any], layer: MoELayer) -> str:
    found = expert_routing(config, layer)
    return f"unknown: {found.reason}" if isinstance(found, Unknown) else found.describe()


def _unexpected_errors(description: Description, manifest: Manifest | None) -> Iterator[Finding]:
    """The errors that the conversion does not explain: bf16 is not quantized, and unknown names stay unknown."""
    dequantized = manifest is not None and manifest.target == DEQUANTIZED
    for item in description.errors():
        if dequantized and CODES[item.code].blocks is UnsupportedError:
            continue
        if item.code == NOT_UNDERSTOOD and manifest is not None and not _lost_layers(description, manifest):
            continue
        yield item


def _lost_layers(description: Description, manifest: Manifest) -> bool:
    """Whether experts that the conversion understood are not understood now, or not as modules of their own."""
    understood = set() if manifest.moe is None else set(manifest.moe.prefixes)
    return not description.renamed_experts or not understood <= {layer.prefix for layer in description.int8_layers}


def _truncated(description: Description) -> Iterator[Problem]:
    for shard in description.checkpoint.shards:
        if shard.truncated:
            available = shard.size - shard.data_start
            for name, end in zip(shard.names, shard.ends, strict=True):
                if end > available:
                    message = f"{shard.file} is {shard.truncated} bytes too short and cuts this tensor"
                    yield Problem("structure", layer_of(description, name), name, message)


def _against_manifest(description: Description, checkpoint: Checkpoint, manifest: Manifest) -> Iterator[Problem]:
    """Files and tensors that differ from the manifest, are missing, or are not in it."""
    refs = checkpoint.refs()
    sizes = {shard.file: shard.size for shard in checkpoint.shards}
    for written in manifest.shards:
        if written.file not in sizes:
            yield Problem("structure", None, written.file, "The manifest lists this file, but it does not exist")
            continue
        if sizes[written.file] != written.size:
            message = f"The file has {sizes[written.file]} bytes; the manifest lists {written.size}"
            yield Problem("structure", None, written.file, message)
        position = written.header
        for tensor in written.tensors:
            ref = refs.pop(tensor.name, None)
            found = None if ref is None else (ref.dtype, ref.shape, ref.file, ref.start, ref.end)
            expected = (tensor.dtype, tensor.shape, written.file, position, position + tensor.nbytes)
            position += tensor.nbytes
            if found is None:
                message = f"The manifest lists this tensor in {written.file}, but no header has it"
                yield Problem("structure", layer_of(description, tensor.name), tensor.name, message)
            elif found != expected:
                message = f"The header has {_shown(found)}; the manifest lists {_shown(expected)}"
                yield Problem("structure", layer_of(description, tensor.name), tensor.name, message)
    for name in refs:
        yield Problem("structure", layer_of(description, name), name, "The manifest does not list this tensor")
    known = set(manifest.file_names())
    for path in checkpoint.files():
        name = path.as_posix()
        if (path.suffix in _LOADED or name in _DECLARING) and name not in known:
            yield Problem("structure", None, name, "The manifest does not list this file, but loaders may use it")
    for file in manifest.files:
        size = checkpoint.store.size(file.name)
        if size is None:
            yield Problem("structure", None, file.name, "The manifest lists this file, but it does not exist")
        elif size != file.size:
            message = f"The file has {size} bytes; the manifest lists {file.size}"
            yield Problem("structure", None, file.name, message)


def _shown(tensor: tuple[str, tuple[int, ...], str, int, int]) -> str:
    dtype, shape, file, start, end = tensor
    return f"{dtype} {list(shape)} at {start}..{end} of {file}"
