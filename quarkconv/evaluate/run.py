"""One evaluation under way: all windows through the layers of every variant, then scores."""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Final, NamedTuple

from torch import Tensor

from quarkconv.errors import WriteError
from quarkconv.evaluate.calls import Calls, shared_calls
from quarkconv.evaluate.hidden_states import LayerOutput, Streams, Transfers
from quarkconv.evaluate.read_ahead import LayersAhead, SideStreams
from quarkconv.evaluate.record import Record
from quarkconv.evaluate.results import Ablation
from quarkconv.evaluate.scores import TokenScores
from quarkconv.evaluate.scoring import batch_scores, require_finite
from quarkconv.evaluate.state import EvaluationState
from quarkconv.evaluate.streams import DEQUANTIZED, INT8, UNQUANTIZED, LayerRunner
from quarkconv.evaluate.sums import DeviceSums, LayerSums
from quarkconv.evaluate.windows import Windows
from quarkconv.progress import Progress

_PATIENCE: Final = 1.0
"""Seconds that the state of a layer may take, before the next layers run on without a state of their own."""


class LeftOut(NamedTuple):
    """A decoder layer, or one routed expert of it, that is left as in the baseline."""

    layer: int
    expert: int | None = None

    def __str__(self) -> str:
        return f"layer {self.layer}" + ("" if self.expert is None else f", expert {self.expert}")


@dataclass(frozen=True, slots=True)
class _Batch:
    """Some windows and the device that they run on."""

    windows: slice
    device: int


