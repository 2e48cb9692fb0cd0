"""Load the experts of one layer, from any layout."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from quarkconv.description.description import describe
from quarkconv.errors import UsageError
from quarkconv.experts.ranks import WHOLE, make_rank
from quarkconv.headers.rank_index import RANKS_NAME
from quarkconv.hub.locate import locate
from quarkconv.load.arenas import Arena
from quarkconv.load.devices import pick_device
from quarkconv.load.experts import FusedExperts
from quarkconv.load.layer_reader import READERS, LayerReader
from quarkconv.load.layer_reads import LayerPart
from quarkconv.load.select import LayerName, check_loadable, select_layer


def load_fused_experts(
    model: str | Path,
    layer: LayerName,
    device: str | torch.device = "cpu",
    *,
    rank: int = 0,
    world_size: int = 1,
    parallel: str = "tp",
) -> FusedExperts:
    """Load the routed experts of one layer, stacked, from any INT8 MoE checkpoint.

    With a ``world_size``, only the part of one rank is read: of a whole checkpoint, or of a directory that was
    converted by rank in the same way. The codes are read to one block of host memory; on the CPU the tensors are views
    of it.

    Args:
        model: directory or Hub repo id of a Quark export or of a converted checkpoint.
        layer: number of the layer, where only one layer has it, or module: ``model.layers.3.mlp.experts`` or
            ``model.layers.3.mlp``.
        device: where the tensors go.
        rank, world_size: which of how many ranks.
        parallel: ``tp`` for tensor parallel, ``ep`` for expert parallel.

    Raises:
        SourceError: the checkpoint cannot be read.
        UsageError: no MoE layer has this number or module, or several have this number; no such device or rank; or the
            checkpoint is divided in another way.
        UnsupportedError: the layer's experts are not int8, or cannot be divided among so many ranks.
    """
    target = pick_device(device)
    requested = make_rank(parallel, rank, world_size)
    root = locate(model, cache=True).files.root
    if not requested.is_whole and (root / RANKS_NAME).is_file():
        root = root / requested.folder()
    description = describe(root)
    stored = description.config.rank
    if not requested.is_whole and not stored.is_whole and stored != requested:
        raise UsageError(
            "The checkpoint is divided among ranks differently",
            file=str(root),
            expected=str(requested.to_json()),
            found=str(stored.to_json()),
        )
    chosen = select_layer(description.moe_layers, layer, str(model))
    check_loadable(chosen)
    part = LayerPart(chosen, requested if stored.is_whole else WHOLE)
    part.rank.check(chosen.prefix, chosen.experts, chosen.intermediate)
    with ThreadPoolExecutor(READERS) as pool, LayerReader(description, pool) as reader:
        experts, _ = reader.read(part, Arena(part.nbytes))
    return experts.to(target)
