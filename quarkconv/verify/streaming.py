"""Numbers of all layers: one layer is read while others are computed, each byte once.

A thread fills arenas, layer after layer; one worker for each device takes them, copies them to its device and gives
the arena back, so that on a GPU the next layer is read while this one is computed. There is one arena more than there
are devices.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Final, NamedTuple, TypeVar

import torch

from quarkconv.description.description import Description
from quarkconv.errors import UsageError
from quarkconv.experts.knowledge import expert_activation
from quarkconv.experts.layer import MoELayer
from quarkconv.load.arenas import Arena, ArenaPool
from quarkconv.load.experts import FusedExperts
from quarkconv.load.layer_reader import READERS, LayerReader
from quarkconv.load.layer_reads import LayerPart, covered, written_tensors
from quarkconv.load.select import check_loadable
from quarkconv.plan.manifest import Manifest
from quarkconv.progress import Progress
from quarkconv.verify.inputs import RecordedInputs
from quarkconv.verify.layer import LayerInputs, LayerOutcome, check_layer
from quarkconv.verify.layer_results import LayerNumbers
from quarkconv.verify.places import wrong_pieces
from quarkconv.verify.results import Problem
from quarkconv.verify.router import router_of
from quarkconv.verify.unquantized import UnquantizedModel
from quarkconv.verify.zero_points import zero_point_problems

Rest = TypeVar("Rest")

_POLL_SECONDS: Final = 0.2  # between checks for a stop
_CHECKSUM: Final = "do not match the checksum in the manifest"


@dataclass(frozen=True, slots=True)
class NumbersJob:
    """The layers to compute numbers of, and how.

    Attributes:
        description: the checkpoint.
        manifest: its manifest, where its bytes are compared while it is read.
        layers: the layers, in order.
        devices: where to compute; layers are dealt out over them.
        tokens, seed: of the inputs.
        source: the checkpoint that it was converted from.
        unquantized: the model before it was quantized.
        recorded: hidden states to use instead of random ones.
        fail_fast: stop at the first problem.
        counts_bytes: progress counts bytes, and not layers.
    """

    description: Description
    manifest: Manifest | None
    layers: tuple[MoELayer, ...]
    devices: tuple[torch.device, ...]
    tokens: tuple[int, ...]
    seed: int
    source: Description | None = None
    unquantized: Description | None = None
    recorded: RecordedInputs | None = None
    fail_fast: bool = False
    counts_bytes: bool = False

    def covered(self) -> set[str]:
        """The tensors whose every byte is compared with the manifest while the layers are read."""
        if self.manifest is None:
            return set()
        refs, written = self.description.checkpoint.refs(), written_tensors(self.manifest)
        return {name for layer in self.layers for name in covered(LayerPart(layer), refs, written)}


def stream_numbers(
    job: NumbersJob, progress: Progress, after_reading: Callable[[], Rest]
) -> tuple[list[LayerOutcome], Rest | None]:
    """Compute the numbers of all layers of a job.

    Args:
        job: the layers, and how.
        progress: counts the bytes whose checksums are compared, or else the numbers of layers; notes each layer.
        after_reading: called in a thread when all layers have been read, while the last ones are computed.

    Returns:
        The outcome of each layer, in order, and the result of ``after_reading``; with ``fail_fast`` fewer layers after
        a problem, and None where reading was stopped.

    Raises:
        SourceError: a file cannot be read.
        UsageError: the source or the unquantized model lacks a layer.
        UnsupportedError: a layer is not stored in int8 with scales.
    """
    for layer in job.layers:
        check_loadable(layer)
    with ExitStack() as stack:
        pool = stack.enter_context(ThreadPoolExecutor(READERS, thread_name_prefix="quarkconv-read"))
        run = _Run(job, stack, pool, progress)
        returned: list[Rest] = []
        outcomes = run.stream(lambda: returned.append(after_reading()))
        return outcomes, returned[0] if returned else None


class _ReadLayer(NamedTuple):
    """A layer in memory: its number among those of the job, the arenas it holds, and the problems of its bytes."""

    number: int
    held: list[tuple[ArenaPool, Arena]]
    experts: FusedExperts
    source: FusedExperts | None
    problems: list[Problem]


class _Run:
    def __init__(self, job: NumbersJob, stack: ExitStack, pool: ThreadPoolExecutor, progress: Progress) -> None:
        self.job = job
        self._progress = progress
        count = len(job.devices) + 1
        size = max((LayerPart(layer).nbytes for layer in job.layers), default=0)
        self._arenas = stack.enter_context(ArenaPool(count, size))
        written = written_tensors(job.manifest)
        self._reader = stack.enter_context(LayerReader(job.description, pool, written, progress.advance))
        self._rank = job.description.config.rank
        self._source_layers = {layer.prefix: layer for layer in job.source.int8_layers} if job.source else {}
        if job.source is not None:
            self._source_reader = stack.enter_context(LayerReader(job.source, pool))
            largest = max((LayerPart(layer, self._rank).nbytes for layer in self._source_layers.values()), default=0)
            self._source_arenas = stack.enter_context(ArenaPool(count, largest))
            self._check_source(job.source)
        self._unquantized: UnquantizedModel | None = None
        if job.unquantized is not None:
            self._unquantized = stack.enter_context(UnquantizedModel(job.unquantized, pool))
            self._unquantized.check(job.layers)
        self._outcomes: dict[int, LayerOutcome] = {}
        self._ready: queue.SimpleQueue[_ReadLayer] = queue.SimpleQueue()
        self._stop = threading.Event()
        self._all_read = threading.Event()
        self._errors: list[BaseException] = []

    def stream(self, after_reading: Callable[[], None]) -> list[LayerOutcome]:
        """Read and compute everything."""
        threads = [
            threading.Thread(target=self._guarded, args=(self._read_all, after_reading), name="quarkconv-layers")
        ]
        threads += [
            threading.Thread(target=self._guarded, args=(self._work, device), name=f"quarkconv-{device}")
            for device in self.job.devices
        ]
        for thread in threads:
            thread.start()
        try:
            for thread in threads:
                while thread.is_alive():  # in steps, so that an interrupt is noticed
                    thread.join(_POLL_SECONDS)
        finally:
            self._stop.set()
            for thread in threads:
                thread.join()
        if self._errors:
            raise self._errors[0]
        return [self._outcomes[number] for number in sorted(self._outcomes)]

    def _guarded(self, work: Callable[..., None], argument: object) -> None:
        try:
            work(argument)
        except BaseException as error:
            self._errors.append(error)
            self._stop.set()

    def _read_all(self, after_reading: Callable[[], None]) -> None:
        try:
            for number, layer in enumerate(self.job.layers):
                arena = self._arena(self._arenas)
                if arena is None:
                    return
                held = [(self._arenas, arena)]
                experts, mismatches = self._reader.read(LayerPart(layer), arena)
                problems = [wrong_pieces(self.job.description, *item[:2], _CHECKSUM, *item[2:]) for item in mismatches]
                source = None
                if self.job.source is not None:
                    other = self._arena(self._source_arenas)
                    if other is None:
                        return
                    held.append((self._source_arenas, other))
                    part = LayerPart(self._source_layers[layer.prefix], self._rank)
                    source, _ = self._source_reader.read(part, other)
                self._ready.put(_ReadLayer(number, held, experts, source, problems))
        finally:
            self._all_read.set()
        if not self._stop.is_set():
            after_reading()

    def _arena(self, pool: ArenaPool) -> Arena | None:
        while not self._stop.is_set():
            arena = pool.take(_POLL_SECONDS)
            if arena is not None:
                return arena
        return None

    def _work(self, device: torch.device) -> None:
        while not self._stop.is_set():
            reading = not self._all_read.is_set()
            try:
                layer = self._ready.get(timeout=_POLL_SECONDS)
            except queue.Empty:
                if reading:
                    continue
                return
            if device.type == "cuda":
                with torch.cuda.device(device):
                    self._check(self._moved(layer, device))
            else:
                self._check(layer)
                self._give_back(layer)

    def _moved(self, layer: _ReadLayer, device: torch.device) -> _ReadLayer:
        """A layer on a GPU; its arenas are free again."""
        for _, arena in layer.held:
            arena.lock()
        experts = layer.experts.to(device, non_blocking=True)
        source = None if layer.source is None else layer.source.to(device, non_blocking=True)
        torch.cuda.current_stream().synchronize()
        self._give_back(layer)
        return layer._replace(experts=experts, source=source)

    def _give_back(self, layer: _ReadLayer) -> None:
        for pool, arena in layer.held:
            pool.give_back(arena)

    def _check(self, read: _ReadLayer) -> None:
        job, layer = self.job, self.job.layers[read.number]
        config = job.description.config
        inputs = LayerInputs(
            layer=layer,
            activation=expert_activation(config.raw, layer),
            router=router_of(layer, config.raw, self._reader),
            top_k=config.top_k,
            tokens=job.tokens,
            seed=job.seed,
            recorded=job.recorded,
            unquantized=None
            if self._unquantized is None
            else self._unquantized.weights(layer, read.experts.w13.device),
            unquantized_router=None if self._unquantized is None else self._unquantized.router(layer),
        )
        outcome = check_layer(inputs, read.experts, read.source, self._done)
        problems = (*read.problems, *zero_point_problems(layer, self._reader), *outcome.problems)
        outcome = replace(outcome, problems=problems)
        self._outcomes[read.number] = outcome
        if job.fail_fast and outcome.problems:
            self._stop.set()

    def _done(self, numbers: LayerNumbers) -> None:
        if not self.job.counts_bytes:
            self._progress.advance()
        outcome = "ok" if numbers.ok else "differs"
        self._progress.note(f"layer {numbers.layer} ({numbers.module}): {outcome} in {numbers.seconds:.1f} s")

    def _check_source(self, source: Description) -> None:
        for layer in self.job.layers:
            found = self._source_layers.get(layer.prefix)
            if found is None or found.geometry_of(self._rank) != layer.geometry:
                raise UsageError(
                    "The source does not have this layer, or has it in another shape",
                    file=str(source.checkpoint.root),
                    tensor=layer.prefix,
                    hint="give --source the checkpoint that was converted, or leave it out",
                )
