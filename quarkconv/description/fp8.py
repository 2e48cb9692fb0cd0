"""Modules in FP8 beside experts in INT8: those that a group of a compressed-tensors config expresses.

The weight is F8_E4M3 [out, in] with one scale, with one for each row, or with one for each block of 128 x 128.
Activations are FP8 too: quantized per token, by one stored scale, or, with blocks, per token and 128 inputs. Blocks are
DeepSeek's format: ``weight_scale_inv`` [ceil(out / 128), ceil(in / 128)], which needs no config to be understood.
Source: ``_is_fp8_w8a8`` in vLLM 0.33 (``compressed_tensors.py``), for linears and experts.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from math import prod
from typing import Final, NamedTuple

from quarkconv.dtypes import TensorType
from quarkconv.experts.layer import MoELayer
from quarkconv.findings import Finding, FindingsAbout
from quarkconv.scheme.form import BLOCK_SCALE, SCALE_DTYPES, Form, linear_names
from quarkconv.scheme.resolved import ResolvedModules
from quarkconv.scheme.spec import BLOCK, FP8_PER_TOKEN, FP8_STATIC, PER_CHANNEL, ModuleScheme, TensorSpec
from quarkconv.scheme.stored import StoredModules
from quarkconv.text import plural

FP8_DTYPE: Final = "F8_E4M3"
BLOCK_SIZE: Final = 128
"""Rows and columns of a block."""


class Fp8Group(NamedTuple):
    """Modules that are quantized to FP8 alike.

    Attributes:
        strategy: what has a scale of its own: each ``channel`` (row of the weight), each ``block``, or the ``tensor``.
        static: activations have a stored scale; else one for each token, or for each token and block of inputs.
        modules: their names, in the order of the files.
        declared: whether the config declares them so.
    """

    strategy: str
    static: bool
    modules: tuple[str, ...]
    declared: bool = True


def fp8_groups(modules: ResolvedModules, stored: StoredModules, layers: Collection[MoELayer]) -> tuple[Fp8Group, ...]:
    """The FP8 modules of a checkpoint with INT8 modules. Of routed experts, those of layers that are FP8 as a whole.

    Args:
        modules: every module, stored and declared.
        stored: the tensors.
        layers: the MoE layers.
    """
    if not modules.schemes:
        return ()
    found: dict[tuple[str, bool, bool], list[str]] = {}
    for (form, claim), names in modules.groups.items():
        if form.weight.dtype == FP8_DTYPE and len(form.weight.shape) == 2:
            for name in names:
                if (kind := _kind(name, form, claim, stored)) is not None:
                    found.setdefault(kind, []).append(name)
    kinds = {name: kind for kind, names in found.items() for name in names}
    broken: set[str] = set()
    for layer in layers if kinds else ():
        experts = layer.module_names
        if len({kinds.get(name) for name in experts}) > 1:
            broken.update(experts)
    groups = ((*kind, tuple(name for name in names if name not in broken)) for kind, names in found.items())
    return tuple(Fp8Group(strategy, static, names, declared) for strategy, static, declared, names in groups if names)


def block_scale(name: str, types: Mapping[str, TensorType]) -> str:
    """The name of the scales of an FP8 module: ``weight_scale``, or DeepSeek's name for scales of blocks."""
    inverse = f"{name}{BLOCK_SCALE}"
    return inverse if inverse in types else linear_names(name).scale


def fp8_findings(groups: tuple[Fp8Group, ...], file: str) -> Iterator[Finding]:
    """The findings about modules in FP8, with the targets that keep them."""
    names = [name for group in groups for name in group.modules]
    yield from FindingsAbout(
        "mixed-precision",
        names,
        f"{plural(len(names), 'linear')} in FP8 beside the INT8 experts",
        hint="convert to compressed-tensors or fused-int8: other targets have one scheme for all modules",
    )
    undeclared = [name for group in groups if not group.declared for name in group.modules]
    yield from FindingsAbout(
        "dtype-mismatch",
        undeclared,
        f"{plural(len(undeclared), 'linear')} in FP8 that {file} does not declare in FP8",
        hint="convert to compressed-tensors or fused-int8: quarkconv writes a config that matches",
    )


def _kind(name: str, form: Form, claim: ModuleScheme, stored: StoredModules) -> tuple[str, bool, bool] | None:
    """Strategy, whether activations are static, and whether it is declared; None for what no group expresses."""
    if any(form.zero_points):
        return None
    in_blocks = claim.weight is not None and (claim.weight.dtype, claim.weight.granularity) == ("fp8_e4m3", BLOCK)
    types = stored.tensors
    scales = types.get(f"{name}{BLOCK_SCALE}") or (form.scale if in_blocks else None)
    if scales is not None:
        blocks = tuple(-(-size // BLOCK_SIZE) for size in form.weight.shape)
        fits = scales.shape == blocks and scales.dtype in SCALE_DTYPES and form.input_scale is None
        return ("block", False, in_blocks) if fits else None
    if form.granularity is None or form.scale is None or form.scale.dtype not in SCALE_DTYPES:
        return None
    static = form.input_scale
    if static is not None and (prod(static.shape) != 1 or static.dtype not in SCALE_DTYPES):
        return None
    weight = TensorSpec("fp8_e4m3", form.granularity, symmetric=True, dynamic=False)
    if claim != ModuleScheme(weight, FP8_PER_TOKEN if static is None else FP8_STATIC):
        return None
    return ("channel" if form.granularity == PER_CHANNEL else "tensor"), static is not None, True
