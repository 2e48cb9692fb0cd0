"""``evaluate``: perplexity, divergence and the error of each layer, streaming one decoder layer at a time."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Final

from quarkconv.description.description import Description, describe
from quarkconv.errors import UnsupportedError
from quarkconv.evaluate.hidden_states import Streams
from quarkconv.evaluate.request import DEFAULT_WINDOW, RECORD_CONTENT, Limits, require_one_source
from quarkconv.evaluate.results import WORST, Evaluation, ExpertError, LayerEvaluation
from quarkconv.evaluate.run import LeftOut, Run
from quarkconv.evaluate.runners import layer_runners
from quarkconv.evaluate.same_model import (
    config_differences,
    require_same_tokenizer,
    require_unquantized,
)
from quarkconv.evaluate.scores import TokenScores
from quarkconv.evaluate.state import EvaluationState, fingerprint, state_key
from quarkconv.evaluate.streams import DEQUANTIZED, INT8, UNQUANTIZED, LayerRunner
from quarkconv.evaluate.sums import LayerSums
from quarkconv.evaluate.windows import windows_of_ids, windows_of_text
from quarkconv.experts.unread import are_modules
from quarkconv.files.written_file import require_writable
from quarkconv.findings import NOT_UNDERSTOOD, refusal
from quarkconv.hub.locate import locate
from quarkconv.load.devices import pick_devices
from quarkconv.progress import SILENT, Progress
from quarkconv.scheme.form import Form
from quarkconv.version import own_version

_EVALUATED: Final = frozenset({"quant-config-missing", "not-moe"})
"""Findings that keep a checkpoint from being converted, but not from being evaluated."""
_DEQUANTIZED_HINT: Final = (
    "`quarkconv convert --to bf16` writes the dequantized model, which can be evaluated: that measures the error of "
    "the weights, not of rounded activations"
)
"""The next step for INT8 experts that cannot run in INT8."""


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
    """Measure what quantization costs a model on a text, layer by layer.

    In memory are one decoder layer of each model, the next one while it is read, the embeddings and heads, and the
    hidden states of all windows.

    Args:
        model: directory or Hub repo id of an INT8 MoE checkpoint in any layout, or of a model in floats.
        unquantized: the model before quantization; without it INT8 is compared with the dequantized model.
        text: a UTF-8 text, tokenized by the model's ``tokenizer.json``.
        token_ids: a safetensors file with ``token_ids`` int64 [windows, window], instead of a text.
        window: tokens of a window of text.
        windows: how many windows to evaluate; None for all.
        batch: windows that run together; by default 4096 tokens on a CPU, and up to 32768 on a GPU, by its memory.
        device: ``cuda`` for all visible GPUs, ``cpu``, or ``auto``.
        layers: decoder layers that run in INT8; the others run dequantized. None for all INT8 layers.
        ablate: how many of the worst layers, and of the worst experts, are left unquantized in turn: their share of the
            divergence.
        record: a file to write the inputs of the MoE layers to, for ``verify --activations``.
        limits: bounds; the result lists those that are exceeded.
        resume: keep the hidden states on disk after each layer, and resume from those of an interrupted run.
        progress: see :class:`quarkconv.progress.Progress`.

    Raises:
        UsageError: neither text nor token ids, or both; a text that is too short; tokens outside of the vocabulary;
            another tokenizer or architecture in ``unquantized``, or a quantized model; ``record`` is a file of another
            kind.
        SourceError: a checkpoint or the text cannot be read, or hidden states are not finite.
        UnsupportedError: transformers has no class for the model, its experts cannot run in INT8, or it holds none and
            a limit is set, or layers are chosen.
        WriteError: hidden states or ``record`` cannot be written.
    """
    require_one_source(text, token_ids)
    require_writable("--record", record, RECORD_CONTENT.encode())
    devices = pick_devices(device)
    description, original = _described(model, unquantized, progress)
    root = description.checkpoint.root
    tokens = (
        windows_of_ids(token_ids, windows)
        if token_ids is not None
        else windows_of_text(text, root / "tokenizer.json", window, windows)  # type: ignore[arg-type]
    )
    if original is not None:
        require_unquantized(original)
        require_same_tokenizer(root, original.checkpoint.root)
    with ExitStack() as stack:
        runners = layer_runners(description, original, devices, layers, stack)
        tokens.check_vocabulary(runners[0].quantized.skeleton.vocabulary)
        run = Run(runners, tokens, batch, progress, resume)
        if not run.in_int8 and (limits != Limits() or layers is not None or ablate):
            raise _no_int8(root)
        state = EvaluationState(_key(description, original, run, layers)) if resume else None
        streams = run.layers_of(run.variants, state, record)
        scores = run.scores(streams)
        found = replace(_figures(run, streams, scores), limits=limits)
        ablations = run.ablations(streams, scores, _worst_parts(found.layers, _worst_experts(streams.sums), ablate))
        if state is not None:
            state.remove()
    other = None if unquantized is None else str(unquantized)
    return replace(found, model=str(model), unquantized=other, ablations=tuple(ablations))


def _described(
    model: str | Path, unquantized: str | Path | None, progress: Progress
) -> tuple[Description, Description | None]:
    """Both models, which can be evaluated; one on the Hub is downloaded to its cache.

    Raises:
        SourceError, UnsupportedError: as of :func:`_require_readable`, and of locating a model.
    """
    roots = [
        locate(item, cache=True, progress=progress).files.root for item in (model, unquantized) if item is not None
    ]
    described = [describe(root) for root in roots]
    for item in described:
        _require_readable(item)
    return described[0], described[1] if len(described) > 1 else None


def _figures(run: Run, streams: Streams, scores: Mapping[str, TokenScores]) -> Evaluation:
    """The figures of a run; names of models, limits and ablations are those of the caller."""
    first, tokens = run.runners[0], run.tokens
    quantized, unquantized = first.quantized, first.unquantized
    divergences = {name: scores[name].divergence() if name in scores else None for name in (INT8, DEQUANTIZED)}
    return Evaluation(
        model=str(quantized.skeleton.root),
        unquantized=None if unquantized is None else str(unquantized.skeleton.root),
        scheme=quantized.weights.description.scheme if run.in_int8 else None,
        tokens_from=tokens.source,
        windows=tokens.count,
        window=tokens.length,
        scored=tokens.count * len(tokens.scored),
        device=" + ".join(str(runner.device) for runner in run.runners),
        perplexity={
            name: scores[name].perplexity() if name in scores else None for name in (INT8, DEQUANTIZED, UNQUANTIZED)
        },
        baseline=run.baseline,
        int8=divergences[INT8],
        dequantized=divergences[DEQUANTIZED],
        layers=_layers(first, streams.sums),
        experts=_worst_experts(streams.sums)[:WORST],
        ablations=(),
        float_experts=quantized.weights.float_experts if run.in_int8 else (),
        float_linears=quantized.weights.float_linears,
        positions=quantized.skeleton.positions,
        config_differences=() if unquantized is None else config_differences(quantized.skeleton, unquantized.skeleton),
        limits=Limits(),
    )


def _no_int8(root: Path) -> UnsupportedError:
    return UnsupportedError(
        "The checkpoint holds no INT8 modules: there is no divergence, and no layer to leave unquantized",
        file=str(root),
        expected="INT8 modules",
        hint="leave out --max-kl, --min-agreement, --layers and --ablate",
    )


def _require_readable(description: Description) -> None:
    """Refuse a checkpoint that is neither an INT8 model nor a model in floats.

    Raises:
        SourceError, UnsupportedError: with the first finding that prevents an evaluation.
    """
    unread = description.topology.unread
    hint = _DEQUANTIZED_HINT if unread and are_modules(description.stored, unread) else None
    findings = [
        replace(item, hint=hint) if hint and item.code == NOT_UNDERSTOOD else item
        for item in description.findings
        if item.code not in _EVALUATED
        and (description.schemes or not item.code.startswith("expert"))
        and not (item.code == NOT_UNDERSTOOD and _unread_floats(description))
    ]
    root = str(description.checkpoint.root)
    if error := refusal(findings, root, "checkpoint", "evaluated"):
        raise error
    for (form, _), modules in description.modules.groups.items():
        if not form.quantized and not form.is_float:
            raise UnsupportedError(
                "The checkpoint has modules that are neither INT8 nor float",
                file=root,
                tensor=modules[0],
                expected="int8 or floats",
                found=form.weight.dtype,
                hint="run `quarkconv inspect`",
            )


def _unread_floats(description: Description) -> bool:
    """Whether experts whose names are not understood are stored in float: transformers' class loads or refuses them."""
    stored, unread = description.stored, description.topology.unread
    forms = (stored.linears.get(name) or Form(stored.tensors[name]) for name in unread)
    return bool(unread) and all(form.is_float and not form.quantized for form in forms)


