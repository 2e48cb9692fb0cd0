"""Whether each tensor outside of the understood experts comes from the tensor of the same name in the source.

Bytes are compared with those of the source that the manifest names. For experts, numbers and weights show that these
are the right ones; for every other module its name does.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import Final

from quarkconv.description.description import Description
from quarkconv.headers.safetensors import TensorRef
from quarkconv.plan.manifest import Manifest, WrittenTensor
from quarkconv.plan.pieces import Copy
from quarkconv.scheme.companions import name_in_engines, name_in_quark
from quarkconv.scheme.form import fused_names, linear_names
from quarkconv.verify.places import layer_of
from quarkconv.verify.results import Problem

_F32: Final = 4
_ORIGINS: Final[Mapping[str, frozenset[str]]] = {
    "weight": frozenset({"weight", "weight_scale"}),
    "weight_scale": frozenset({"weight_scale", "weight_scale_inv", "weight"}),
    "weight_offset": frozenset({"weight"}),
}
"""Last part of the name of a tensor -> those of the source's tensors of the module that it is made of, where these are
others: bf16 multiplies codes by scales, and --quantize computes scales from weights."""


def origin_problems(description: Description, manifest: Manifest, source: Description) -> Iterator[Problem]:
    """The tensors that are not made of the whole tensor of their name, and the modules of the source that are missing.

    Args:
        description: the converted checkpoint.
        manifest: its manifest.
        source: the checkpoint that it was converted from.
    """
    refs = source.checkpoint.refs()
    in_layers = _of_layers(description)
    for shard in manifest.shards:
        for tensor in shard.tensors:
            wrong = None if tensor.name in in_layers else _wrong_origin(tensor, refs)
            if wrong is not None:
                message = f"It comes from {wrong} of the source, not from the tensor of the same name"
                yield Problem("bytes", layer_of(description, tensor.name), tensor.name, message)
    in_source_layers = _of_layers(source)
    for module in source.stored.linears:
        name = linear_names(module).weight
        if name not in description.checkpoint.types and name not in in_source_layers and not source.is_mtp(module):
            yield Problem(
                "bytes", layer_of(description, name), name, "The source has this tensor, but the output does not"
            )


def _of_layers(description: Description) -> frozenset[str]:
    """The tensors of the modules of understood experts."""
    modules = [module for layer in description.moe_layers for module in (*layer.module_names, *layer.identity_modules)]
    return frozenset(name for module in modules for name in (*linear_names(module), *fused_names(module)))


def _wrong_origin(tensor: WrittenTensor, refs: Mapping[str, TensorRef]) -> str | None:
    """The tensor of the source, or the part of one, that a tensor must not be made of; None where all is right."""
    owner, _, leaf = tensor.name.rpartition(".")
    own = {tensor.name, *(f"{owner}.{origin}" for origin in _ORIGINS.get(leaf, ()))}
    read: dict[str, list[Copy]] = {}
    for written in tensor.pieces:
        for source in written.piece.reads():
            if source.tensor not in own and tensor.name not in _renamed(source.tensor):
                return source.tensor
            read.setdefault(source.tensor, []).append(source)
    if leaf == "weight_scale" and tensor.nbytes == _F32 * len(tensor.pieces):
        return None  # the first of the equal scales of a matrix: Quark has one where activations are static
    return next((f"a part of {name}" for name, ranges in read.items() if not _is_whole(ranges, refs.get(name))), None)


def _renamed(name: str) -> Collection[str]:
    """The names that a target may give a tensor of the source."""
    return name, name_in_engines(name), name_in_quark(name)


def _is_whole(ranges: list[Copy], ref: TensorRef | None) -> bool:
    """Whether ranges follow one another from the first byte of a tensor to its last."""
    if ref is None:
        return False
    position = ref.start
    for item in ranges:
        if (item.file, item.start) != (ref.file, position):
            return False
        position += item.nbytes
    return position == ref.end
