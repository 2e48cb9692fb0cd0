"""From a description and a target to a plan, without reading tensor data."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Final

from quarkconv.convert.model_card import CARD_NAME, MAX_CARD_BYTES, converted_card
from quarkconv.convert.options import Options
from quarkconv.description.description import Description
from quarkconv.description.quantized import QuantizedCheckpoint
from quarkconv.errors import UnsupportedError, UsageError
from quarkconv.experts.ranks import RANK_KEY, WHOLE, Rank
from quarkconv.findings import bounded
from quarkconv.headers.collector import collector_paused
from quarkconv.headers.file_names import ASCEND_NAME, CONFIG_NAME, INDEX_NAME, MANIFEST_NAME, MODELOPT_NAME
from quarkconv.headers.shard_files import OTHER_WEIGHTS
from quarkconv.hub.locate import Located
from quarkconv.plan.experts import geometry_of
from quarkconv.plan.pieces import SourceFile, TextFile
from quarkconv.plan.plan import Plan
from quarkconv.plan.quantize import computed
from quarkconv.plan.shards import in_natural_order, pack_shards
from quarkconv.progress import Progress
from quarkconv.scheme.options import DEFAULT, SourceOptions
from quarkconv.targets.base import Target
from quarkconv.targets.changes import conversion_findings
from quarkconv.targets.convertible import check_convertible
from quarkconv.targets.tensors import output_tensors

_REPLACED: Final = frozenset({CONFIG_NAME, INDEX_NAME, MANIFEST_NAME, ASCEND_NAME, MODELOPT_NAME})
_NOT_COPIED: Final = (*OTHER_WEIGHTS, ".safetensors", ".index.json")


def plans_of(
    source: Located, target: Target, options: Options, ranks: Iterable[Rank], progress: Progress
) -> Iterator[Plan]:
    """Describe a model, and plan its conversion for some ranks. Errors as of :func:`make_plan`.

    Args:
        source: the model.
        target: what to convert it to.
        options: what to write.
        ranks: the ranks; the whole model is a single one.
        progress: receives how far reading the headers has come.
    """
    description = options.describe(source.files, progress, target.engine)
    for rank in ranks:
        yield make_plan(
            description, target, options.shard_bytes, rank=rank, base_model=source.repo, options=options.of_source
        )


def make_plan(
    description: Description,
    target: Target,
    max_shard_size: int,
    *,
    rank: Rank = WHOLE,
    base_model: str | None = None,
    options: SourceOptions = DEFAULT,
) -> Plan:
    """Plan the conversion of a described checkpoint.

    Args:
        description: the source.
        target: what to convert it to.
        max_shard_size: largest size of a shard's data in bytes.
        rank: the rank whose part of the experts is planned.
        base_model: Hub repo id of the source, for the model card; None for a local directory.
        options: of the description.

    Raises:
        UsageError: ``max_shard_size`` is not positive.
        SourceError: the source is damaged or inconsistent.
        UnsupportedError: the source is not INT8, or the target cannot represent it.
    """
    if max_shard_size <= 0:
        raise UsageError("Invalid --max-shard-size", expected="more than 0 bytes", found=str(max_shard_size))
    check_convertible(description, target, rank)
    checkpoint = description.checkpoint
    with collector_paused():
        cards, copies = tuple(_cards(description, target, base_model)), tuple(_copies(description))
        losses = conversion_findings(description, target)
        config = target.config(description) | ({} if rank.is_whole else {RANK_KEY: rank.to_json()})
        tensors, checks = output_tensors(description, target, rank)
        if isinstance(checkpoint, QuantizedCheckpoint):
            tensors = [computed(tensor, checkpoint.originals) for tensor in tensors]
        tensors = in_natural_order(tensors)
        texts = (*cards, *target.texts(tensors))
        written = {file.name for file in texts}
        shards = pack_shards(tensors, max_shard_size)
        return Plan(
            target=target.name,
            scheme=description.scheme or "",
            producer_version=description.declared.version if description.declared else None,
            max_shard_size=max_shard_size,
            moe=geometry_of(description.int8_layers, description.config, rank),
            sources=tuple(SourceFile(shard.file, shard.size) for shard in checkpoint.shards),
            checks=tuple(checks),
            shards=shards,
            config=config,
            copies=tuple(copy for copy in copies if copy.name not in written),
            losses=tuple(bounded(losses)),
            texts=texts,
            rank=rank,
            options=options,
        )


def _cards(description: Description, target: Target, base_model: str | None) -> Iterator[TextFile]:
    """The model card, if the source has a readable one."""
    store = description.checkpoint.store
    size = store.size(CARD_NAME)
    if size is None or size > MAX_CARD_BYTES:
        return
    try:
        text = store.read(CARD_NAME, 0, size).decode()
    except UnicodeDecodeError:
        return
    card = converted_card(text, target.name, target.summary, target.facts, base_model)
    if card is not None:
        yield TextFile(CARD_NAME, card)


def _copies(description: Description) -> Iterator[SourceFile]:
    """Every other file of the source, except weights in other formats: they are another copy of the model."""
    store = description.checkpoint.store
    for path in description.checkpoint.files():
        name = path.as_posix()
        if name in _REPLACED or name.endswith(_NOT_COPIED):
            continue
        if "\\" in name or any("\ud800" <= char <= "\udfff" for char in name):
            raise UnsupportedError(
                "The name of a source file cannot be stored in the manifest",
                file=repr(name),
                expected="UTF-8 without backslashes",
                hint="rename the file, or move it out of the source",
            )
        if any(part in _REPLACED or part.endswith(".safetensors") for part in path.parts[:-1]):
            raise UnsupportedError(
                "A folder of the source has the name of an output file",
                file=name,
                hint="rename the folder, or move it out of the source",
            )
        yield SourceFile(name, store.size(name) or 0)
