"""Verification in parts: layers and tensors dealt by size to workers that do not talk to each other."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

from quarkconv.description.description import Description
from quarkconv.experts.layer import MoELayer
from quarkconv.load.layer_reads import LayerPart, covered, written_tensors
from quarkconv.plan.manifest import Manifest
from quarkconv.plan.shares import Share
from quarkconv.version import own_version


@dataclass(frozen=True, slots=True)
class Scope:
    """What one worker checks beside the structure, which all of them check.

    Attributes:
        layers: the layers whose numbers it computes.
        names: the tensors, the shards whose headers, and the other files whose bytes it compares; None for all.
        nbytes: the size of these in bytes.
    """

    layers: tuple[MoELayer, ...]
    names: frozenset[str] | None
    nbytes: int


def scope_of(
    description: Description, manifest: Manifest | None, layers: Sequence[MoELayer], share: Share | None
) -> Scope:
    """The scope of a share of the work; of all of it for None.

    The bytes of a layer's experts are compared by the worker that computes its numbers, since they are then read once.

    Args:
        description: the checkpoint.
        manifest: its manifest.
        layers: the layers whose numbers are checked, by all workers together.
        share: the share.
    """
    if share is None:
        total = 0 if manifest is None else sum(shard.size for shard in manifest.shards)
        return Scope(tuple(layers), None, total)
    mine = share.deal({layer.prefix: LayerPart(layer).nbytes for layer in layers})
    chosen = tuple(layer for layer in layers if layer.prefix in mine)
    if manifest is None:
        return Scope(chosen, frozenset(), 0)
    refs, written = description.checkpoint.refs(), written_tensors(manifest)
    of_layers = {layer.prefix: covered(LayerPart(layer), refs, written) for layer in layers}
    dealt = set().union(*of_layers.values())
    sizes = {name: tensor.nbytes for name, tensor in written.items()}
    names = share.deal({name: nbytes for name, nbytes in sizes.items() if name not in dealt})
    names.update(name for prefix in mine for name in of_layers[prefix])
    headers = {shard.file: shard.header for shard in manifest.shards}
    files = share.deal(headers | {file.name: file.size for file in manifest.files})
    nbytes = sum(sizes[name] for name in names) + sum(headers.get(name, 0) for name in files)
    return Scope(chosen, frozenset(names | files), nbytes)


def identity(
    description: Description,
    manifest: Manifest | None,
    layers: Sequence[MoELayer],
    *,
    tokens: Sequence[int],
    seed: int,
    stages: Collection[str],
    compared: Sequence[str],
) -> dict[str, Any]:
    """What parts of one verification have in common.

    Args:
        description, manifest: of the checkpoint.
        layers: the layers whose numbers all parts check together.
        tokens, seed, stages: of the verification.
        compared: the options that name something to compare with.
    """
    refs = description.checkpoint.refs()
    tensors = [[name, ref.dtype, list(ref.shape), ref.file, ref.start] for name, ref in sorted(refs.items())]
    return {
        "quarkconv": own_version(),
        "plan": None if manifest is None else manifest.plan,
        "tensors": hashlib.sha256(json.dumps(tensors).encode()).hexdigest(),
        "layers": [layer.prefix for layer in layers],
        "tokens": list(tokens),
        "seed": seed,
        "stages": sorted(stages),
        "compared": list(compared),
    }
