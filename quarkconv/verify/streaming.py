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
from dataclasses import dataclass, field
from typing import Final, TypeVar

import torch

from quarkconv.description.description import Description
from quarkconv.errors import UsageError
from quarkconv.experts.function import Unknown
from quarkconv.experts.topology import MoELayer
from quarkconv.load.arenas import Arena, ArenaPool
from quarkconv.load.experts import FusedExperts
from quarkconv.load.layer_reader import READERS, LayerReader
from quarkconv.load.layer_reads import LayerPart, covered, written_tensors
from quarkconv.load.select import check_loadable
from quarkconv.plan.manifest import Manifest
from quarkconv.verify.activation import expert_activation
from quarkconv.verify.inputs import RecordedInputs
from quarkconv.verify.numbers import CheckedLayer, Router, layer_problems, router_of, verify_layer
from quarkconv.verify.places import wrong_pieces
from quarkconv.verify.results import SCALE_EDGES, LayerExperts, LayerNumbers, Problem, WeightError
from quarkconv.verify.unquantized import UnquantizedModel, weight_errors

Rest = TypeVar("Rest")

_PATIENCE: Final = 0.2  # seconds between looks at whether somebody wants to stop
_CHECKSUM: Final = "do not have the checksum of the manifest"


@dataclass(frozen=True, slots=True)
class NumbersJob:
    """What numbers are computed, and of what.

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

    def covered(self) -> set[str]:
        """The tensors whose every byte is compared with the manifest while the layers are read."""
        if self.manifest is None:
            return set()
        refs, written = self.description.checkpoint.refs(), written_tensors(self.manifest)
        return {name for layer in self.layers for name in covered(LayerPart(layer), refs, written)}


@dataclass(slots=True)
class LayerOutcome:
    """What was found of one layer."""

    numbers: list[LayerNumbers] = field(default_factory=list)
    experts: LayerExperts | None = None
    problems: list[Problem] = field(default_factory=list)


def stream_numbers(
    job: NumbersJob,
    checked: Callable[[int], None],
    done: Callable[[LayerNumbers], None],
    after_reading: Callable[[], Rest],
) -> tuple[list[LayerOutcome], Rest | None]:
    """Compute the numbers of all layers of a job.

    Args:
        job: what to do.
        checked: called with the number of bytes whose checksums were compared, from several threads.
        done: called with the numbers of each layer, from several threads.
        after_reading: called in a thread when all layers have been read, while the last ones are computed.

    Returns:
        The outcome of each layer, in order, and what ``after_reading`` returned; with ``fail_fast`` fewer layers after
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
        run = _Run(job, stack, pool, checked, done)
        returned: list[Rest] = []
        outcomes = run.stream(lambda: returned.append(after_reading()))
        return outcomes, returned[0] if returned else None


