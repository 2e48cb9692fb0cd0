"""One evaluation under way: all windows through the layers of every variant, then scores."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import torch
from safetensors.torch import save_file
from torch import Tensor

from quarkconv.errors import WriteError
from quarkconv.evaluate.results import Ablation, LayerEvaluation
from quarkconv.evaluate.scores import TokenScores
from quarkconv.evaluate.skeleton import LayerCall
from quarkconv.evaluate.state import EvaluationState
from quarkconv.evaluate.streams import DEQUANTIZED, INT8, UNQUANTIZED, LayerRunner, LayerSums, Streams
from quarkconv.evaluate.weights import LayerWeights
from quarkconv.evaluate.windows import Windows
from quarkconv.progress import Progress

BATCH_TOKENS: Final = 4096
"""Tokens of a batch, where ``batch`` is not given."""
LOGITS: Final = 2**26
"""Logits of one model that are in memory at a time: 256 MB in float32."""


@dataclass(frozen=True, slots=True)
class _Batch:
    """Some windows and the device that they run on."""

    windows: slice
    device: int


class Run:
    """One evaluation under way."""

    def __init__(self, runners: list[LayerRunner], tokens: Windows, batch: int | None, progress: Progress) -> None:
        self.runners, self.tokens, self.progress = runners, tokens, progress
        first = runners[0]
        self.in_int8 = bool(first.quantized.weights.description.schemes)
        self.baseline = UNQUANTIZED if first.unquantized is not None else DEQUANTIZED
        self.variants = [self.baseline, *([DEQUANTIZED] if self.baseline != DEQUANTIZED else [])]
        if self.in_int8:
            self.variants.append(INT8)
        size = batch or max(1, BATCH_TOKENS // tokens.length)
        self.size = size
        starts = range(0, tokens.count, size)
        self.batches = [
            _Batch(slice(start, min(start + size, tokens.count)), position % len(runners))
            for position, start in enumerate(starts)
        ]

    @property
    def layer_count(self) -> int:
        """Number of decoder layers."""
        return len(self.runners[0].quantized.skeleton.layers)

    def layers_of(
        self,
        variants: Sequence[str],
        state: EvaluationState | None,
        record: str | Path | None = None,
        ablated: dict[str, int] | None = None,
    ) -> Streams:
        """Carry variants through all layers.

        Args:
            variants: names; beside the three known ones those of ``ablated``.
            state: where finished layers are kept.
            record: file for the inputs of MoE layers.
            ablated: variant -> the layer in which it takes the baseline's weights.
        """
        ablated = ablated or {}
        calls: list[tuple[list[LayerCall], list[LayerCall]]] = []
        embedded = []
        for item in self.batches:
            states, mine, theirs = self.runners[item.device].embed(self.tokens.ids[item.windows])
            calls.append(_shared(mine, theirs, calls))
            embedded.append(states.cpu())
        start = torch.cat(embedded)
        # The inputs of finished layers are not in the state: what is recorded starts with the first layer.
        streams = None if state is None or record is not None else state.load()
        if streams is None or set(streams.states) != set(variants):
            streams = Streams({name: start.clone() for name in variants})
        recorded: dict[str, Tensor] = {}
        with ThreadPoolExecutor(1, thread_name_prefix="quarkconv-read") as pool:
            ahead: Future[tuple[LayerWeights, LayerWeights | None]] | None = None
            self.progress.step("Running layers", self.layer_count - streams.finished, "layer")
            for number in range(streams.finished, self.layer_count):
                weights = self._read(number) if ahead is None else ahead.result()
                ahead = pool.submit(self._read, number + 1) if number + 1 < self.layer_count else None
                self._layer(number, weights, streams, calls, ablated, recorded if record is not None else None)
                streams.finished = number + 1
                if state is not None:
                    _saved(state, streams)
                self.progress.advance()
        if record is not None:
            _write_record(record, recorded)
        return streams

    def _read(self, number: int) -> tuple[LayerWeights, LayerWeights | None]:
        first = self.runners[0]
        other = first.unquantized
        return first.quantized.weights.layer(number), None if other is None else other.weights.layer(number)

    def _layer(
        self,
        number: int,
        weights: tuple[LayerWeights, LayerWeights | None],
        streams: Streams,
        calls: list[tuple[list[LayerCall], list[LayerCall]]],
        ablated: dict[str, int],
        recorded: dict[str, Tensor] | None,
    ) -> None:
        without = [name for name, layer in ablated.items() if layer == number]
        parts: dict[tuple[str, int], Tensor] = {}
        total = LayerSums()
        for runner in self.runners:
            runner.fill(number, *weights)

        def share(device: int) -> LayerSums:
            runner, sums = self.runners[device], LayerSums()
            for position, item in enumerate(self.batches):
                if item.device != device:
                    continue
                before = {name: tensor[item.windows] for name, tensor in streams.states.items()}
                inputs: dict[str, Tensor] | None = None if recorded is None else {}
                after, found = runner.step(
                    number,
                    before,
                    (calls[position][0][number], calls[position][1][number]),
                    ablated=without,
                    sample=position == 0 and INT8 in before,
                    record=inputs,
                )
                sums.add(found)
                for name, tensor in (inputs or {}).items():
                    parts[name, position] = tensor
                for name, tensor in after.items():
                    streams.states[name][item.windows] = tensor
            return sums

        with ThreadPoolExecutor(len(self.runners)) as pool:
            for sums in pool.map(share, range(len(self.runners))):
                total.add(sums)
        if recorded is not None:
            for module in {module for module, _ in parts}:
                recorded[module] = torch.cat([parts[key] for key in sorted(parts) if key[0] == module])
        for runner in self.runners:
            runner.empty(number)
        streams.sums.append(total)

    def scores(self, states: dict[str, Tensor]) -> dict[str, TokenScores]:
        """Score the tokens of the second half of each window."""
        found = {name: TokenScores() for name in states}
        scored = torch.tensor(list(self.tokens.scored))
        self.progress.step("Scoring", len(self.batches), "batch")
        for item in self.batches:
            runner = self.runners[item.device]
            ids = self.tokens.ids[item.windows]
            vocabulary = runner.quantized.skeleton.vocabulary
            block = max(1, LOGITS // (vocabulary * len(ids)))
            for places in torch.split(scored, block):
                targets = ids[:, places + 1].reshape(-1)
                logits = {}
                for name in states:
                    of_baseline = name == self.baseline
                    skeleton = (runner.baseline if of_baseline else runner.quantized).skeleton
                    logits[name] = skeleton.logits(ids, states[name][item.windows], places).flatten(0, 1)
                baseline = logits[self.baseline]
                for name, values in logits.items():
                    found[name].add(values, targets.to(values.device), None if name == self.baseline else baseline)
            self.progress.advance()
        return found

    def ablations(
        self, streams: Streams, scores: dict[str, TokenScores], layers: tuple[LayerEvaluation, ...], count: int
    ) -> tuple[Ablation, ...]:
        """The worst layers, each left as in the baseline, in one more pass through the model."""
        if not count or INT8 not in scores:
            return ()
        whole = scores[INT8].divergence()
        assert whole is not None
        worst = sorted(layers, key=lambda layer: -layer.own)[:count]
        names = {f"without layer {layer.index}": layer.index for layer in worst}
        again = self.layers_of(list(names), None, ablated=names)
        found = self.scores({self.baseline: streams.states[self.baseline], **again.states})
        ablations = []
        for layer, name in zip(worst, names, strict=True):
            divergence = found[name].divergence()
            assert divergence is not None
            share = 1 - divergence.mean / whole.mean if whole.mean else 0.0
            ablations.append(Ablation(layer.index, layer.module, divergence.mean, share))
        return tuple(ablations)


def _shared(
    mine: list[LayerCall], theirs: list[LayerCall], before: list[tuple[list[LayerCall], list[LayerCall]]]
) -> tuple[list[LayerCall], list[LayerCall]]:
    """The calls of a batch; those of an earlier batch where they are equal, as masks and positions are."""
    for other in before:
        if all(
            _equal(one.kwargs, two.kwargs) and _equal(one.args, two.args)
            for one, two in zip([*mine, *theirs], [*other[0], *other[1]], strict=True)
        ):
            return other
    return mine, theirs


def _equal(one: object, two: object) -> bool:
    if isinstance(one, Tensor) and isinstance(two, Tensor):
        return one.shape == two.shape and torch.equal(one.cpu(), two.cpu())
    if isinstance(one, dict) and isinstance(two, dict):
        return one.keys() == two.keys() and all(_equal(one[key], two[key]) for key in one)
    if isinstance(one, tuple | list) and isinstance(two, tuple | list):
        return len(one) == len(two) and all(map(_equal, one, two))
    return one is two or one == two


def _saved(state: EvaluationState, streams: Streams) -> None:
    try:
        state.save(streams)
    except OSError as error:
        raise WriteError(
            "The hidden states cannot be written",
            file=str(state.path),
            found=error.strerror or str(error),
            hint="free space there, set XDG_CACHE_HOME, or give --no-resume",
        ) from error


def _write_record(path: str | Path, recorded: dict[str, Tensor]) -> None:
    try:
        save_file(recorded, path)
    except OSError as error:
        raise WriteError("The recorded inputs cannot be written", file=str(path), found=str(error)) from error
