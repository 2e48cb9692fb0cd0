"""One evaluation under way: all windows through the layers of every variant, then scores."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Final, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from quarkconv.errors import WriteError
from quarkconv.evaluate.forward import LayerCall, LayerOutput, final_logits
from quarkconv.evaluate.read_ahead import ReadAhead
from quarkconv.evaluate.results import Ablation
from quarkconv.evaluate.scores import TokenScores
from quarkconv.evaluate.state import EvaluationState
from quarkconv.evaluate.streams import DEQUANTIZED, INT8, UNQUANTIZED, LayerRunner, Streams
from quarkconv.evaluate.sums import LayerSums
from quarkconv.evaluate.windows import Windows
from quarkconv.progress import Progress

BATCH_TOKENS: Final = 4096
"""Tokens of a batch, where ``batch`` is not given."""
LOGITS: Final = 2**26
"""Logits of one model that are in memory at a time: 256 MB in float32."""


class Place(NamedTuple):
    """A decoder layer, or one routed expert of it."""

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
        ablated: dict[str, Place] | None = None,
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
        if streams is not None and set(streams.states) != set(variants):
            streams = None
        recorded: dict[str, Tensor] | None = None if record is None else {}
        first = self.runners[0]
        numbers = range(0 if streams is None else streams.finished, self.layer_count)
        with ThreadPoolExecutor(1, thread_name_prefix="quarkconv-read") as pool:
            quantized = ReadAhead(first.quantized.weights, numbers, pool)
            unquantized = None if first.unquantized is None else ReadAhead(first.unquantized.weights, numbers, pool)
            start, calls = self._embed()
            if streams is None:
                streams = Streams({name: start.clone() for name in variants})
            self.progress.step("Running layers", len(numbers), "layer")
            for number in numbers:
                weights = quantized.take()
                quantized.start()  # its codes are computed with as they were read: two layers of them are in memory
                for runner in self.runners:
                    runner.fill(number, weights)
                del weights
                if unquantized is not None:
                    others = unquantized.take()
                    for runner in self.runners:
                        runner.fill_unquantized(number, others)
                    del others  # the model has its own copy: the next layer may be read
                    unquantized.start()
                self._layer(number, streams, calls, ablated, recorded)
                streams.finished = number + 1
                if state is not None:
                    _saved(state, streams)
                self.progress.advance()
        if record is not None and recorded is not None:
            _write_record(record, recorded)
        return streams

    def _embed(self) -> tuple[Tensor, list[tuple[list[LayerCall], list[LayerCall]]]]:
        """Hidden states before the first layer, [W, L, H] on the CPU, and the calls of both models for each batch."""
        calls: list[tuple[list[LayerCall], list[LayerCall]]] = []
        embedded = []
        for item in self.batches:
            states, mine, theirs = self.runners[item.device].embed(self.tokens.ids[item.windows])
            calls.append(_shared(mine, theirs, calls))
            embedded.append(states.cpu())
        return torch.cat(embedded), calls

    def _layer(
        self,
        number: int,
        streams: Streams,
        calls: list[tuple[list[LayerCall], list[LayerCall]]],
        ablated: dict[str, Place],
        recorded: dict[str, Tensor] | None,
    ) -> None:
        without = {name: place.expert for name, place in ablated.items() if place.layer == number}
        parts: dict[tuple[str, int], Tensor] = {}
        total = LayerSums()

        def share(device: int) -> LayerSums:
            runner, sums = self.runners[device], LayerSums()
            for position, item in enumerate(self.batches):
                if item.device != device:
                    continue
                before = {
                    name: LayerOutput(tensor[item.windows], streams.handed_on.pop((name, position), None))
                    for name, tensor in streams.states.items()
                }
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
                for name, output in after.items():
                    streams.states[name][item.windows] = output.states
                    if output.handed_on is not None:
                        streams.handed_on[name, position] = output.handed_on
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
                    logits[name] = final_logits(skeleton, ids, states[name][item.windows], places).flatten(0, 1)
                baseline = logits[self.baseline]
                for name, values in logits.items():
                    found[name].add(values, targets.to(values.device), None if name == self.baseline else baseline)
            self.progress.advance()
        return found

    def ablations(self, streams: Streams, scores: dict[str, TokenScores], places: Sequence[Place]) -> list[Ablation]:
        """The model with single layers and experts left as in the baseline, all in one more pass.

        Args:
            streams: hidden states after the last layer.
            scores: of the same.
            places: the layers and experts, each left unquantized by itself.
        """
        if not places or INT8 not in scores:
            return []
        whole = scores[INT8].divergence()
        assert whole is not None
        names = {f"without {place}": place for place in places}
        again = self.layers_of(list(names), None, ablated=names)
        found = self.scores({self.baseline: streams.states[self.baseline], **again.states})
        ablations = []
        for name, (layer, expert) in names.items():
            divergence = found[name].divergence()
            assert divergence is not None
            share = 1 - divergence.mean / whole.mean if whole.mean else 0.0
            module = self.runners[0].quantized.skeleton.layer_prefix(layer)
            ablations.append(Ablation(layer, module, expert, divergence.mean, share))
        return ablations


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
    except (OSError, SafetensorError) as error:
        raise WriteError(
            "The hidden states cannot be written",
            file=str(state.path),
            found=(getattr(error, "strerror", None) or str(error))[:200],
            hint="free space there, set XDG_CACHE_HOME, or give --no-resume",
        ) from error


def _write_record(path: str | Path, recorded: dict[str, Tensor]) -> None:
    try:
        save_file(recorded, path)
    except (OSError, SafetensorError) as error:
        raise WriteError("The recorded inputs cannot be written", file=str(path), found=str(error)[:200]) from error
