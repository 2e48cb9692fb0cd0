"""``verify``: structure, bytes and numbers of one checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Final

import torch

from quarkconv.description.description import Description, describe
from quarkconv.errors import QuarkconvError, UnsupportedError
from quarkconv.files.urls import is_url
from quarkconv.findings import NOT_UNDERSTOOD, refusal
from quarkconv.hub.locate import locate
from quarkconv.load.devices import pick_devices
from quarkconv.load.layer_reader import READERS
from quarkconv.load.select import LayerName, select_layers
from quarkconv.plan.manifest import Manifest, read_manifest
from quarkconv.plan.shares import Share
from quarkconv.progress import SILENT, Progress
from quarkconv.verify.checksums import check_bytes, check_source
from quarkconv.verify.inputs import RecordedInputs
from quarkconv.verify.layer import LayerOutcome
from quarkconv.verify.linears import linear_problems
from quarkconv.verify.not_checked import NO_MANIFEST, NOT_REQUESTED, STOPPED, passed_on, why_no_numbers
from quarkconv.verify.numbers import backend_name
from quarkconv.verify.origins import origin_problems
from quarkconv.verify.parts import identity, scope_of
from quarkconv.verify.request import DEFAULT_TOKENS, STAGES, require_valid, token_counts
from quarkconv.verify.results import BytesResult, NumbersResult, Problem, Verification, VerifiedPart
from quarkconv.verify.streaming import NumbersJob, stream_numbers
from quarkconv.verify.structure import check_structure, function_problems

_NOT_COMPUTED: Final = frozenset({"scheme-unsupported", "scale-dtype", NOT_UNDERSTOOD})
"""Findings of checkpoints that are not INT8 W8A8, or not in all parts: nothing here computes them."""


def verify_checkpoint(
    model: str | Path,
    source: str | Path | None = None,
    device: str = "auto",
    *,
    layers: Collection[LayerName] | None = None,
    tokens: int | Sequence[int] = DEFAULT_TOKENS,
    seed: int = 0,
    unquantized: str | Path | None = None,
    activations: str | Path | None = None,
    stages: Collection[str] = STAGES,
    fail_fast: bool = False,
    share: Share | None = None,
    progress: Progress = SILENT,
) -> Verification:
    """Prove that a checkpoint is correct.

    With a manifest: structure, bytes and numbers. Without one (a Quark export as it came): structure and numbers. One
    layer is in memory at a time, and the one that is being read.

    Args:
        model: directory, Hub repo id or URL in an object store of a checkpoint whose experts are int8.
        source: the checkpoint that it was converted from; bytes and references are then also taken from there.
        device: ``cuda`` for all visible GPUs, ``cpu``, or ``auto`` for GPUs where there are any.
        layers: the MoE layers whose numbers are checked, each by its number, where no other layer has it, or by its
            module; None for all.
        tokens: tokens for each layer; several numbers check several paths of the kernels.
        seed: of the random tokens.
        unquantized: the model before it was quantized; weights and outputs are compared with it.
        activations: a safetensors file of recorded hidden states to use instead of random ones; see
            :class:`quarkconv.verify.inputs.RecordedInputs`.
        stages: which of ``bytes`` and ``numbers`` are checked; the structure always is.
        fail_fast: stop at the first problem.
        share: the share of the layers and tensors that is checked, where several processes verify one checkpoint; None
            for all. :func:`quarkconv.verify.merged.merged` merges their results.
        progress: receives downloads, the reading of headers, the bytes checked, and a note on each layer.

    Raises:
        UsageError: an unknown device, layer or stage, an invalid number of tokens, or another model to compare with.
        SourceError: the checkpoint, its source or the unquantized model cannot be read.
        UnsupportedError: the checkpoint is not an INT8 mixture of experts.
    """
    counts = token_counts(tokens)
    require_valid(stages, layers, seed)
    devices = pick_devices(device)
    recorded = None if activations is None else RecordedInputs(activations)

    description = _described(model, progress)
    manifest = read_manifest(description.checkpoint.store)
    _check_verifiable(description, manifest)
    chosen = select_layers(description.int8_layers, layers, str(model))
    if recorded is not None:
        recorded.check(chosen)
    compared = None if source is None else _described(source, progress)
    if compared is not None and manifest is not None:
        check_source(compared.checkpoint.store, manifest)
    original = None
    if unquantized is not None and "numbers" in stages:
        original = _described(unquantized, progress)
    for noun, other in (("source", compared), ("unquantized model", original)):
        if other is not None and (broken := _damage(other, noun)) is not None:
            raise broken

    structure, problems = check_structure(description, manifest)
    if compared is not None:
        problems += function_problems(description, compared, chosen)
        problems += origin_problems(description, manifest, compared) if manifest is not None else ()
    if "numbers" in stages and structure.readable and (share is None or share.number == 1):
        problems += linear_problems(description, _experts_of(description))
    skipped = why_no_numbers(
        description, chosen, structure, stages, with_source=compared is not None, stopped=fail_fast and problems != []
    )
    scope = scope_of(description, manifest, chosen, share)
    check_rest = _byte_check(description, manifest, compared, stages, progress, only=scope.names, fail_fast=fail_fast)
    counts_bytes = manifest is not None and "bytes" in stages
    if counts_bytes:
        progress.step("Checking", scope.nbytes, "byte")
    elif skipped is None:
        progress.step("Checking", len(scope.layers) * len(counts), "layer")
    outcomes: list[LayerOutcome] = []
    if skipped is None:
        job = NumbersJob(
            description=description,
            manifest=manifest if compared is None and "bytes" in stages else None,
            layers=scope.layers,
            devices=devices,
            tokens=counts,
            seed=seed,
            source=_int8_source(compared),
            unquantized=original,
            recorded=recorded,
            fail_fast=fail_fast,
            counts_bytes=counts_bytes,
        )
        outcomes, rest = stream_numbers(job, progress, lambda: check_rest(job.covered()))
    else:
        rest = check_rest(())
    checked, wrong = rest or (BytesResult(skipped=STOPPED), [])

    found = [problem for outcome in outcomes for problem in outcome.problems]
    problems += [problem for problem in found if problem.stage == "bytes"] + wrong
    problems += [problem for problem in found if problem.stage != "bytes"]
    numbers = NumbersResult(
        device=_shown(devices),
        backend=backend_name(devices[0]),
        tokens=counts,
        seed=seed,
        layers=tuple(item for outcome in outcomes for item in outcome.numbers),
        experts=tuple(outcome.experts for outcome in outcomes),
        skipped=skipped,
    )
    return Verification(
        model=str(model),
        source=None if source is None else str(source),
        unquantized=None if unquantized is None else str(unquantized),
        scheme=description.scheme,
        structure=structure,
        bytes=checked,
        numbers=numbers,
        problems=tuple(problems),
        findings=tuple(passed_on(description, compared)),
        part=None
        if share is None
        else VerifiedPart(
            number=share.number,
            count=share.count,
            identity=identity(
                description,
                manifest,
                chosen,
                tokens=counts,
                seed=seed,
                stages=stages,
                compared=[
                    name
                    for name, given in (
                        ("--source", source),
                        ("--unquantized", unquantized),
                        ("--activations", activations),
                    )
                    if given is not None
                ],
            ),
        ),
    )


def _shown(devices: Sequence[torch.device]) -> str:
    return devices[0].type if len(devices) == 1 else f"{len(devices)} x {devices[0].type}"


def _byte_check(
    description: Description,
    manifest: Manifest | None,
    source: Description | None,
    stages: Collection[str],
    progress: Progress,
    *,
    only: Collection[str] | None,
    fail_fast: bool,
) -> Callable[[Collection[str]], tuple[BytesResult, list[Problem]]]:
    """The stage of bytes, for the tensors to leave out; where it cannot run, its result says why."""
    if "bytes" not in stages:
        return lambda _: (BytesResult(skipped=NOT_REQUESTED), [])
    if manifest is None:
        return lambda _: (BytesResult(skipped=NO_MANIFEST), [])
    files = None if source is None else source.checkpoint.store
    return lambda skip: check_bytes(
        description, manifest, files, progress.advance, READERS, skip, only=only, fail_fast=fail_fast
    )


def _described(model: str | Path, progress: Progress) -> Description:
    stream = isinstance(model, str) and is_url(model)  # models on the Hub are downloaded
    return describe(locate(model, cache=not stream, progress=progress).files, progress)


def _damage(description: Description, noun: str) -> QuarkconvError | None:
    """The error for a checkpoint to compare with whose files cannot be read; None where they can."""
    return refusal(description.checkpoint.findings, str(description.checkpoint.root), noun, "compared with")


def _check_verifiable(description: Description, manifest: Manifest | None) -> None:
    if manifest is not None:
        return
    layers = description.int8_layers
    scaled = any(form.scale is not None for layer in layers for form in layer.all_forms)
    findings = [item for item in description.findings if not scaled or item.code in _NOT_COMPUTED]
    root = str(description.checkpoint.root)
    blocked = refusal(findings, root, "checkpoint", "verified")
    if blocked is not None:
        raise blocked
    if scaled:
        return
    first = next(iter(description.findings), None)
    raise UnsupportedError(
        "The checkpoint has no INT8 experts",
        file=root,
        expected="a checkpoint whose routed experts are stored in int8",
        found=first.message if first else "none",
        hint="run `quarkconv inspect`",
    )


def _experts_of(description: Description) -> frozenset[str]:
    """The modules of the layers of int8 experts."""
    return frozenset(module for layer in description.int8_layers for module in layer.module_names)


def _int8_source(source: Description | None) -> Description | None:
    """The source, unless the conversion quantized some of its experts: then only bytes are compared."""
    return source if source is not None and len(source.int8_layers) == len(source.moe_layers) else None