class Run:
    """One evaluation under way.

    Args:
        runners: one for each device.
        tokens: all windows.
        batch: windows that run together; None to choose by memory.
        progress: receives each finished layer.
        resumes: whether finished layers will be kept on the disk.
    """

    def __init__(
        self, runners: list[LayerRunner], tokens: Windows, batch: int | None, progress: Progress, resumes: bool = False
    ) -> None:
        self.runners, self.tokens, self.progress = runners, tokens, progress
        first = runners[0]
        self.in_int8 = bool(first.quantized.weights.description.schemes)
        self.baseline = UNQUANTIZED if first.unquantized is not None else DEQUANTIZED
        self.variants = [self.baseline, *([DEQUANTIZED] if self.baseline != DEQUANTIZED else [])]
        if self.in_int8:
            self.variants.append(INT8)
        size = batch or max(1, min(runner.batch_tokens for runner in runners) // tokens.length)
        self.size = size
        starts = range(0, tokens.count, size)
        self.batches = [
            _Batch(slice(start, min(start + size, tokens.count)), position % len(runners))
            for position, start in enumerate(starts)
        ]
        # A state is written while the next layers run on.
        self._transfers = [Transfers(runner.device, runner.states_bytes(2 if resumes else 1)) for runner in runners]
        self._side = (
            SideStreams(runner.device for runner in runners) if all(runner.fills_ahead for runner in runners) else None
        )

    @property
    def layer_count(self) -> int:
        """Number of decoder layers."""
        return len(self.runners[0].quantized.skeleton.layers)

    def layers_of(
        self,
        variants: Sequence[str],
        state: EvaluationState | None,
        record: str | Path | None = None,
        ablated: dict[str, LeftOut] | None = None,
    ) -> Streams:
        """Carry variants through all layers.

        Args:
            variants: names; beside the three known ones those of ``ablated``.
            state: where finished layers are kept.
            record: file for the inputs of MoE layers.
            ablated: variant -> the layer, or the expert of one, that takes the baseline's weights.
        """
        ablated = ablated or {}
        # The state does not hold the inputs of finished layers: recording starts with the first layer.
        streams = None if state is None or record is not None else state.load()
        if streams is not None and set(streams.outputs) != set(variants):
            streams = None
        numbers = range(0 if streams is None else streams.finished, self.layer_count)
        with (
            LayersAhead(self.runners, numbers, self._side) as layers,
            ThreadPoolExecutor(1, thread_name_prefix="quarkconv-save") as saver,
            nullcontext() if record is None else Record(record, self.tokens.ids.numel()) as recorded,
        ):
            start, calls = self._embed()
            outputs = dict.fromkeys(variants, start) if streams is None else streams.outputs
            finished, sums = (0, []) if streams is None else (streams.finished, streams.sums)
            if state is not None:
                state.require_room(sum(item.states.nbytes for name in variants for item in outputs[name]))
            streams = Streams({name: self._kept(outputs[name]) for name in variants}, finished, sums)
            del start, outputs
            saved: Future[None] | None = None
            began = 0.0
            self.progress.step("Running layers", len(numbers), "layer")
            layers.begin()
            for number in numbers:
                layers.take()
                self._layer(number, streams, calls, ablated, recorded)
                layers.emptied()
                streams.finished = number + 1
                # Written while the next layers run. Where the disk is slower than they are, some are left out.
                if state is not None and (saved is None or saved.done() or time.monotonic() - began < _PATIENCE):
                    if saved is not None:
                        saved.result()
                    began = time.monotonic()
                    saved = saver.submit(_save, state, streams.copy())
                self.progress.advance()
            if saved is not None:
                saved.result()
        return streams

    def _embed(self) -> tuple[list[LayerOutput], list[Calls]]:
        """Hidden states before the first layer, and the calls of both models, for each batch."""
        calls: list[Calls] = []
        embedded = []
        for item in self.batches:
            states, of_quantized, of_baseline = self.runners[item.device].embed(self.tokens.ids[item.windows])
            calls.append(shared_calls((of_quantized, of_baseline), calls))
            embedded.append(LayerOutput(states))
        return embedded, calls

    def _kept(self, outputs: list[LayerOutput]) -> list[LayerOutput]:
        """The batches of a variant where they stay between layers."""
        return [self._transfers[item.device].keep(output) for item, output in zip(self.batches, outputs, strict=True)]

    def _layer(
        self,
        number: int,
        streams: Streams,
        calls: list[Calls],
        ablated: dict[str, LeftOut],
        recorded: Record | None,
    ) -> None:
        without = {name: part.expert for name, part in ablated.items() if part.layer == number}

        def share(device: int) -> dict[int, LayerSums]:
            runner, transfers = self.runners[device], self._transfers[device]
            sums: dict[int, DeviceSums] = {}
            own = [position for position, item in enumerate(self.batches) if item.device == device]
            ahead = transfers.fetch(streams.of(own[0])) if own else {}
            for position, following in zip_longest(own, own[1:]):
                before = ahead
                transfers.wait()
                if following is not None:
                    ahead = transfers.fetch(streams.of(following))
                inputs: dict[str, Tensor] | None = None if recorded is None else {}
                after, sums[position] = runner.step(
                    number,
                    before,
                    (calls[position][0][number], calls[position][1][number]),
                    ablated=without,
                    sample=position == 0 and INT8 in before,
                    record=inputs,
                )
                for name, tensor in (inputs or {}).items():
                    assert recorded is not None
                    recorded.add(name, self.batches[position].windows.start * self.tokens.length, tensor)
                for name, output in after.items():
                    batches = streams.outputs[name]
                    batches[position] = transfers.store(batches[position], output)
            transfers.finish()
            return {position: runner.finish(number, found) for position, found in sums.items()}

        with ThreadPoolExecutor(len(self.runners)) as pool:
            found = [item for sums in pool.map(share, range(len(self.runners))) for item in sums.items()]
        total = LayerSums()
        for _, sums in sorted(found, key=lambda item: item[0]):  # in one order, whatever the number of devices
            total.add(sums)
        for runner in self.runners:
            runner.empty(number)
        streams.sums.append(total)

    def scores(self, streams: Streams) -> dict[str, TokenScores]:
        """Score the tokens of the second half of each window.

        Args:
            streams: after the last layer, with the baseline.
        """
        self.progress.step("Scoring", len(self.batches), "batch")

        def share(device: int) -> dict[int, dict[str, TokenScores]]:
            found = {}
            for position, item in enumerate(self.batches):
                if item.device == device:
                    found[position] = batch_scores(
                        self.runners[device], self.tokens, item.windows, streams.of(position)
                    )
                    self.progress.advance()
            return found

        with ThreadPoolExecutor(len(self.runners)) as pool:
            batches = [item for found in pool.map(share, range(len(self.runners))) for item in found.items()]
        scores = {name: TokenScores() for name in streams.outputs}
        for _, found in sorted(batches, key=lambda item: item[0]):
            for name, values in found.items():
                scores[name].extend(values)
        for name, values in scores.items():
            require_finite(self.runners[0].model_of(name).skeleton, values)
        return scores

    def ablations(self, streams: Streams, scores: dict[str, TokenScores], parts: Sequence[LeftOut]) -> list[Ablation]:
        """The model with single layers and experts left as in the baseline, all in one more pass.

        Args:
            streams: hidden states after the last layer.
            scores: of the same.
            parts: the layers and experts, each left unquantized by itself.
        """
        if not parts or INT8 not in scores:
            return []
        whole = scores[INT8].divergence()
        assert whole is not None
        names = {f"without {part}": part for part in parts}
        again = self.layers_of(list(names), None, ablated=names)
        again.outputs[self.baseline] = streams.outputs[self.baseline]
        found = self.scores(again)
        ablations = []
        for name, (layer, expert) in names.items():
            divergence = found[name].divergence()
            assert divergence is not None
            share = 1 - divergence.mean / whole.mean if whole.mean else 0.0
            module = self.runners[0].quantized.skeleton.layer_prefix(layer)
            ablations.append(Ablation(layer, module, expert, divergence.mean, share))
        return ablations


def _save(state: EvaluationState, streams: Streams) -> None:
    try:
        state.save(streams)
    except OSError as error:
        raise WriteError(
            "The hidden states cannot be written",
            file=str(state.path),
            found=(getattr(error, "strerror", None) or str(error))[:200],
            hint="free space there, set XDG_CACHE_HOME, or give --no-resume",
        ) from error
