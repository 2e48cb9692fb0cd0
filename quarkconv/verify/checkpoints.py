"""The checkpoint that is verified, and those that it is compared with: described, or refused."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from quarkconv.description.description import Description, describe
from quarkconv.errors import QuarkconvError, UnsupportedError
from quarkconv.experts.layer import MoELayer
from quarkconv.files.urls import is_url
from quarkconv.findings import NOT_UNDERSTOOD, refusal
from quarkconv.hub.locate import locate
from quarkconv.load.select import LayerName, select_layers
from quarkconv.plan.manifest import Manifest, read_manifest
from quarkconv.progress import Progress
from quarkconv.verify.checksums import check_source
from quarkconv.verify.inputs import RecordedInputs

_NOT_COMPUTED: Final = frozenset({"scheme-unsupported", "scale-dtype", NOT_UNDERSTOOD})
"""Findings of checkpoints that are not INT8 W8A8, or not in all parts: nothing here computes them."""


@dataclass(frozen=True, slots=True)
class Checkpoints:
    """The checkpoint that is verified, and those that it is compared with.

    Attributes:
        model: the checkpoint.
        manifest: its manifest; None without one.
        layers: the MoE layers whose numbers are checked.
        source: the checkpoint that it was converted from; None where it is not compared.
        unquantized: the model before it was quantized; None where it is not compared.
    """

    model: Description
    manifest: Manifest | None
    layers: tuple[MoELayer, ...]
    source: Description | None
    unquantized: Description | None

    @property
    def int8_source(self) -> Description | None:
        """The source, unless the conversion quantized some of its experts: then only bytes are compared."""
        source = self.source
        return source if source is not None and len(source.int8_layers) == len(source.moe_layers) else None

    @property
    def experts(self) -> frozenset[str]:
        """The modules of the layers of int8 experts."""
        return frozenset(module for layer in self.model.int8_layers for module in layer.module_names)


def open_checkpoints(
    model: str | Path,
    source: str | Path | None,
    unquantized: str | Path | None,
    layers: Collection[LayerName] | None,
    recorded: RecordedInputs | None,
    progress: Progress,
) -> Checkpoints:
    """Describe the checkpoints of a verification.

    Args:
        model, source, unquantized, layers: as of :func:`quarkconv.verify.verify.verify_checkpoint`.
        recorded: hidden states, which must fit the layers.
        progress: receives downloads and the reading of headers.

    Raises:
        UsageError: an unknown layer, hidden states that do not fit, or another source than that of the manifest.
        SourceError: a checkpoint cannot be read.
        UnsupportedError: the checkpoint is not an INT8 mixture of experts.
    """
    description = _described(model, progress)
    manifest = read_manifest(description.checkpoint.store)
    if manifest is None:
        _check_int8(description)
    chosen = select_layers(description.int8_layers, layers, str(model))
    if recorded is not None:
        recorded.check(chosen)
    compared = None if source is None else _described(source, progress)
    if compared is not None and manifest is not None:
        check_source(compared.checkpoint.store, manifest)
    original = None if unquantized is None else _described(unquantized, progress)
    for noun, other in (("source", compared), ("unquantized model", original)):
        if other is not None and (broken := _damage(other, noun)) is not None:
            raise broken
    return Checkpoints(description, manifest, chosen, compared, original)


def _described(model: str | Path, progress: Progress) -> Description:
    stream = isinstance(model, str) and is_url(model)  # models on the Hub are downloaded
    return describe(locate(model, cache=not stream, progress=progress).files, progress)


def _damage(description: Description, noun: str) -> QuarkconvError | None:
    """The error for a checkpoint to compare with whose files cannot be read; None where they can."""
    return refusal(description.checkpoint.findings, str(description.checkpoint.root), noun, "compared with")


def _check_int8(description: Description) -> None:
    """Refuse a checkpoint without int8 experts, or with findings that keep them from being computed."""
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
