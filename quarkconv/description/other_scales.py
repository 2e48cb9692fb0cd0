"""Scales of int8 weights that are not named ``weight_scale``: those of blocks, and those under an unknown name.

Weights with such scales are unsupported, not damaged. Other tools name the scales of rows ``SCB`` (bitsandbytes, the
largest value of a row: 127 scales), ``scale`` (DeepSeek's own inference code), ``qscale_weight`` (Mistral's format) or
``gate_up_proj_weight_scale`` (scripts that fuse experts).
"""

from __future__ import annotations

from collections.abc import Iterator
from math import prod
from typing import Final

from quarkconv.dtypes import FLOAT_DTYPES
from quarkconv.findings import FindingsAbout
from quarkconv.scheme.companions import OUTPUT_SCALES
from quarkconv.scheme.declared import DeclaredScheme, UnknownScheme
from quarkconv.scheme.form import BLOCK_SCALE, Form, fused_names, linear_names
from quarkconv.scheme.resolved import ResolvedModules
from quarkconv.scheme.stored import StoredModules
from quarkconv.text import plural

_OTHERS: Final = (".bias", "_bias", BLOCK_SCALE)
"""Ends of the names of tensors beside a weight that are not scales of rows."""


def in_blocks(stored: StoredModules, modules: frozenset[str]) -> FindingsAbout:
    """The finding about modules whose scales are named weight_scale_inv, with the shapes of the first."""
    names, shapes = sorted(modules), ""
    if names and (form := stored.linears.get(names[0])) is not None:
        scale = stored.tensors[f"{names[0]}{BLOCK_SCALE}"]
        shapes = f"; the first is {list(scale.shape)} for a weight {list(form.weight.shape)}"
    return FindingsAbout(
        "scheme-unsupported",
        names,
        f"{plural(len(names), 'module')} with scales named weight_scale_inv, the name of block scales{shapes}",
        hint="quarkconv converts weights with a scale for each row, or one for the tensor, named weight_scale",
    )


def scales_under_other_names(modules: ResolvedModules, stored: StoredModules) -> dict[str, str]:
    """Int8 module without ``weight_scale`` -> a tensor of floats beside its weight, as many as it has rows."""
    without = {
        name: form
        for (form, claim), names in modules.groups.items()
        if form.quantized and form.scale is None and not claim.is_foreign
        for name in names
    }
    if not without:
        return {}
    fused = [name for name in without if name in stored.fused]
    found: dict[str, str] = {}
    for name, kind in stored.tensors.items():
        module = next(_owners(name, without, fused), None)
        if module is None or module in found or kind.dtype not in FLOAT_DTYPES or name.endswith(_OTHERS):
            continue
        form = without[module]
        names = fused_names(module) if module in stored.fused else linear_names(module)
        if name not in names and not name.endswith(OUTPUT_SCALES) and prod(kind.shape) in (1, _rows(form)):
            found[module] = name
    return found


def under_other_names(renamed: dict[str, str], declared: DeclaredScheme | None) -> FindingsAbout:
    """The finding about the modules of :func:`scales_under_other_names`."""
    method = f" under quant_method {declared.method}" if isinstance(declared, UnknownScheme) else ""
    return FindingsAbout(
        "scheme-unsupported",
        sorted(renamed.values()),
        f"{plural(len(renamed), 'module')} in int8{method} without weight_scale; their scales may have another name",
        hint="if weight = code x these values, rename them to .weight_scale, or _scale for fused experts",
    )


def _owners(name: str, modules: dict[str, Form], fused: list[str]) -> Iterator[str]:
    """The modules that a tensor may belong to, by its name."""
    parent = name.rpartition(".")[0]
    for owner in (parent, parent.removesuffix(".weight")):
        if owner in modules:
            yield owner
    yield from (module for module in fused if name.startswith((f"{module}_", f"{module}.")))


def _rows(form: Form) -> int:
    return prod(form.weight.shape[:-1])