def _key(description: Description, original: Description | None, run: Run, layers: set[int] | None) -> str:
    roots = [item.checkpoint.root if item is not None else None for item in (description, original)]
    return state_key(
        own_version(),
        *((root and os.path.realpath(root), root and fingerprint(root)) for root in roots),
        hashlib.sha256(run.tokens.ids.numpy().data).hexdigest(),
        list(run.tokens.ids.shape),
        run.size,
        run.variants,
        sorted(layers or ()),
    )


def _layers(runner: LayerRunner, sums: list[LayerSums]) -> tuple[LayerEvaluation, ...]:
    found = []
    for number, item in enumerate(sums):
        if not item.tokens:
            continue
        found.append(
            LayerEvaluation(
                index=number,
                module=runner.quantized.skeleton.layer_prefix(number),
                drift=item.drift,
                cosine=item.cosine,
                own=item.own,
                routing_changed=item.changed / item.tokens if item.routed else None,
                load=() if item.load is None else tuple(item.load.tolist()),
            )
        )
    return tuple(found)


def _worst_parts(layers: Sequence[LayerEvaluation], experts: Sequence[ExpertError], count: int) -> list[LeftOut]:
    """The worst layers, then the worst experts, ``count`` of each; layers without an error are left out."""
    worst = sorted((layer for layer in layers if layer.own > 0), key=lambda layer: -layer.own)[:count]
    return [LeftOut(layer.index) for layer in worst] + [LeftOut(item.layer, item.expert) for item in experts[:count]]


def _worst_experts(sums: list[LayerSums]) -> tuple[ExpertError, ...]:
    """All experts with an error, worst first."""
    found = [
        ExpertError(number, expert, int(item.expert_tokens[expert]), error / item.expert_norm)
        for number, item in enumerate(sums)
        if item.expert_errors is not None and item.expert_tokens is not None and item.expert_norm
        for expert, error in enumerate(item.expert_errors.tolist())
        if error > 0
    ]
    return tuple(sorted(found, key=lambda item: -item.error))
