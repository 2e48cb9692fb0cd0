"""Experts that make no layer: under names that no row of ``NAMINGS`` has, or in a layout that is not read.

Targets that write every module as it is stored need to know nothing of an expert but its own tensors.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator
from itertools import chain
from typing import Final

from quarkconv.experts.naming import EXPERTS
from quarkconv.findings import NOT_UNDERSTOOD, Finding, FindingsAbout, finding
from quarkconv.scheme.form import Form
from quarkconv.scheme.stored import StoredModules
from quarkconv.text import plural

RENAMED_HINT: Final = (
    "targets that write modules one by one convert them; fused-int8 does not, and numbers are not checked"
)
"""The next step for experts that are modules of their own."""
_UNREADABLE_HINT: Final = "quarkconv cannot convert tensors of unknown meaning"

_PACKED: Final = frozenset(
    {"qweight", "qzeros", "g_idx", "weight_packed", "weight_shape", "bitmask", "compressed", "_data", "_weight_qdata"}
)
"""Last parts of names that belong to weights in other forms: of GPTQ and AWQ, compressed-tensors, quanto, torchao."""

_SUFFIX: Final = f".{EXPERTS}"
_INSIDE: Final = f".{EXPERTS}."
_GGUF: Final = "_exps."
"""The experts of a layer in the names of GGUF: ``blk.3.ffn_gate_exps.weight``. In those of kt-kernel the numbers of an
expert and of a NUMA node follow: ``blk.3.ffn_gate_exps.7.numa.0.weight``."""
_NODE: Final = ".numa."
_NUMBERED: Final = re.compile(r"\.(?!shared)\w*experts?(?:\w*[._])?\d+\.")
"""An expert of a number, under any name: ``local_experts.3.``, ``expert_list.3.``, ``expert_3.``."""


def names_not_understood(
    stored: StoredModules, others: Iterable[str], known: Collection[str], config_experts: int | None
) -> list[str]:
    """The modules and tensors of routed experts that have unknown names.

    Args:
        stored: the modules of the checkpoint.
        others: those among which they are looked for.
        known: those whose names are understood, all but ``others``.
        config_experts: number of routed experts that the config claims, if it does.
    """
    names = [module for module in others if module in stored.linears and "exp" in module and _is_expert(module)]
    names += [
        name
        for name in chain(stored.plain, stored.vectors)
        if (_INSIDE in name or name.endswith(_SUFFIX) or _GGUF in name)
        and (owner := name.rpartition(".")[0]) not in stored.linears  # else the bias of a module that is named itself
        and not any(map(known.__contains__, (name, owner, name.removesuffix("_bias"))))
    ]
    if not names and not known and config_experts is not None and config_experts > 1:
        # Nothing is named like an expert: int8 weights of all experts of a layer have three dimensions.
        names = [name for name, form in stored.linears.items() if form.quantized and len(form.weight.shape) == 3]
    return names


def unread_findings(
    stored: StoredModules, names: list[str], known: Collection[str], config_experts: int | None
) -> Iterator[Finding]:
    """Experts with unknown names, and experts that config.json declares without stored tensors.

    Args:
        stored, known, config_experts: as for :func:`names_not_understood`.
        names: what it returns.
    """
    message = f"{plural(len(names), 'module or tensor', 'modules or tensors')} of experts with unknown names"
    if known:
        hint = "conversion treats int8 modules as ordinary linears and copies the rest; engines may drop them"
        yield from FindingsAbout("tensor-unrecognised", names, message, hint=hint)
    elif packed := sorted(_PACKED.intersection(name.rpartition(".")[2] for name in names)):
        message = f"{plural(len(names), 'tensor')} of experts in a packed format ({', '.join(packed)})"
        yield from FindingsAbout(NOT_UNDERSTOOD, names, message, hint="quarkconv converts symmetric INT8 W8A8 only")
    elif any(_GGUF in name and _NODE in name for name in names):
        message = f"{plural(len(names), 'tensor')} of experts packed for CPUs, by the names of kt-kernel"
        hint = "only KTransformers reads them: give the checkpoint before packing"
        yield from FindingsAbout(NOT_UNDERSTOOD, names, message, hint=hint)
    elif names:
        hint = RENAMED_HINT if are_modules(stored, names) else _UNREADABLE_HINT
        yield from FindingsAbout(NOT_UNDERSTOOD, names, message, hint=hint)
    elif config_experts is not None and config_experts > 1:
        yield finding(
            NOT_UNDERSTOOD,
            "config.json",
            f"config.json declares {config_experts} routed experts per layer, but no tensor is named like one",
            hint="quarkconv cannot tell which tensors are the experts",
        )


def are_modules(stored: StoredModules, names: Collection[str]) -> bool:
    """Whether experts are linears in int8, or in int8 and in float, beside which only vectors of floats are stored."""
    forms = [stored.linears.get(name) or Form(stored.tensors[name]) for name in names]
    return any(form.quantized for form in forms) and all(
        (form.quantized or form.is_float) if name in stored.linears else form.is_float and len(form.weight.shape) < 2
        for name, form in zip(names, forms, strict=True)
    )


def _is_expert(module: str) -> bool:
    """Whether the name of a module is that of routed experts: inside ``experts``, numbered, or GGUF's."""
    return _INSIDE in module or _GGUF in f"{module}." or _NUMBERED.search(module) is not None
