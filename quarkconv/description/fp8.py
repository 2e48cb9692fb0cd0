"""Linears in FP8 beside experts in INT8: those that a group of a compressed-tensors config expresses.

The weight is F8_E4M3 [out, in] with one scale, or with one for each row. Activations are FP8 too: quantized per token,
or by one stored scale. Source: ``_is_fp8_w8a8`` in vLLM 0.33 (``compressed_tensors.py``).
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from math import prod
from typing import Final, NamedTuple

from quarkconv.findings import Finding, finding
from quarkconv.scheme.resolved import ResolvedModules
from quarkconv.scheme.spec import FP8_PER_TOKEN, FP8_STATIC, PER_CHANNEL, ModuleScheme, TensorSpec
from quarkconv.scheme.stored import SCALE_DTYPES, Form
from quarkconv.text import plural

FP8_DTYPE: Final = "F8_E4M3"


class Fp8Group(NamedTuple):
    """Linears that are quantized to FP8 alike.

    Attributes:
        per_channel: a scale for each row of the weight; else one for the weight.
        static: activations have a stored scale; else one for each token.
        modules: their names, in the order of the files.
    """

    per_channel: bool
    static: bool
    modules: tuple[str, ...]


def fp8_groups(modules: ResolvedModules, experts: Collection[str]) -> tuple[Fp8Group, ...]:
    """The FP8 linears of a checkpoint with INT8 modules.

    Args:
        modules: every module, stored and declared.
        experts: names of the routed experts, which are left out.
    """
    if not modules.schemes:
        return ()
    found: dict[tuple[bool, bool], list[str]] = {}
    for (form, claim), names in modules.groups.items():
        if form.weight.dtype == FP8_DTYPE and _is_expressible(form, claim):
            key = (form.granularity == PER_CHANNEL, form.input_scale is not None)
            found.setdefault(key, []).extend(name for name in names if name not in experts)
    return tuple(Fp8Group(*key, tuple(names)) for key, names in found.items() if names)


def fp8_findings(groups: tuple[Fp8Group, ...]) -> Iterator[Finding]:
    """That some linears are in FP8, and which targets keep them."""
    names = [name for group in groups for name in group.modules]
    if names:
        yield finding(
            "mixed-precision",
            names[0],
            f"{plural(len(names), 'linear')} in FP8 beside the INT8 experts: {', '.join(names[:3])}"
            + (", ..." if len(names) > 3 else ""),
            hint="convert it to compressed-tensors or fused-int8: the other targets have one scheme for all modules",
            count=len(names),
        )


def _is_expressible(form: Form, claim: ModuleScheme) -> bool:
    """Whether the tensors are those of the declared scheme, and a group can say it."""
    if len(form.weight.shape) != 2 or form.granularity is None or form.scale is None:
        return False
    if form.zero_point or form.input_zero_point or form.offset or form.scale.dtype not in SCALE_DTYPES:
        return False
    static = form.input_scale
    if static is not None and (prod(static.shape) != 1 or static.dtype not in SCALE_DTYPES):
        return False
    weight = TensorSpec("fp8_e4m3", form.granularity, symmetric=True, dynamic=False)
    return claim == ModuleScheme(weight, FP8_PER_TOKEN if static is None else FP8_STATIC)