class _Run:
    def __init__(
        self,
        job: NumbersJob,
        stack: ExitStack,
        pool: ThreadPoolExecutor,
        checked: Callable[[int], None],
        done: Callable[[LayerNumbers], None],
    ) -> None:
        self.job = job
        self._done = done
        size = max((LayerPart(layer).nbytes for layer in job.layers), default=0)
        count = len(job.devices) + 1
        self._arenas = stack.enter_context(ArenaPool(count, size))
        self._files = stack.enter_context(LayerReader(job.description, pool, written_tensors(job.manifest), checked))
        self._rank = job.description.config.rank
        self._source_layers = {layer.prefix: layer for layer in job.source.int8_layers} if job.source else {}
        if job.source is not None:
            self._source_files = stack.enter_context(LayerReader(job.source, pool))
            largest = max((LayerPart(layer, self._rank).nbytes for layer in self._source_layers.values()), default=0)
            self._source_arenas = stack.enter_context(ArenaPool(count, largest))
            self._check_source()
        self._unquantized: UnquantizedModel | None = None
        if job.unquantized is not None:
            self._unquantized = stack.enter_context(UnquantizedModel(job.unquantized, pool))
            self._unquantized.check(list(job.layers))
        self._outcomes = [LayerOutcome() for _ in job.layers]
        self._ready: queue.SimpleQueue[tuple[int, list[tuple[ArenaPool, Arena]], FusedExperts, FusedExperts | None]]
        self._ready = queue.SimpleQueue()
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
                    thread.join(_PATIENCE)
        finally:
            self._stop.set()
            for thread in threads:
                thread.join()
        if self._errors:
            raise self._errors[0]
        return [outcome for outcome in self._outcomes if outcome.numbers or outcome.problems]

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
                experts, mismatches = self._files.read(LayerPart(layer), arena)
                self._outcomes[number].problems += [
                    wrong_pieces(self.job.description, *mismatch[:2], _CHECKSUM, *mismatch[2:])
                    for mismatch in mismatches
                ]
                source = None
                if self.job.source is not None:
                    other = self._arena(self._source_arenas)
                    if other is None:
                        return
                    held.append((self._source_arenas, other))
                    source, _ = self._source_files.read(LayerPart(self._source_layers[layer.prefix], self._rank), other)
                self._ready.put((number, held, experts, source))
        finally:
            self._all_read.set()
        if not self._stop.is_set():
            after_reading()

    def _arena(self, pool: ArenaPool) -> Arena | None:
        while not self._stop.is_set():
            arena = pool.take(_PATIENCE)
            if arena is not None:
                return arena
        return None

    def _work(self, device: torch.device) -> None:
        while not self._stop.is_set():
            reading = not self._all_read.is_set()
            try:
                number, held, experts, source = self._ready.get(timeout=_PATIENCE)
            except queue.Empty:
                if reading:
                    continue
                return
            if device.type == "cuda":
                with torch.cuda.device(device):
                    for _, arena in held:
                        arena.lock()
                    experts = experts.to(device, non_blocking=True)
                    source = None if source is None else source.to(device, non_blocking=True)
                    torch.cuda.current_stream().synchronize()
                    self._give_back(held)
                    self._compute(number, experts, source)
            else:
                self._compute(number, experts, source)
                self._give_back(held)

    def _give_back(self, held: list[tuple[ArenaPool, Arena]]) -> None:
        for pool, arena in held:
            pool.give_back(arena)

    def _compute(self, number: int, experts: FusedExperts, source: FusedExperts | None) -> None:
        job, layer, outcome = self.job, self.job.layers[number], self._outcomes[number]
        config = job.description.config.raw
        unquantized = None if self._unquantized is None else self._unquantized.weights(layer, experts.w13.device)
        router, top_k = router_of(layer, config, self._files), job.description.config.top_k
        if isinstance(router, Router) and not all(bool(part.isfinite().all()) for part in router.tensors()):
            message = "The router's tensors are not finite: no token would find its experts"
            outcome.problems.append(Problem("numbers", layer.index, layer.moe, message))
            router = Unknown("its tensors are not finite")  # the experts are checked all the same
        activation = expert_activation(config, layer.index, layer.moe)
        assert not isinstance(activation, Unknown)  # there are no numbers then
        checked = CheckedLayer(layer, experts, activation, top_k, router, source, unquantized)
        outcome.problems.extend(layer_problems(checked))
        load: tuple[int, ...] = ()
        for tokens in job.tokens:
            numbers, counts = verify_layer(
                checked, tokens=tokens, seed=job.seed, recorded=job.recorded, problems=outcome.problems
            )
            load = tuple(counts.tolist())
            outcome.numbers.append(numbers)
            self._done(numbers)
        weights = {} if unquantized is None else weight_errors(experts, unquantized, outcome.problems)
        outcome.experts = _seen(experts, load, weights)
        if job.fail_fast and outcome.problems:
            self._stop.set()

    def _check_source(self) -> None:
        for layer in self.job.layers:
            found = self._source_layers.get(layer.prefix)
            if found is None or found.geometry_of(self._rank) != layer.geometry:
                assert self.job.source is not None
                raise UsageError(
                    "The source does not have this layer, or has it in another shape",
                    file=str(self.job.source.checkpoint.root), tensor=layer.prefix,
                    hint="give --source the checkpoint that was converted, or leave it out",
                )  # fmt: skip


def _seen(experts: FusedExperts, load: tuple[int, ...], weights: dict[str, tuple[WeightError, ...]]) -> LayerExperts:
    scales = torch.cat([experts.w13_scale.flatten(1), experts.w2_scale.flatten(1)], dim=1).cpu()
    powers = scales.clamp(min=10.0 ** SCALE_EDGES[0]).log10().nan_to_num(SCALE_EDGES[0])
    counts = torch.histc(powers, len(SCALE_EDGES) - 1, SCALE_EDGES[0], SCALE_EDGES[-1])
    low, high = scales.min(dim=1).values.tolist(), scales.max(dim=1).values.tolist()
    return LayerExperts(
        experts.layer, experts.module, load, tuple(low), tuple(high), tuple(map(int, counts.tolist())), weights
    )
