"""Findings where ``quant_model_description.json`` disagrees with the tensors, or has unsupported parts."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from quarkconv.findings import Finding, FindingsAbout, finding
from quarkconv.headers.checkpoint import Checkpoint
from quarkconv.headers.file_names import ASCEND_NAME
from quarkconv.scheme.formats.ascend import AscendScheme
from quarkconv.scheme.merged import MERGED
from quarkconv.text import plural


def ascend_findings(declared: AscendScheme, checkpoint: Checkpoint) -> Iterator[Finding]:
    """The findings about an Ascend description, unsupported parts first."""
    for kind in dict.fromkeys(declared.other.values()):
        names = [name for name, found in declared.other.items() if found == kind]
        yield from FindingsAbout(
            "scheme-unsupported",
            names,
            f"{plural(len(names), 'weight')} of type {kind}",
            hint="quarkconv converts W8A8_DYNAMIC; export with dynamic activations",
        )
    rotated = [path.as_posix() for path in checkpoint.files() if path.parts[0] == "optional" and len(path.parts) > 1]
    for meaning in dict.fromkeys([*declared.unsupported, *(["rotations"] if rotated else [])]):
        yield finding(
            "scheme-unsupported",
            rotated[0] if meaning == "rotations" and rotated else ASCEND_NAME,
            f"{ASCEND_NAME} declares {meaning}, which only engines for Ascend compute",
            hint="export the model again without it",
        )
    yield from FindingsAbout(
        "description-mismatch",
        declared.missing,
        f"{plural(len(declared.missing), 'tensor')} without a valid entry in {ASCEND_NAME}",
        hint="vllm-ascend raises KeyError; convert it to ascend: quarkconv writes an entry for every tensor",
    )
    yield from FindingsAbout(
        "description-mismatch",
        declared.absent,
        f"{plural(len(declared.absent), 'tensor')} listed in {ASCEND_NAME} but not stored",
        hint="download the checkpoint again, if these tensors belong to the model",
    )
    mixed = list(_mixed(declared, checkpoint))
    yield from FindingsAbout(
        "description-mismatch",
        mixed,
        f"{plural(len(mixed), 'linear')} that engines merge from parts of several types",
        hint="vllm-ascend refuses them; quantize all parts or none",
    )


def with_other_description(found: Finding, checkpoint: Checkpoint) -> Finding:
    """A finding; that of a missing config names a description of older versions of msModelSlim, which have its type.

    ``quant_model_description_w8a8_dynamic.json`` has the same content (``compress_tools.py`` of msmodelslim 26.1).
    """
    if found.code != "quant-config-missing":
        return found
    start = ASCEND_NAME.removesuffix(".json")
    others = [path.name for path in checkpoint.files() if len(path.parts) == 1 and path.name.startswith(f"{start}_")]
    return replace(found, hint=f"rename {others[0]} to {ASCEND_NAME}: engines read that name") if others else found


def _mixed(declared: AscendScheme, checkpoint: Checkpoint) -> Iterator[str]:
    """Linears that engines merge from parts of different types."""
    heads = {
        name.removesuffix(f".{parts[0]}.weight"): parts
        for name in checkpoint.types
        for parts in MERGED
        if name.endswith(f".{parts[0]}.weight")
    }
    for head, parts in heads.items():
        kinds = {declared.kind(f"{head}.{part}") for part in parts} - {None}
        if len(kinds) > 1:
            yield f"{head}.{parts[0]}"
