"""``evaluate``: perplexity, divergence and the error of each layer, streaming one decoder layer at a time."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import torch
from safetensors.torch import save_file
from torch import Tensor

from quarkconv.description.description import Description, describe
from quarkconv.errors import UnsupportedError, UsageError, WriteError
from quarkconv.evaluate.results import WORST, Ablation, Evaluation, ExpertError, LayerEvaluation, Limits
from quarkconv.evaluate.scores import TokenScores
from quarkconv.evaluate.skeleton import LayerCall, Skeleton
from quarkconv.evaluate.state import EvaluationState, fingerprint, state_key
from quarkconv.evaluate.streams import (
    DEQUANTIZED,
    INT8,
    UNQUANTIZED,
    LayerRunner,
    LayerSums,
    Model,
    Streams,
    relative,
)
from quarkconv.evaluate.weights import CheckpointWeights, LayerWeights
from quarkconv.evaluate.windows import Windows, windows_of_ids, windows_of_text
from quarkconv.hub.locate import locate
from quarkconv.load.devices import pick_devices
from quarkconv.progress import SILENT, Progress

DEFAULT_WINDOW: Final = 2048
BATCH_TOKENS: Final = 4096
"""Tokens of a batch, where ``batch`` is not given."""
LOGITS: Final = 2**26
"""Logits of one model that are in memory at a time: 256 MB in float32."""


@dataclass(frozen=True, slots=True)
class _Batch:
    """Some windows and the device that they run on."""

    windows: slice
    device: int


def evaluate_checkpoint(
    model: str | Path,
    unquantized: str | Path | None = None,
    *,
    text: str | Path | None = None,
    token_ids: str | Path | None = None,
    window: int = DEFAULT_WINDOW,
    windows: int | None = None,
    batch: int | None = None,
    device: str = "auto",
    layers: set[int] | None = None,
    ablate: int = 0,
    record: str | Path | None = None,
    limits: Limits = Limits(),  # noqa: B008 - frozen
    resume: bool = True,
    progress: Progress = SILENT,
) -> Evaluation:
    """Say what quantization costs a model, on a text, layer by layer.

    One decoder layer of each model is in memory, the next one is read meanwhile, and the hidden states of all windows;
    beside them the embeddings and the head.

    Args:
        model: directory or Hub repo id of an INT8 MoE checkpoint in any layout, or of a model in floats.
        unquantized: the model before quantization; without it INT8 is compared with the dequantized model.
        text: a UTF-8 text, tokenized by the model's ``tokenizer.json``.
        token_ids: a safetensors file with ``token_ids`` int64 [windows, window], instead of a text.
        window: tokens of a window of text.
        windows: how many windows to evaluate; None for all.
        batch: windows that run together; by default about 4096 tokens.
        device: ``cuda`` for all visible GPUs, ``cpu``, or ``auto``.
        layers: decoder layers that run in INT8, the others as in the baseline; None for all that are stored so.
        ablate: how many of the worst layers are left unquantized, each by itself, to say what they cost.
        record: a file to write the inputs of the MoE layers to, for ``verify --activations``.
        limits: bounds; the result says which are exceeded.
        resume: keep the hidden states on disk after each layer, and resume from those of an interrupted run.
        progress: see :class:`quarkconv.progress.Progress`.

    Raises:
        UsageError: neither text nor token ids, or both; a text that is too short; tokens outside of the vocabulary;
            another tokenizer or architecture in ``unquantized``.
        SourceError: a checkpoint or the text cannot be read, or hidden states are not finite.
        UnsupportedError: transformers has no class for the model, or its experts cannot run in INT8.
        WriteError: hidden states or ``record`` cannot be written.
    """
    if (text is None) == (token_ids is None):
        raise UsageError("Give either a text or token ids", expected="--text or --token-ids",
                         found="neither" if text is None else "both")  # fmt: skip
    devices = pick_devices(device)
    root = _directory(model, progress)
    other = None if unquantized is None else _directory(unquantized, progress)
    tokens = (
        windows_of_ids(token_ids, windows)
        if token_ids is not None
        else windows_of_text(text, root / "tokenizer.json", window, windows)  # type: ignore[arg-type]
    )
    description = describe(root)
    original = None if other is None else describe(other)
    if other is not None:
        _check_tokenizers(root, other)
    with ExitStack() as stack:
        runners = [_runner(description, original, place, layers, stack) for place in devices]
        tokens.check_vocabulary(runners[0].quantized.skeleton.vocabulary)
        run = _Run(runners, tokens, batch, progress)
        state = EvaluationState(_key(root, other, tokens, run, layers)) if resume else None
        streams = run.layers_of(run.variants, state, record)
        scores = run.scores(streams.states)
        evaluated = _layers(runners[0], streams.sums)
        ablations = run.ablations(streams, scores, evaluated, ablate)
        if state is not None:
            state.remove()
    return Evaluation(
        model=str(model),
        unquantized=None if unquantized is None else str(unquantized),
        scheme=description.scheme if run.in_int8 else None,
        tokens_from=tokens.source,
        windows=tokens.count,
        window=tokens.length,
        scored=tokens.count * len(tokens.scored),
        device=" + ".join(str(place) for place in devices),
        perplexity={
            name: scores[name].perplexity() if name in scores else None for name in (INT8, DEQUANTIZED, UNQUANTIZED)
        },
        baseline=run.baseline,
        int8=scores[INT8].divergence() if INT8 in scores else None,
        dequantized=scores[DEQUANTIZED].divergence() if DEQUANTIZED in scores else None,
        layers=evaluated,
        experts=_worst_experts(streams.sums),
        ablations=ablations,
        float_experts=tuple(layer.prefix for layer in description.moe_layers if not layer.quantized)
        if run.in_int8
        else (),
        limits=limits,
    )


class _Run:
    """One evaluation under way."""

    def __init__(self, runners: list[LayerRunner], tokens: Windows, batch: int | None, progress: Progress) -> None:
        self.runners, self.tokens, self.progress = runners, tokens, progress
        first = runners[0]
        self.in_int8 = bool(first.quantized.weights.description.int8_layers)
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
            _check_calls(self.runners[0], calls, self.batches, item, mine)
            calls.append((mine, theirs))
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
        total = LayerSums()
        for runner in self.runners:
            runner.fill(number, *weights)

        def share(device: int) -> LayerSums:
            runner, sums = self.runners[device], LayerSums()
            for position, item in enumerate(self.batches):
                if item.device != device:
                    continue
                before = {name: tensor[item.windows] for name, tensor in streams.states.items()}
                mine, theirs = calls[position][0][number], calls[position][1][number]
                if position == 0 and INT8 in before:
                    runner.sample_experts(number, before[self.baseline], theirs, sums)
                if recorded is not None:
                    runner.record(number, before[self.baseline], theirs, recorded)
                after, found = runner.step(number, before, (mine, theirs), without)
                sums.add(found)
                for name, tensor in after.items():
                    streams.states[name][item.windows] = tensor
            return sums

        with ThreadPoolExecutor(len(self.runners)) as pool:
            for sums in pool.map(share, range(len(self.runners))):
                total.add(sums)
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


def _directory(model: str | Path, progress: Progress) -> Path:
    """The directory of a model; one on the Hub is downloaded to its cache."""
    return locate(model, cache=True, progress=progress).files.root


def _runner(
    description: Description,
    original: Description | None,
    device: torch.device,
    layers: set[int] | None,
    stack: ExitStack,
) -> LayerRunner:
    quantized = _model(description, device, stack)
    unquantized = None if original is None else _model(original, device, stack)
    if unquantized is not None:
        _check_same_model(quantized.skeleton, unquantized.skeleton)
    known = len(quantized.skeleton.layers)
    if layers is not None and not layers <= set(range(known)):
        raise UsageError("There is no such decoder layer", expected=f"0 to {known - 1}",
                         found=", ".join(map(str, sorted(layers - set(range(known))))))  # fmt: skip
    runner = LayerRunner(quantized, unquantized, None if layers is None else frozenset(layers))
    for model in (quantized, *([] if unquantized is None else [unquantized])):
        model.skeleton.fill(model.weights.layer(None).floats, None)
    return runner


def _model(description: Description, device: torch.device, stack: ExitStack) -> Model:
    skeleton = Skeleton(description.checkpoint.root, device)
    return Model(skeleton, stack.enter_context(CheckpointWeights(description, skeleton)))


def _check_same_model(quantized: Skeleton, unquantized: Skeleton) -> None:
    for what, mine, theirs in (
        ("class", type(quantized.model).__name__, type(unquantized.model).__name__),
        ("number of layers", len(quantized.layers), len(unquantized.layers)),
        ("vocabulary", quantized.vocabulary, unquantized.vocabulary),
    ):
        if mine != theirs:
            raise UsageError(
                f"The unquantized model has another {what}",
                file=str(unquantized.root),
                expected=str(mine),
                found=str(theirs),
                hint="give --unquantized the model before it was quantized",
            )


def _check_tokenizers(root: Path, other: Path) -> None:
    files = [folder / "tokenizer.json" for folder in (root, other)]
    if all(file.is_file() for file in files) and files[0].read_bytes() != files[1].read_bytes():
        from quarkconv.evaluate.windows import load_tokenizer

        mine, theirs = (load_tokenizer(file).get_vocab() for file in files)
        if mine != theirs:
            raise UsageError(
                "The unquantized model has another tokenizer",
                file=str(files[1]),
                hint="give --unquantized the model before it was quantized",
            )


def _check_calls(
    runner: LayerRunner,
    calls: list[tuple[list[LayerCall], list[LayerCall]]],
    batches: list[_Batch],
    item: _Batch,
    mine: list[LayerCall],
) -> None:
    """Refuse models that pass something of the tokens to their layers beside hidden states."""
    same = [
        position
        for position, other in enumerate(batches[: len(calls)])
        if other.windows.stop - other.windows.start == item.windows.stop - item.windows.start
    ]
    if same and not _equal(calls[same[0]][0][0].kwargs, mine[0].kwargs):
        raise UnsupportedError(
            "The layers of this model depend on the tokens beside the hidden states",
            file=str(runner.quantized.skeleton.root),
            found=type(runner.quantized.skeleton.model).__name__,
        )


def _equal(one: object, two: object) -> bool:
    if isinstance(one, Tensor) and isinstance(two, Tensor):
        return one.shape == two.shape and torch.equal(one.cpu(), two.cpu())
    if isinstance(one, dict) and isinstance(two, dict):
        return one.keys() == two.keys() and all(_equal(one[key], two[key]) for key in one)
    if isinstance(one, tuple | list) and isinstance(two, tuple | list):
        return len(one) == len(two) and all(map(_equal, one, two))
    return one is two or one == two


def _key(root: Path, other: Path | None, tokens: Windows, run: _Run, layers: set[int] | None) -> str:
    digest = hashlib.sha256(repr(tokens.ids.flatten().tolist()).encode())
    return state_key(
        root.resolve(), fingerprint(root), other and other.resolve(), other and fingerprint(other),
        digest.hexdigest(), list(tokens.ids.shape), run.size, run.variants, sorted(layers or ()),
    )  # fmt: skip


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


def _layers(runner: LayerRunner, sums: list[LayerSums]) -> tuple[LayerEvaluation, ...]:
    found = []
    for number, item in enumerate(sums):
        if not item.tokens:
            continue
        both = (item.norm * item.baseline_norm) ** 0.5
        found.append(
            LayerEvaluation(
                index=number,
                module=runner.quantized.skeleton.layer_prefix(number),
                drift=relative(item.difference, item.baseline_norm),
                cosine=item.product / both if both else 1.0,
                own=relative(item.own_difference, item.own_norm),
                routing_changed=item.changed / item.tokens if item.routed else None,
                load=() if item.load is None else tuple(item.load.tolist()),
            )
        )
    return tuple(found)


def _worst_experts(sums: list[LayerSums]) -> tuple[ExpertError, ...]:
    found = [
        ExpertError(number, expert, int(item.expert_tokens[expert]), error / item.expert_norm)
        for number, item in enumerate(sums)
        if item.expert_errors is not None and item.expert_tokens is not None and item.expert_norm
        for expert, error in enumerate(item.expert_errors.tolist())
        if error > 0
    ]
    return tuple(sorted(found, key=lambda item: -item.error)[:WORST])
