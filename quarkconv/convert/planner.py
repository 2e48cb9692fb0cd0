"""From a description and a target to a plan, without reading tensor data."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from itertools import chain, pairwise
from typing import Final

from quarkconv.convert.model_card import CARD_NAME, MAX_CARD_BYTES, converted_card
from quarkconv.description.description import Description
from quarkconv.description.quantized import QuantizedCheckpoint
from quarkconv.errors import SourceError, UnsupportedError, UsageError
from quarkconv.experts.ranks import RANK_KEY, WHOLE, Rank
from quarkconv.findings import CODES, Severity, bounded
from quarkconv.headers.checkpoint import ASCEND_NAME, CONFIG_NAME, INDEX_NAME, MANIFEST_NAME
from quarkconv.headers.collector import collector_paused
from quarkconv.headers.safetensors import TensorRef
from quarkconv.plan.experts import ExpertSource, dequantized, linear_module
from quarkconv.plan.pieces import Check, Copy, MoEGeometry, OutputTensor, Plan, SourceFile, TextFile
from quarkconv.plan.quantize import computed
from quarkconv.plan.shards import pack_shards
from quarkconv.scheme.stored import fused_names, linear_names
from quarkconv.targets.base import Target
from quarkconv.targets.changes import conversion_findings

_REPLACED: Final = frozenset({CONFIG_NAME, INDEX_NAME, MANIFEST_NAME, ASCEND_NAME})
_OTHER_WEIGHTS: Final = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".ckpt", ".h5", ".msgpack", ".onnx")
_DIGITS: Final = re.compile(r"(\d+)")


def make_plan(
    description: Description,
    target: Target,
    max_shard_size: int,
    *,
    rank: Rank = WHOLE,
    base_model: str | None = None,
) -> Plan:
    """Plan the conversion of a described checkpoint.

    Args:
        description: the source.
        target: what to convert it to.
        max_shard_size: largest size of a shard's data in bytes.
        rank: the rank whose part of the experts is planned.
        base_model: Hub repo id of the source, for the model card; None of a local one.

    Raises:
        UsageError: ``max_shard_size`` is not positive.
        SourceError: the source is damaged or inconsistent.
        UnsupportedError: the source is not INT8, or the target cannot represent it.
    """
    if max_shard_size <= 0:
        raise UsageError("The largest shard size must be positive", found=str(max_shard_size))
    check_convertible(description, target)
    _check_rank(description, target, rank)
    checkpoint = description.checkpoint
    with collector_paused():
        refs = checkpoint.refs()
        converted = _Converted(description, target, refs, rank)
        tensors = [*converted.tensors, *converted.untouched()]
        if isinstance(checkpoint, QuantizedCheckpoint):
            tensors = [computed(tensor, checkpoint.originals) for tensor in tensors]
        tensors.sort(key=lambda tensor: natural_key(tensor.name))
        _check_names(tensors)
        layers = description.int8_layers
        texts = (*_texts(description, target, base_model), *target.texts(tensors))
        return Plan(
            target=target.name,
            scheme=description.scheme or "",
            producer_version=description.declared.version if description.declared else None,
            max_shard_size=max_shard_size,
            moe=MoEGeometry(
                tuple(layer.index for layer in layers),
                tuple(layer.prefix for layer in layers),
                len(rank.experts(layers[0].experts)),
                description.config.top_k,
                layers[0].hidden,
                len(rank.intermediate(layers[0].intermediate)),
                description.config.activation,
            ),
            sources=tuple(SourceFile(shard.file, shard.size) for shard in checkpoint.shards),
            checks=tuple(converted.checks),
            shards=pack_shards(tensors, max_shard_size),
            config=target.config(description) | ({} if rank.is_whole else {RANK_KEY: rank.to_json()}),
            copies=tuple(_copies(description, {file.name for file in texts})),
            losses=tuple(bounded(conversion_findings(description, target))),
            texts=texts,
            rank=rank,
            quantize=checkpoint.mode if isinstance(checkpoint, QuantizedCheckpoint) else None,
        )


def check_convertible(description: Description, target: Target) -> None:
    """Raise the first reason why a checkpoint cannot be converted to ``target``.

    Raises:
        SourceError: the source is damaged or inconsistent.
        UnsupportedError: the source is not INT8, or the target cannot represent it.
    """
    root = str(description.checkpoint.root)
    for item in description.findings:
        blocks = CODES[item.code].blocks
        if item.severity is Severity.INFO or blocks is None:
            continue
        hint = item.hint or "run `quarkconv inspect` for all findings"
        if blocks is SourceError:
            raise SourceError(
                f"The source is inconsistent ({item.code}): {item.message}",
                code=item.code,
                file=root,
                tensor=item.subject,
                hint=hint,
            )
        raise UnsupportedError(
            f"The source cannot be converted ({item.code}): {item.message}",
            file=root,
            tensor=item.subject,
            hint=hint,
        )
    if not description.config.rank.is_whole:
        raise UnsupportedError(
            "The source is the part of one rank, not a model",
            file=root,
            expected="a whole checkpoint",
            found=description.config.rank.folder(),
            hint="convert the whole checkpoint",
        )
    reason = target.unsupported(description)
    if reason is not None:
        raise UnsupportedError(
            f"The target {target.name} cannot represent this checkpoint: {reason}",
            file=root,
            hint="run `quarkconv inspect` for the targets that can",
        )


def _check_rank(description: Description, target: Target, rank: Rank) -> None:
    """Raise the reason why the experts cannot be divided among ranks."""
    if not rank.is_whole and not target.by_rank:
        raise UsageError(
            "This target is not written by rank: engines divide it themselves", expected="fused-int8", found=target.name
        )
    for layer in description.int8_layers:
        rank.check(layer.prefix, layer.experts, layer.intermediate)


def natural_key(name: str) -> list[tuple[int, str]]:
    """Sort key that puts layer 2 before layer 10."""
    return [(int(part[:18]), part) if part.isdecimal() else (-1, part) for part in _DIGITS.split(name)]


class _Converted:
    """The int8 modules of a source as a target writes them.

    Attributes:
        tensors: tensors of experts and other int8 linears.
        checks: conditions on the source's data.
    """

    def __init__(self, description: Description, target: Target, refs: dict[str, TensorRef], rank: Rank) -> None:
        self.tensors: list[OutputTensor] = []
        self.checks: list[Check] = [*_zero_points(description, refs)]
        self._target, self._refs = target, refs
        self._left_out = set(target.dropped(description))
        for layer in description.int8_layers:
            source = ExpertSource(layer, refs, unfused=description.unfused_layout(layer), rank=rank)
            if not rank.is_whole:
                self._left_out.update(*(layer.projection(role, at).names for role, at, _ in layer.modules()))
            self.tensors += target.expert_tensors(source)
            self.checks += target.expert_checks(source)
        in_float = frozenset(description.float_modules)
        for name, form in description.stored.linears.items():
            if form.quantized and name not in description.topology.members:
                module = linear_module(name, form, refs)
                if name in in_float:
                    names = linear_names(name)
                    self.tensors.append(dequantized(module))
                    self._left_out.update((names.input_scale, names.input_zero_point))
                    continue
                self.tensors += target.module_tensors(module)
                self.checks += target.module_checks(module)

    def untouched(self) -> Iterator[OutputTensor]:
        """All other tensors, unchanged; tensors that only a check reads, such as zero points, are not written."""
        read = (source for tensor in self.tensors for piece in tensor.pieces for source in piece.reads())
        checked = (source for check in self.checks for source in check.reads())
        used = {source.tensor for source in chain(read, checked)}
        used.update(self._left_out)
        for name, ref in self._refs.items():
            if name not in used:
                yield OutputTensor(self._target.renamed(name), ref.dtype, ref.shape, (Copy.whole(name, ref),))


def _zero_points(description: Description, refs: dict[str, TensorRef]) -> Iterator[Check]:
    for form, _, modules in description.modules.quantized():
        if form.zero_point is None and form.input_zero_point is None and form.offset is None:
            continue
        for module in modules:
            names = fused_names(module) if module in description.stored.fused else linear_names(module)
            for name in (names.zero_point, names.input_zero_point, names.offset):
                if name in refs:
                    yield Check("zero", Copy.whole(name, refs[name]))


def _texts(description: Description, target: Target, base_model: str | None) -> Iterator[TextFile]:
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


def _copies(description: Description, written: Collection[str]) -> Iterator[SourceFile]:
    """Every other file of the source, except weights in other formats: they are another copy of the model."""
    store = description.checkpoint.store
    for path in description.checkpoint.files():
        name = path.as_posix()
        if name in _REPLACED or name in written or name.endswith((*_OTHER_WEIGHTS, ".index.json")):
            continue
        if "\\" in name or any("\ud800" <= char <= "\udfff" for char in name):
            raise UnsupportedError(
                "A file of the source has a name that the manifest cannot hold",
                file=repr(name),
                expected="UTF-8 without backslashes",
                hint="rename the file, or move it out of the source",
            )
        if any(part in _REPLACED or part.endswith(".safetensors") for part in path.parts[:-1]):
            raise UnsupportedError(
                "A folder of the source has the name of a file of the output",
                file=name,
                hint="rename the folder, or move it out of the source",
            )
        yield SourceFile(name, store.size(name) or 0)


def _check_names(tensors: list[OutputTensor]) -> None:
    for first, second in pairwise(tensors):
        if first.name == second.name:
            raise UnsupportedError(
                "The source already has a tensor with a name of the target",
                tensor=first.name,
                hint="the checkpoint is partly converted; start from the original",
            )
