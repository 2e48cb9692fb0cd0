"""Decoder layers of both models, read and filled in order while others run.

On GPUs a layer is filled on a stream of its own while the one before runs: then two layers of each model are filled.
Elsewhere filling would take the processors of the layer that runs, so that a layer is only read meanwhile.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from types import TracebackType

import torch

from quarkconv.evaluate.streams import LayerRunner
from quarkconv.evaluate.weights import CheckpointWeights, LayerWeights


class SideStreams:
    """A stream of each GPU beside the one that layers run on. They stay: the allocator keeps memory for each stream.

    Args:
        devices: any; only GPUs have streams.
    """

    def __init__(self, devices: Iterable[torch.device]) -> None:
        gpus = dict.fromkeys(device for device in devices if device.type == "cuda")
        self._streams = [torch.cuda.Stream(device) for device in gpus]  # type: ignore[no-untyped-call]

    @contextmanager
    def current(self) -> Iterator[None]:
        """Have this thread's kernels run on them; at the end they are done."""
        with ExitStack() as stack:
            for stream in self._streams:
                stack.enter_context(torch.cuda.stream(stream))
            yield
            for stream in self._streams:
                stream.synchronize()


class ReadAhead:
    """Reads one decoder layer at a time in another thread. The caller decides when the next one may be in memory.

    Args:
        weights: of the model.
        layers: numbers of the decoder layers, in order; the first one is read at once.
        executor: where reading runs.
    """

    def __init__(self, weights: CheckpointWeights, layers: Iterable[int], executor: Executor) -> None:
        self._weights, self._layers, self._executor = weights, iter(layers), executor
        self._read: deque[Future[LayerWeights]] = deque()
        self.start()

    def start(self) -> None:
        """Begin to read the next layer, if there is one."""
        number = next(self._layers, None)
        if number is not None:
            self._read.append(self._executor.submit(self._weights.layer, number))

    def take(self) -> LayerWeights:
        """The first layer that was begun and not taken.

        Raises:
            SourceError, UnsupportedError: as of :meth:`quarkconv.evaluate.weights.CheckpointWeights.layer`.
        """
        return self._read.popleft().result()


class LayersAhead:
    """The layers of both models for every runner. A context manager.

    Args:
        runners: of one evaluation.
        numbers: decoder layers, in order; the first one is read at once.
        side: where a layer is filled while the one before runs; None to fill it when it is taken.
    """

    def __init__(self, runners: Sequence[LayerRunner], numbers: Sequence[int], side: SideStreams | None) -> None:
        self._runners, self._numbers, self._side = runners, iter(numbers), side
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="quarkconv-read")
        self._filler = ThreadPoolExecutor(1, thread_name_prefix="quarkconv-fill")
        self._filled: Future[None] | None = None
        quantized, unquantized = runners[0].quantized, runners[0].unquantized
        # The unquantized model first: filling it takes longer, and the other one is read meanwhile.
        self._unquantized = None if unquantized is None else ReadAhead(unquantized.weights, numbers, self._reader)
        self._quantized = ReadAhead(quantized.weights, numbers, self._reader)

    def __enter__(self) -> LayersAhead:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for pool in (self._filler, self._reader):
            pool.shutdown(cancel_futures=True)

    def begin(self) -> None:
        """Allow filling: the models are not called as wholes any more."""
        self.emptied()
        self._fill_next()

    def emptied(self) -> None:
        """Allow to read one layer more, also while the next one is still being filled."""
        if self._side is not None:
            self._start()

    def take(self) -> None:
        """Have the next layer filled. The layer before must be empty.

        Raises:
            SourceError, UnsupportedError: as of :meth:`quarkconv.evaluate.weights.CheckpointWeights.layer` and
                :meth:`quarkconv.evaluate.streams.LayerRunner.fill`.
        """
        if self._side is None:
            self._fill(next(self._numbers))
            return
        assert self._filled is not None
        self._filled.result()
        self._fill_next()

    def _start(self) -> None:
        if self._unquantized is not None:
            self._unquantized.start()
        self._quantized.start()

    def _fill_next(self) -> None:
        if self._side is not None and (number := next(self._numbers, None)) is not None:
            self._filled = self._filler.submit(self._fill_ahead, number, self._side)

    def _fill_ahead(self, number: int, side: SideStreams) -> None:
        if self._unquantized is not None:
            others = self._unquantized.take()
            with side.current():
                for runner in self._runners:
                    runner.fill_unquantized(number, others)
            del others  # only now: kernels that copy from it are done
        weights = self._quantized.take()
        with side.current():
            for runner in self._runners:
                runner.fill(number, weights)

    def _fill(self, number: int) -> None:
        if self._unquantized is not None:
            others = self._unquantized.take()
            for runner in self._runners:
                runner.fill_unquantized(number, others)
            del others  # the model has its own copy: the next layer may be read
            self._unquantized.start()
        weights = self._quantized.take()
        self._quantized.start()  # its codes are computed with as they were read: two layers of them are in memory
        for runner in self._runners:
            runner.fill(number, weights)
