"""``verify``: structure, bytes and numbers of one checkpoint."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Final, Protocol

import torch

from quarkconv.description import Description, describe
from quarkconv.errors import UnsupportedError, UsageError
from quarkconv.experts.topology import MoELayer
from quarkconv.hub import resolve_model
from quarkconv.manifest import Manifest, read_manifest
from quarkconv.verify.checksums import check_bytes
from quarkconv.verify.devices import pick_device
from quarkconv.verify.loading import ExpertReader, check_loadable
from quarkconv.verify.numbers import backend_name, verify_layer
from quarkconv.verify.results import (
    BytesResult,
    LayerNumbers,
    NumbersResult,
    Problem,
    Verification,
)
from quarkconv.verify.structure import check_structure

DEFAULT_TOKENS: Final = 64


class Watcher(Protocol):
    """Is told how verification gets on."""

    def total_bytes(self, total: int) -> None:
        """How many bytes will be checked."""

    def checked(self, nbytes: int) -> None:
        """That many more bytes were checked."""

    def layer(self, numbers: LayerNumbers) -> None:
        """The numbers of one more layer."""


class _Silent:
    def total_bytes(self, total: int) -> None: ...
    def checked(self, nbytes: int) -> None: ...
    def layer(self, numbers: LayerNumbers) -> None: ...


def verify_checkpoint(
    model: str | Path,
    source: str | Path | None = None,
    device: str = "auto",
    *,
    layers: set[int] | None = None,
    tokens: int = DEFAULT_TOKENS,
    seed: int = 0,
    watcher: Watcher | None = None,
) -> Verification:
    """Prove that a checkpoint is what it should be.

    With a manifest: structure, bytes and numbers. Without one (a Quark export as it came): structure and numbers.

    Args:
        model: directory or Hub repo id of a checkpoint whose experts are int8.
        source: the checkpoint that it was converted from; bytes and references are then also taken from there.
        device: ``cuda``, ``cpu``, or ``auto`` for a GPU where there is one.
        layers: numbers of the MoE layers whose numbers are checked; None for all.
        tokens: random tokens for each layer.
        seed: of the random tokens.
        watcher: told of progress.

    Raises:
        UsageError: no such device, layer or number of tokens.
        SourceError: the checkpoint or the source cannot be read at all.
        UnsupportedError: the checkpoint is not an INT8 mixture of experts.
    """
    if tokens < 1:
        raise UsageError("The number of tokens must be positive", found=str(tokens))
    if not 0 <= seed < 2**32:
        raise UsageError("The seed is out of range", expected="a number from 0 to 2^32 - 1", found=str(seed))
    watcher = watcher or _Silent()
    place = pick_device(device)
    description = describe(resolve_model(model))
    manifest = read_manifest(description.checkpoint.root)
    _check_verifiable(description, manifest)
    _check_layers(description, layers)
    origin = describe(resolve_model(source)) if source is not None else None
    problems: list[Problem] = []
    structure = check_structure(description, manifest, problems)
    checked = _bytes(description, manifest, origin, problems, watcher)
    if structure.readable:
        numbers = _numbers(description, origin, place, layers, tokens, seed, problems, watcher)
    else:
        said = "the structure is broken"
        numbers = NumbersResult(place.type, backend_name(place), tokens, seed, skipped=said)
    return Verification(
        str(model), None if source is None else str(source), description.scheme, structure, checked, numbers,
        tuple(problems),
    )  # fmt: skip


def _check_verifiable(description: Description, manifest: Manifest | None) -> None:
    if manifest is not None or description.int8_layers:
        return
    first = next(iter(description.findings), None)
    raise UnsupportedError(
        "There are no INT8 experts to verify", file=str(description.checkpoint.root),
        expected="a checkpoint whose routed experts are stored in int8",
        found=first.message if first else "none", hint="run `quarkconv inspect`",
    )  # fmt: skip


def _check_layers(description: Description, wanted: set[int] | None) -> None:
    known = {layer.index for layer in description.int8_layers}
    if wanted is not None and not wanted <= known:
        have = ", ".join(map(str, sorted(known))) or "none"
        absent = sorted(wanted - known)
        missing = ", ".join(map(str, absent[:5])) + (f" and {len(absent) - 5} more" if len(absent) > 5 else "")
        raise UsageError("There is no such INT8 MoE layer", expected=f"layers among {have}", found=missing)


def _bytes(
    description: Description,
    manifest: Manifest | None,
    origin: Description | None,
    problems: list[Problem],
    watcher: Watcher,
) -> BytesResult:
    if manifest is None:
        return BytesResult(skipped="there is no quarkconv.json: the checkpoint is not a conversion of this tool")
    watcher.total_bytes(sum(shard.size for shard in manifest.shards))
    source = origin.checkpoint.root if origin else None
    return check_bytes(description, manifest, source, problems, watcher.checked, min(4, os.cpu_count() or 1))


def _numbers(
    description: Description,
    origin: Description | None,
    device: torch.device,
    wanted: set[int] | None,
    tokens: int,
    seed: int,
    problems: list[Problem],
    watcher: Watcher,
) -> NumbersResult:
    origins = {layer.prefix: layer for layer in origin.int8_layers} if origin else {}
    results = []
    with ExpertReader(description) as reader, ExpertReader(origin or description) as source_reader:
        for layer in description.int8_layers:
            if wanted is not None and layer.index not in wanted:
                continue
            check_loadable(layer)
            source = _counterpart(layer, origins, origin, source_reader)
            results.append(
                verify_layer(layer, reader, source, device=device, tokens=tokens, seed=seed, problems=problems)
            )
            watcher.layer(results[-1])
    return NumbersResult(device.type, backend_name(device), tokens, seed, tuple(results))


def _counterpart(
    layer: MoELayer, origins: dict[str, MoELayer], origin: Description | None, reader: ExpertReader
) -> tuple[MoELayer, ExpertReader] | None:
    """The same layer of the source."""
    if origin is None:
        return None
    found = origins.get(layer.prefix)
    if found is None or found.geometry != layer.geometry:
        raise UsageError(
            "The source does not have this layer in this shape", file=str(origin.checkpoint.root), tensor=layer.prefix,
            hint="give --source the checkpoint that was converted, or leave it out",
        )  # fmt: skip
    return found, reader
