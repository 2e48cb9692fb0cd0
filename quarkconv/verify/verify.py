"""``verify``: structure, bytes and numbers of one checkpoint."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Protocol

from quarkconv.description.description import Description, describe
from quarkconv.errors import UnsupportedError, UsageError
from quarkconv.experts.function import Unknown
from quarkconv.experts.topology import MoELayer
from quarkconv.hub.locate import locate
from quarkconv.load.devices import pick_devices
from quarkconv.load.layer_reader import READERS
from quarkconv.load.layer_reads import LayerPart, covered, written_tensors
from quarkconv.load.select import check_loadable
from quarkconv.plan.manifest import Manifest, read_manifest
from quarkconv.progress import SILENT, Progress
from quarkconv.verify.activation import expert_activation
from quarkconv.verify.checksums import check_bytes, check_source
from quarkconv.verify.inputs import RecordedInputs
from quarkconv.verify.numbers import backend_name, unsupported_activation
from quarkconv.verify.results import (
    BytesResult,
    LayerNumbers,
    NumbersResult,
    Problem,
    Verification,
)
from quarkconv.verify.streaming import LayerOutcome, NumbersJob, stream_numbers
from quarkconv.verify.structure import check_structure

DEFAULT_TOKENS: Final = 64
MAX_TOKENS: Final = 2**20


class Watcher(Protocol):
    """Is told how verification gets on."""

    def total_bytes(self, total: int) -> None:
        """How many bytes will be checked."""

    def checked(self, nbytes: int) -> None:
        """That many more bytes were checked."""

    def total_layers(self, total: int) -> None:
        """How many numbers of layers there will be: of each layer, for each number of tokens."""

    def layer(self, numbers: LayerNumbers) -> None:
        """The numbers of one more layer."""


class _Silent:
    def total_bytes(self, total: int) -> None: ...
    def checked(self, nbytes: int) -> None: ...
    def total_layers(self, total: int) -> None: ...
    def layer(self, numbers: LayerNumbers) -> None: ...


_NO_MANIFEST: Final = "there is no quarkconv.json: the checkpoint is not a conversion of this tool"


def verify_checkpoint(
    model: str | Path,
    source: str | Path | None = None,
    device: str = "auto",
    *,
    layers: set[int] | None = None,
    tokens: int | Sequence[int] = DEFAULT_TOKENS,
    seed: int = 0,
    unquantized: str | Path | None = None,
    activations: str | Path | None = None,
    stages: Collection[str] = ("bytes", "numbers"),
    fail_fast: bool = False,
    watcher: Watcher | None = None,
    reading: Progress = SILENT,
) -> Verification:
    """Prove that a checkpoint is what it should be.

    With a manifest: structure, bytes and numbers. Without one (a Quark export as it came): structure and numbers. One
    layer is in memory at a time, and the one that is being read.

    Args:
        model: directory or Hub repo id of a checkpoint whose experts are int8.
        source: the checkpoint that it was converted from; bytes and references are then also taken from there.
        device: ``cuda`` for all visible GPUs, ``cpu``, or ``auto`` for GPUs where there are any.
        layers: numbers of the MoE layers whose numbers are checked; None for all.
        tokens: tokens for each layer; several numbers check several paths of the kernels.
        seed: of the random tokens.
        unquantized: the model before it was quantized; weights and outputs are compared with it.
        activations: a safetensors file of recorded hidden states to use instead of random ones; see
            :class:`quarkconv.verify.inputs.RecordedInputs`.
        stages: which of ``bytes`` and ``numbers`` are checked; the structure always is.
        fail_fast: stop at the first problem.
        watcher: told of progress, from several threads.
        reading: told how downloads and reading headers get on, before anything is checked.

    Raises:
        UsageError: no such device, layer or number of tokens, or what it is compared with does not fit.
        SourceError: the checkpoint, or what it is compared with, cannot be read at all.
        UnsupportedError: the checkpoint is not an INT8 mixture of experts.
    """
    counts = tuple(dict.fromkeys((tokens,) if isinstance(tokens, int) else tokens))
    if not counts or min(counts) < 1 or max(counts) > MAX_TOKENS:
        raise UsageError("This number of tokens makes no sense", expected=f"numbers from 1 to {MAX_TOKENS}",
                         found=", ".join(map(str, counts)) or "none")  # fmt: skip
    if not 0 <= seed < 2**32:
        raise UsageError("The seed is out of range", expected="a number from 0 to 2^32 - 1", found=str(seed))
    watcher = watcher or _Silent()
    places = pick_devices(device)
    recorded = None if activations is None else RecordedInputs(activations)
    description = _described(model, reading)
    manifest = read_manifest(description.checkpoint.root)
    _check_verifiable(description, manifest)
    _check_layers(description, layers)
    wanted = tuple(layer for layer in description.int8_layers if layers is None or layer.index in layers)
    if recorded is not None:
        recorded.check(list(wanted))
    compared = None if source is None else _described(source, reading)
    run = _Run(description, manifest, compared, wanted, fail_fast, watcher)
    if run.source is not None and manifest is not None:
        check_source(run.source.checkpoint.root, manifest)
    structure = check_structure(description, manifest, run.problems)
    kind = places[0].type if len(places) == 1 else f"{len(places)} x {places[0].type}"
    numbers = NumbersResult(kind, backend_name(places[0]), counts, seed)
    original = None
    if unquantized is not None and "numbers" in stages:
        original = _described(unquantized, reading)
    skipped = None
    if "numbers" not in stages:
        skipped = "it was not asked for"
    elif not structure.readable:
        skipped = "the structure is broken"
    elif not wanted:
        skipped = "no experts are stored in int8; with --source, their bytes are compared with what the codes give"
    elif (unknown := _unknown_function(description, wanted)) is not None:
        skipped = f"what the experts compute is not known: {unknown}"
    elif fail_fast and run.problems:
        skipped = "something is wrong already (--fail-fast)"
    if skipped is None:
        job = NumbersJob(
            description, manifest if run.source is None and "bytes" in stages else None, wanted, places, counts, seed,
            run.source, original, recorded, fail_fast,
        )  # fmt: skip
        outcomes = run.numbers(job, check_bytes="bytes" in stages)
        numbers = NumbersResult(
            kind, numbers.backend, counts, seed, tuple(item for outcome in outcomes for item in outcome.numbers),
            tuple(outcome.experts for outcome in outcomes if outcome.experts is not None),
        )  # fmt: skip
    else:
        numbers = NumbersResult(kind, numbers.backend, counts, seed, skipped=skipped)
        if "bytes" in stages:
            run.bytes()
    checked = run.checked if "bytes" in stages else BytesResult(skipped="it was not asked for")
    return Verification(
        str(model), None if source is None else str(source), None if unquantized is None else str(unquantized),
        description.scheme, structure, checked, numbers, tuple(run.problems),
    )  # fmt: skip


@dataclass(slots=True)
class _Run:
    """One verification under way."""

    description: Description
    manifest: Manifest | None
    source: Description | None
    layers: tuple[MoELayer, ...]
    fail_fast: bool
    watcher: Watcher
    problems: list[Problem] = field(default_factory=list)
    checked: BytesResult = field(default_factory=lambda: BytesResult(skipped=_NO_MANIFEST))

    def numbers(self, job: NumbersJob, *, check_bytes: bool) -> list[LayerOutcome]:
        """Numbers of the layers, and the bytes of everything on the way."""
        for layer in self.layers:
            check_loadable(layer)
        found: list[Problem] = []
        seen: set[str] = set()
        if job.manifest is not None:
            written = written_tensors(job.manifest)
            refs = self.description.checkpoint.refs()
            seen = {name for layer in self.layers for name in covered(LayerPart(layer), refs, written)}
        self.watcher.total_layers(len(self.layers) * len(job.tokens))
        if check_bytes:
            self._announce()

        def rest() -> None:
            if check_bytes:
                self._bytes(seen, found)

        outcomes = stream_numbers(job, self.watcher.checked, self.watcher.layer, rest)
        layers = [problem for outcome in outcomes for problem in outcome.problems]
        self.problems += [problem for problem in layers if problem.stage == "bytes"] + found
        self.problems += [problem for problem in layers if problem.stage != "bytes"]
        return outcomes

    def bytes(self) -> None:
        """Bytes alone."""
        self._announce()
        self._bytes(set(), self.problems)

    def _announce(self) -> None:
        if self.manifest is not None:
            self.watcher.total_bytes(sum(shard.size for shard in self.manifest.shards))

    def _bytes(self, skip: Collection[str], problems: list[Problem]) -> None:
        if self.manifest is None:
            return
        source = self.source.checkpoint.root if self.source else None
        self.checked = check_bytes(
            self.description, self.manifest, source, problems, self.watcher.checked, READERS, skip,
            fail_fast=self.fail_fast,
        )  # fmt: skip


def _described(model: str | Path, progress: Progress) -> Description:
    return describe(locate(model, cache=True, progress=progress).files, progress)


def _check_verifiable(description: Description, manifest: Manifest | None) -> None:
    if manifest is not None or description.int8_layers:
        return
    first = next(iter(description.findings), None)
    raise UnsupportedError(
        "There are no INT8 experts to verify", file=str(description.checkpoint.root),
        expected="a checkpoint whose routed experts are stored in int8",
        found=first.message if first else "none", hint="run `quarkconv inspect`",
    )  # fmt: skip


def _unknown_function(description: Description, layers: Sequence[MoELayer]) -> str | None:
    """What is not known of what the experts of these layers compute, or not supported by the INT8 forward here."""
    for layer in layers:
        activation = expert_activation(description.config.raw, layer.index, layer.moe)
        if isinstance(activation, Unknown):
            return activation.reason
        if (reason := unsupported_activation(activation)) is not None:
            return reason
    return None


def _check_layers(description: Description, wanted: set[int] | None) -> None:
    known = {layer.index for layer in description.int8_layers}
    if wanted is not None and not wanted <= known:
        have = ", ".join(map(str, sorted(known))) or "none"
        absent = sorted(wanted - known)
        missing = ", ".join(map(str, absent[:5])) + (f" and {len(absent) - 5} more" if len(absent) > 5 else "")
        raise UsageError("There is no such INT8 MoE layer", expected=f"layers among {have}", found=missing)
