"""Decoder layers of a model, read in order while others run."""

from __future__ import annotations

from collections.abc import Iterable
from concurrent.futures import Executor, Future

from quarkconv.evaluate.weights import CheckpointWeights, LayerWeights


class ReadAhead:
    """Reads one decoder layer at a time in another thread. The caller decides when the next one may be in memory.

    Args:
        weights: of the model.
        layers: numbers of the decoder layers, in order; the first one is read at once.
        executor: where reading runs.
    """

    def __init__(self, weights: CheckpointWeights, layers: Iterable[int], executor: Executor) -> None:
        self._weights, self._layers, self._executor = weights, iter(layers), executor
        self._read: Future[LayerWeights] | None = None
        self.start()

    def start(self) -> None:
        """Begin to read the next layer, if there is one."""
        number = next(self._layers, None)
        self._read = None if number is None else self._executor.submit(self._weights.layer, number)

    def take(self) -> LayerWeights:
        """The layer that was begun last.

        Raises:
            SourceError, UnsupportedError: as of :meth:`quarkconv.evaluate.weights.CheckpointWeights.layer`.
        """
        assert self._read is not None
        read, self._read = self._read, None
        return read.result()
