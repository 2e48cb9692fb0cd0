"""``verify``: structure, bytes and numbers of one checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TypeAlias

import torch

from quarkconv.load.devices import pick_devices
from quarkconv.load.layer_reader import READERS
from quarkconv.load.select import LayerName
from quarkconv.plan.shares import Share
from quarkconv.progress import SILENT, Progress
from quarkconv.verify.checkpoints import Checkpoints, open_checkpoints
from quarkconv.verify.checksums import check_bytes
from quarkconv.verify.inputs import RecordedInputs
from quarkconv.verify.layer import LayerOutcome
from quarkconv.verify.linears import linear_problems
from quarkconv.verify.not_checked import (
    NO_MANIFEST,
    NOT_REQUESTED,
    STOPPED,
    passed_on,
    unknown_functions,
    why_no_numbers,
)
from quarkconv.verify.numbers import backend_name
from quarkconv.verify.origins import origin_problems
from quarkconv.verify.parts import Scope, identity, scope_of
from quarkconv.verify.request import DEFAULT_TOKENS, STAGES, require_valid, token_counts
from quarkconv.verify.results import (
    BytesResult,
    LinearsResult,
    NumbersResult,
    Problem,
    StructureResult,
    Verification,
    VerifiedPart,
)
from quarkconv.verify.streaming import NumbersJob, stream_numbers
from quarkconv.verify.structure import check_structure, function_problems
from quarkconv.verify.unquantized_linears import compare_linears

ByteCheck: TypeAlias = Callable[[Collection[str]], tuple[BytesResult, list[Problem]]]
"""Compares the bytes of all tensors but some, and gives the result with its problems."""


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

    opened = open_checkpoints(model, source, unquantized if "numbers" in stages else None, layers, recorded, progress)
    linears_here = "numbers" in stages and (share is None or share.number == 1)
    structure, problems = _structure(opened, linears=linears_here)
    unknown = unknown_functions(opened.model, opened.layers)
    skipped = why_no_numbers(
        opened.model,
        opened.layers,
        unknown,
        structure,
        stages,
        with_source=opened.source is not None,
        stopped=fail_fast and problems != [],
    )
    left_out = unknown if skipped is None else []
    names = {layer.module for layer in left_out}
    opened = replace(opened, layers=tuple(layer for layer in opened.layers if layer.prefix not in names))
    scope = scope_of(opened.model, opened.manifest, opened.layers, share)
    job = NumbersJob(
        description=opened.model,
        manifest=opened.manifest if opened.source is None and "bytes" in stages else None,
        layers=scope.layers,
        devices=devices,
        tokens=counts,
        seed=seed,
        source=opened.int8_source,
        unquantized=opened.unquantized,
        recorded=recorded,
        fail_fast=fail_fast,
        counts_bytes=opened.manifest is not None and "bytes" in stages,
    )
    linears: LinearsResult | None = None
    wrong: list[Problem] = []
    if skipped is None and linears_here:
        linears, wrong = _linears(opened, devices[0], every=layers is None)
    problems += wrong
    check_rest = _byte_check(opened, stages, progress, only=scope.names, fail_fast=fail_fast)
    outcomes, checked, differences = _carry_out(job, scope, skipped, check_rest, progress)
    options = (("--source", source), ("--unquantized", unquantized), ("--activations", activations))
    compared = [option for option, value in options if value is not None]
    return Verification(
        model=str(model),
        source=None if source is None else str(source),
        unquantized=None if unquantized is None else str(unquantized),
        scheme=opened.model.scheme,
        structure=structure,
        bytes=checked,
        numbers=NumbersResult(
            device=_shown(devices),
            backend=backend_name(devices[0]),
            tokens=counts,
            seed=seed,
            layers=tuple(item for outcome in outcomes for item in outcome.numbers),
            experts=tuple(outcome.experts for outcome in outcomes),
            skipped=skipped,
            not_checked=tuple(left_out),
            linears=linears,
        ),
        problems=tuple(_in_order(problems, outcomes, differences)),
        findings=tuple(passed_on(opened.model, opened.source)),
        part=None if share is None else _part(share, opened, job, stages, compared),
    )


def _structure(opened: Checkpoints, *, linears: bool) -> tuple[StructureResult, list[Problem]]:
    """The stage of structure: of the checkpoint, against its source, and on request of the linears beside experts."""
    description, manifest, source = opened.model, opened.manifest, opened.source
    structure, problems = check_structure(description, manifest)
    if source is not None:
        problems += function_problems(description, source, opened.layers)
        problems += origin_problems(description, manifest, source) if manifest is not None else ()
    if linears and structure.readable:
        problems += linear_problems(description, opened.experts)
    return structure, problems


def _linears(opened: Checkpoints, device: torch.device, *, every: bool) -> tuple[LinearsResult | None, list[Problem]]:
    """The int8 linears outside of the routed experts, all or in the requested layers, beside the unquantized ones."""
    if opened.unquantized is None:
        return None, []
    description, blocks = opened.model, tuple(f"{layer.moe.rpartition('.')[0]}." for layer in opened.layers)
    modules = [
        module
        for module, form in description.stored.linears.items()
        if form.quantized
        and form.granularity is not None
        and module not in opened.experts
        and (every or module.startswith(blocks))
    ]
    return compare_linears(description, opened.unquantized, modules, device)


def _carry_out(
    job: NumbersJob, scope: Scope, skipped: str | None, check_rest: ByteCheck, progress: Progress
) -> tuple[list[LayerOutcome], BytesResult, list[Problem]]:
    """The stages of numbers and bytes: the outcomes of the layers, and the bytes with their problems.

    Args:
        job: the layers to compute.
        scope: what this process checks.
        skipped: why no numbers are computed; None where they are.
        check_rest: compares the bytes that are not compared while the layers are read.
        progress: counts bytes where they are compared, or else layers.
    """
    if job.counts_bytes:
        progress.step("Checking", scope.nbytes, "byte")
    elif skipped is None:
        progress.step("Checking", len(scope.layers) * len(job.tokens), "layer")
    if skipped is not None:
        return [], *check_rest(())
    outcomes, rest = stream_numbers(job, progress, lambda: check_rest(job.covered()))
    return outcomes, *(rest or (BytesResult(skipped=STOPPED), []))


def _in_order(
    problems: Sequence[Problem], outcomes: Sequence[LayerOutcome], differences: Sequence[Problem]
) -> list[Problem]:
    """The problems of structure; of bytes, those of layers first; of numbers, by layer as in merged parts."""
    found = [*problems, *(problem for outcome in outcomes for problem in outcome.problems)]
    stages = {stage: [problem for problem in found if problem.stage == stage] for stage in ("structure", "bytes")}
    numbers = [problem for problem in found if problem.stage not in stages]
    numbers.sort(key=lambda problem: (problem.layer is None, problem.layer or 0))
    return [*stages["structure"], *stages["bytes"], *differences, *numbers]


def _part(
    share: Share, opened: Checkpoints, job: NumbersJob, stages: Collection[str], compared: Sequence[str]
) -> VerifiedPart:
    """The number of this part, and what it has in common with the others; ``compared`` as of :func:`identity`."""
    common = identity(
        opened.model,
        opened.manifest,
        opened.layers,
        tokens=job.tokens,
        seed=job.seed,
        stages=stages,
        compared=compared,
    )
    return VerifiedPart(share.number, share.count, common)


def _shown(devices: Sequence[torch.device]) -> str:
    return devices[0].type if len(devices) == 1 else f"{len(devices)} x {devices[0].type}"


def _byte_check(
    opened: Checkpoints,
    stages: Collection[str],
    progress: Progress,
    *,
    only: Collection[str] | None,
    fail_fast: bool,
) -> ByteCheck:
    """The stage of bytes, for the tensors to leave out; where it cannot run, its result says why."""
    if "bytes" not in stages:
        return lambda _: (BytesResult(skipped=NOT_REQUESTED), [])
    manifest, source = opened.manifest, opened.source
    if manifest is None:
        return lambda _: (BytesResult(skipped=NO_MANIFEST), [])
    files = None if source is None else source.checkpoint.store
    return lambda skip: check_bytes(
        opened.model, manifest, files, progress.advance, READERS, skip, only=only, fail_fast=fail_fast
    )
