"""Findings about the settings and tensors that a conversion changes or leaves out: nothing is dropped silently."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Final

from quarkconv.description.description import Description
from quarkconv.description.expert_names import identity_tensors
from quarkconv.description.quantized import QuantizedCheckpoint
from quarkconv.files.json_files import has_file
from quarkconv.findings import NOT_UNDERSTOOD, PASSED_ON, Finding, FindingsAbout, Severity, bounded, finding
from quarkconv.headers.file_names import MODELOPT_NAME
from quarkconv.targets.base import Target
from quarkconv.targets.settings import dropped_settings
from quarkconv.text import plural

_DEQUANTIZED: Final = "BF16"
_NUMBER: Final = re.compile(r"(?<=\.)\d+(?=\.)")
_KINDS: Final = 6
"""Kinds of modules that a finding names."""


def conversion_findings(description: Description, target: Target) -> Iterator[Finding]:
    """Findings about everything that a conversion leaves out, changes, or copies unread."""
    yield from (item for item in description.findings if item.code in PASSED_ON)
    yield from _changes(description, target)


def target_findings(description: Description, target: Target) -> tuple[Finding, ...]:
    """Findings about settings and tensors of the source that a target leaves out or changes."""
    return tuple(bounded(_changes(description, target)))


def _changes(description: Description, target: Target) -> Iterator[Finding]:
    yield from dropped_settings(description, target.name, kept=target.kept_settings(description))
    if has_file(description.checkpoint.store, MODELOPT_NAME):
        yield finding(
            "setting-dropped",
            MODELOPT_NAME,
            f"{MODELOPT_NAME} is left out: engines would read it if config.json declares nothing",
            hint="the output's own files declare its quantization",
        )
    yield from _renamed_experts(description, target)
    names = target.dropped(description)
    left_out = plural(len(names), "scale or zero point", "scales and zero points")
    yield from FindingsAbout("tensor-dropped", names, f"{left_out} of activations left out")
    names = identity_tensors(description.moe_layers, description.checkpoint.types)
    left_out = plural(len(names), "tensor")
    yield from FindingsAbout("tensor-dropped", names, f"{left_out} of experts that return their input left out")
    modules = target.float_modules(description)
    if modules and description.declared is not None and target.quantizes:
        every = len(modules) == len(description.float_modules)
        engines = "engines keep" if every else f"the engine of {target.name} keeps"
        yield from FindingsAbout(
            "module-dequantized",
            modules,
            f"{plural(len(modules), 'module')} that {engines} in float, dequantized to {_DEQUANTIZED} (rounded once)",
        )
    if isinstance(description.checkpoint, QuantizedCheckpoint):
        yield from _left_in_float(description)
    dropped = description.mtp_dropped
    if dropped is not None:
        held = f"{plural(len(dropped), 'tensor')}, first {dropped[0]}" if dropped else "none was stored"
        yield finding(
            "mtp-dropped",
            dropped[0] if dropped else "config.json",
            f"The multi-token prediction layers are left out: {held}",
            count=len(dropped),
        )


def _renamed_experts(description: Description, target: Target) -> Iterator[Finding]:
    """The warning about experts that are converted though nothing is known of them but their tensors."""
    if target.stacks or all(item.code != NOT_UNDERSTOOD for item in description.findings):
        return
    names = description.renamed_experts
    yield from FindingsAbout(
        NOT_UNDERSTOOD,
        names,
        f"{plural(len(names), 'module')} of unrecognised experts, converted under their own names",
        hint="not checked: whether an engine loads these names; verify --source compares every byte but no numbers",
        severity=Severity.WARNING,
    )


def _left_in_float(description: Description) -> Iterator[Finding]:
    """The linears and experts that ``--quantize`` leaves in float: routers, heads, and those that are excluded."""
    names = description.float_linears
    if names:
        kinds = list(dict.fromkeys(_NUMBER.sub("*", name) for name in names))
        yield finding(
            "left-in-float",
            names[0],
            f"{plural(len(names), 'linear')} not quantized: {', '.join(kinds[:_KINDS])}"
            + (", ..." if len(kinds) > _KINDS else ""),
            count=len(names),
        )
