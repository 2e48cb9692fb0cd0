"""Layers of multi-token prediction: which tensors they are, and a checkpoint without them.

They are stored in a module of their own, ``mtp.layers.0`` (Qwen), or as layers after the model's last one,
``model.layers.61`` (DeepSeek, GLM). The config may count these in or not; modules that only they have tell them apart.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator
from dataclasses import replace
from itertools import compress
from typing import Final

from quarkconv.dtypes import TensorType
from quarkconv.experts.config import STACKS, ModelConfig, model_config, stack_of
from quarkconv.headers.checkpoint import Checkpoint
from quarkconv.headers.safetensors import ShardHeader

_OWN_MODULE: Final = re.compile(r"(?:^|\.)mtp(?:_\w+)?\.")
_OWN_TENSORS: Final = ("eh_proj.weight", "enorm.weight")
"""Tensors that only layers of multi-token prediction have, in vLLM's ``*_mtp.py`` and the published models."""
_MAX_LAYERS: Final = 1_000
"""Layers that are searched for these tensors, at most: a config may claim any number."""
_LAYER: Final = re.compile(r"(.*?(?:^|\.)layers\.)(\d{1,9})\.")


def mtp_test(names: Collection[str], config: ModelConfig) -> Callable[[str], bool]:
    """A test of names of tensors or modules: True inside a layer of multi-token prediction.

    Args:
        names: the tensors of the checkpoint; those of routed experts identify the language model's layers.
        config: the config of the model.
    """
    last, root = config.hidden_layers, _layers_root(names)
    counted_in = frozenset(_counted_in(names, config))

    def is_mtp(name: str) -> bool:
        if _OWN_MODULE.search(name):
            return True
        if root is None or last is None or not name.startswith(root):
            return False
        layer = _LAYER.match(f"{name}.")
        if layer is None or layer[1] != root:
            return False
        return int(layer[2]) >= last or int(layer[2]) in counted_in

    return is_mtp


def _layers_root(names: Collection[str]) -> str | None:
    """The start of the names of the language model's layers: ``model.layers.``."""
    experts = (name for name in names if ".experts." in name and not _OWN_MODULE.search(name))
    expert = next((name for name in experts if stack_of(name) in ("", *STACKS)), None)
    found = None if expert is None else _LAYER.match(expert)
    return None if found is None else found[1]


def _counted_in(names: Collection[str], config: ModelConfig) -> Iterator[int]:
    """The numbers of layers of multi-token prediction that ``num_hidden_layers`` counts in."""
    root = _layers_root(names) if config.hidden_layers else None
    for number in range(min(config.hidden_layers or 0, _MAX_LAYERS)) if root else ():
        if any(f"{root}{number}.{tensor}" in names for tensor in _OWN_TENSORS):
            yield number


def without_mtp(checkpoint: Checkpoint) -> tuple[Checkpoint, tuple[str, ...]]:
    """A checkpoint without the tensors of its layers of multi-token prediction, and the names of these."""
    config = model_config(checkpoint.config)
    is_mtp = mtp_test(checkpoint.types, config)
    dropped = [name for name in checkpoint.types if is_mtp(name)]
    names = frozenset(dropped)
    shards = tuple(_without(shard, names) for shard in checkpoint.shards)
    types: dict[str, TensorType] = {name: found for name, found in checkpoint.types.items() if name not in names}
    counted_in = sum(1 for _ in _counted_in(checkpoint.types, config))
    ascend = checkpoint.ascend
    if ascend is not None:
        ascend = {name: entry for name, entry in ascend.items() if name not in names}
    return replace(checkpoint, config=config.without_mtp(counted_in), shards=shards, types=types, ascend=ascend), tuple(
        dropped
    )


def _without(shard: ShardHeader, names: frozenset[str]) -> ShardHeader:
    kept = [name not in names for name in shard.tensors]
    if all(kept):
        return shard
    tensors = dict(compress(shard.tensors.items(), kept))
    return shard._replace(
        tensors=tensors,
        starts=tuple(compress(shard.starts, kept)),
        ends=tuple(compress(shard.ends, kept)),
        nbytes=sum(found.nbytes for found in tensors.values()),
    )
