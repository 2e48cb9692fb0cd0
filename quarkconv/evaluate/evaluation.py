"""``evaluate``: perplexity, divergence and the error of each layer, streaming one decoder layer at a time."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Final

from quarkconv.description.description import Description, describe
from quarkconv.errors import UnsupportedError
from quarkconv.evaluate.request import DEFAULT_WINDOW, RECORD_CONTENT, Limits, require_one_source
from quarkconv.evaluate.results import WORST, Evaluation, ExpertError, LayerEvaluation
from quarkconv.evaluate.run import LeftOut, Run
from quarkconv.evaluate.runners import layer_runners
from quarkconv.evaluate.same_model import (
    config_differences,
    require_same_tokenizer,
    require_unquantized,
)
from quarkconv.evaluate.state import EvaluationState, fingerprint, state_key
from quarkconv.evaluate.streams import DEQUANTIZED, INT8, UNQUANTIZED, LayerRunner
from quarkconv.evaluate.sums import LayerSums
from quarkconv.evaluate.windows import Windows, windows_of_ids, windows_of_text
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
    root = _directory(model, progress)
    other = None if unquantized is None else _directory(unquantized, progress)
    description = describe(root)
    original = None if other is None else describe(other)
    for item in (description, original):
        if item is not None:
            _require_readable(item)
    tokens = (
        windows_of_ids(token_ids, windows)
        if token_ids is not None
        else windows_of_text(text, root / "tokenizer.json", window, windows)  # type: ignore[arg-type]
    )
    if other is not None and original is not None:
        require_unquantized(original)
        require_same_tokenizer(root, other)
    with ExitStack() as stack:
        runners = layer_runners(description, original, devices, layers, stack)
        first = runners[0]
        tokens.check_vocabulary(first.quantized.skeleton.vocabulary)
        run = Run(runners, tokens, batch, progress)
        if not run.in_int8 and (limits != Limits() or layers is not None or ablate):
            raise _no_int8(root)
        state = EvaluationState(_key(root, other, tokens, run, layers)) if resume else None
        streams = run.layers_of(run.variants, state, record)
        scores = run.scores(streams)
        evaluated = _layers(first, streams.sums)
        experts = _worst_experts(streams.sums)
        ablations = run.ablations(streams, scores, _worst_parts(evaluated, experts, ablate))
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
        device=" + ".join(map(str, devices)),
        perplexity={
            name: scores[name].perplexity() if name in scores else None for name in (INT8, DEQUANTIZED, UNQUANTIZED)
        },
        baseline=run.baseline,
        int8=scores[INT8].divergence() if INT8 in scores else None,
        dequantized=scores[DEQUANTIZED].divergence() if DEQUANTIZED in scores else None,
        layers=evaluated,
        experts=experts[:WORST],
        ablations=tuple(ablations),
        float_experts=first.quantized.weights.float_experts if run.in_int8 else (),
        float_linears=first.quantized.weights.float_linears,
        positions=first.quantized.skeleton.positions,
        config_differences=()
        if first.unquantized is None
        else config_differences(first.quantized.skeleton, first.unquantized.skeleton),
        limits=limits,
    )


def _no_int8(root: Path) -> UnsupportedError:
    return UnsupportedError(
        "The checkpoint holds no INT8 modules: there is no divergence, and no layer to leave unquantized",
        file=str(root),
        expected="INT8 modules",
        hint="leave out --max-kl, --min-agreement, --layers and --ablate",
    )


def _directory(model: str | Path, progress: Progress) -> Path:
    """The directory of a model; one on the Hub is downloaded to its cache."""
    return locate(model, cache=True, progress=progress).files.root


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


def _key(root: Path, other: Path | None, tokens: Windows, run: Run, layers: set[int] | None) -> str:
    digest = hashlib.sha256(repr(tokens.ids.flatten().tolist()).encode())
    return state_key(
        own_version(),
        os.path.realpath(root),
        fingerprint(root),
        other and os.path.realpath(other),
        other and fingerprint(other),
        digest.hexdigest(),
        list(tokens.ids.shape),
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
