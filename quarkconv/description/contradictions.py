"""The contradictions between stored tensors and config.json."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator

from quarkconv.description.expert_names import is_of_adapter
from quarkconv.description.int8_modules import CONVERT, int8_defects
from quarkconv.description.one_scheme import scheme_findings
from quarkconv.description.other_scales import in_blocks, scales_under_other_names, under_other_names
from quarkconv.description.parameters import is_beside_packed, packed_weights, unknown_parameters
from quarkconv.dtypes import FLOAT_DTYPES
from quarkconv.experts.config import QUANTIZATION_KEY, ModelConfig
from quarkconv.experts.family import Family, FamilyOf
from quarkconv.experts.layer import MoELayer
from quarkconv.experts.ranks import Rank
from quarkconv.experts.topology import Topology
from quarkconv.findings import Finding, FindingsAbout, Severity, finding
from quarkconv.scheme.declared import DeclaredScheme, UnknownScheme
from quarkconv.scheme.form import BLOCK_SCALE, Form
from quarkconv.scheme.resolved import Groups, ResolvedModules
from quarkconv.scheme.spec import FLOAT
from quarkconv.scheme.stored import StoredModules
from quarkconv.text import plural


def is_linear(module: str, form: Form) -> bool:
    """True for a float weight that Quark would quantize: two dimensions, and neither an embedding nor an adapter."""
    leaf = module.rpartition(".")[2]
    is_matrix = len(form.weight.shape) == 2 and "embed" not in leaf and leaf not in ("wte", "wpe")
    return is_matrix and not is_of_adapter(module)


def contradictions(
    declared: DeclaredScheme | None,
    stored: StoredModules,
    modules: ResolvedModules,
    topology: Topology,
    others: Groups,
    family: FamilyOf,
    is_mtp: Callable[[str], bool],
    is_float: Callable[[str], bool],
    float_modules: tuple[str, ...],
    fp8: Collection[str],
) -> Iterator[Finding]:
    """The findings about the scheme of a checkpoint.

    Args:
        declared: the scheme that the config declares.
        stored, modules, topology: the modules, with the scheme of each, and the experts among them.
        others: the modules that are not routed experts.
        family: gives the family of models that a module belongs to; None where it is unknown.
        is_mtp: a test of names, see :func:`quarkconv.description.mtp.mtp_test`.
        is_float: a test of names, see :func:`quarkconv.description.float_modules.float_test`.
        float_modules: int8 modules that engines keep in float.
        fp8: the modules in FP8 that some target keeps.
    """
    yield from _config(declared, modules, stored)
    yield from _experts(declared, topology, is_mtp)
    if declared is not None and not isinstance(declared, UnknownScheme):
        yield from _linears(declared, modules, others, is_float)
    yield from _float_modules_quantized(float_modules, is_mtp)
    blocks = frozenset(name.removesuffix(BLOCK_SCALE) for name in stored.plain if name.endswith(BLOCK_SCALE))
    blocks = blocks.difference(fp8)
    renamed = scales_under_other_names(modules, stored)
    yield from int8_defects(modules, blocks.union(renamed), "config.json" if declared is None else declared.file)
    yield from under_other_names(renamed, declared)
    yield from scheme_findings(declared, modules, topology, is_mtp, frozenset(fp8), in_blocks(stored, blocks))
    if declared is None or declared.stores_codes:
        yield from _simulated(modules)
    unrecognised = [
        name
        for name in stored.unrecognised
        if not _of_the_model(name, family(name)) and not is_beside_packed(name, stored)
    ]
    yield from FindingsAbout(
        "tensor-unrecognised",
        unrecognised,
        f"{plural(len(unrecognised), 'tensor')} with codes or scales in unknown modules",
        hint="conversion copies them as they are; engines may drop them",
    )
    yield from packed_weights(stored, topology)
    yield from unknown_parameters(stored, topology)


def _simulated(modules: ResolvedModules) -> Iterator[Finding]:
    """Float weights with scales beside them, as tools store them that quantize in simulation only."""
    groups = [names for (form, _), names in modules.groups.items() if form.is_float and any(form.tensors[1:])]
    names = [name for group in groups for name in group]
    yield from FindingsAbout(
        "companion-unknown",
        names,
        f"{plural(len(names), 'float weight')} with scales or zero points: they may hold codes or values",
        hint="export the model again with int8 weights; engines look for these scales beside int8 weights only",
    )


def _of_the_model(name: str, family: Family | None) -> bool:
    """Whether a tensor is a parameter of the model that only looks like a quantizer's scale."""
    return family is not None and name.rpartition(".")[2] in family.own_scales


def scheme_implied() -> Finding:
    """The finding of a scheme that follows from the tensors, without a config."""
    return finding(
        "scheme-implied",
        "config.json",
        "config.json has no quantization_config; every int8 weight has an F32 scale for each row, as in ptpc_int8",
        hint="convert it: quarkconv writes a config; activations are then quantized per token",
    )


def other_quantizations(config: ModelConfig) -> Iterator[Finding]:
    """The finding about further quantization configs, which differ from the one that is read."""
    yield from FindingsAbout(
        "quant-config-invalid",
        [f"{part}.{QUANTIZATION_KEY}".lstrip(".") for part in config.other_quantizations],
        f"config.json has {plural(len(config.other_quantizations), 'more quantization config')} that differ",
        hint="engines read the top-level one; conversion writes only one",
        severity=Severity.WARNING,
    )


def rank_part(rank: Rank) -> Finding:
    """The finding of a checkpoint that holds one rank."""
    kind = "tensor" if rank.parallel == "tp" else "expert"
    return finding(
        "rank-part",
        "config.json",
        f"The checkpoint holds rank {rank.rank} of {rank.world_size} under {kind} parallelism; engines divide whole "
        "models themselves",
        hint="load them with quarkconv.load_fused_experts, or a loader of your own",
    )


def _config(declared: DeclaredScheme | None, modules: ResolvedModules, stored: StoredModules) -> Iterator[Finding]:
    if declared is None:
        message = "config.json has no quantization_config"
        yield finding("quant-config-missing", "config.json", message, hint=_next_step(modules, stored))
        return
    for problem in declared.problems:
        yield finding(
            "quant-config-invalid",
            ".".join(dict.fromkeys(("quantization_config", problem.field))),
            f"Expected {problem.expected}, found {problem.found}",
        )


def _next_step(modules: ResolvedModules, stored: StoredModules) -> str:
    """What to do with a checkpoint that declares no scheme."""
    if any(form.quantized for form, _ in modules.groups):
        return "the weights are int8: restore the export's config.json, or convert with --scheme ptpc_int8"
    dtypes = {form.weight.dtype for form, _ in modules.groups if not form.is_float}
    dtypes |= {stored.tensors[name].dtype for name in stored.unrecognised}.difference(FLOAT_DTYPES)
    if dtypes:
        return f"tensors are stored in {', '.join(sorted(dtypes))}: restore the export's config.json"
    return "nothing is quantized: convert with --quantize all"


def _experts(declared: DeclaredScheme | None, topology: Topology, is_mtp: Callable[[str], bool]) -> Iterator[Finding]:
    """Layers whose experts, all or some, are stored in float."""
    if declared is None or isinstance(declared, UnknownScheme):
        return
    excluded = []
    for layer in topology.layers:
        missing = layer.float_experts()
        if not missing:
            module = next(module for _, _, module in layer.modules())
            if declared.resolve_expert(layer.prefix, module) == FLOAT != declared.resolve(module):
                excluded.append(layer.prefix)
            continue
        claims = {declared.resolve_expert(layer.prefix, module) for module in _float_modules(layer)}
        if missing < layer.experts or layer.partly_quantized:
            part = "" if missing < layer.experts else " in some projections"
            yield finding(
                "experts-not-quantized",
                layer.prefix,
                f"{missing} of {layer.experts} experts stored in float{part}, the others in int8",
                hint="quantize all experts of a layer, or leave all in float: engines do not run a mixed layer",
                count=missing,
            )
        elif claims == {FLOAT}:
            yield finding(
                "experts-excluded",
                layer.prefix,
                f"All {missing} experts are excluded from quantization and stored in float",
                count=missing,
            )
        else:
            dtype = next(form.weight.dtype for form in layer.all_forms if form.is_float)
            yield finding(
                "experts-not-quantized",
                layer.prefix,
                f"{declared.file} declares {missing} experts quantized, but all are stored in {dtype}",
                hint=f"{CONVERT}, or leaves these layers out with --mtp drop"
                if is_mtp(layer.prefix)
                else "convert with --quantize missing; Quark 0.13 skips 3-D experts in eager mode on transformers 5",
                count=missing,
            )
    yield from FindingsAbout(
        "excluded-but-quantized",
        excluded,
        f"{plural(len(excluded), 'layer')} of experts excluded by {declared.file} but stored in int8",
        hint=CONVERT,
    )


def _float_modules_quantized(names: tuple[str, ...], is_mtp: Callable[[str], bool]) -> Iterator[Finding]:
    """Int8 modules that no engine runs in int8; those of multi-token prediction matter for drafting tokens only."""
    yield from FindingsAbout(
        "float-module-quantized",
        names,
        f"{plural(len(names), 'module')} stored in int8 that engines keep in float",
        hint="convert it: conversion dequantizes them, with one rounding to BF16",
        severity=Severity.WARNING if all(map(is_mtp, names)) else None,
    )


def _float_modules(layer: MoELayer) -> Iterator[str]:
    for role, expert, module in layer.modules():
        forms = layer.forms[role]
        if forms[expert].is_float:
            yield module


def _linears(
    declared: DeclaredScheme,
    modules: ResolvedModules,
    others: Groups,
    is_float: Callable[[str], bool],
) -> Iterator[Finding]:
    """Linears for which config and tensors disagree."""
    claimed: list[str] = []
    excluded: list[str] = []
    for (form, claim), names in modules.groups.items():
        if form.is_float and claim.weight is not None and declared.lists_float:
            claimed += [name for name in others[form, claim] if is_linear(name, form) and not is_float(name)]
        elif form.quantized and claim.weight is None:
            excluded += names
    if declared.stores_codes:
        yield from FindingsAbout(
            "quantized-but-stored-float",
            claimed,
            f"{plural(len(claimed), 'module')} declared quantized by {declared.file} but stored in float",
            hint=CONVERT,
        )
    else:
        yield from FindingsAbout(
            "scheme-unsupported",
            claimed,
            f"{plural(len(claimed), 'module')} in float, to be quantized at load (weight_format is not real_quantized)",
            hint='export it again with weight_format="real_quantized"',
        )
    yield from FindingsAbout(
        "excluded-but-quantized",
        excluded,
        f"{plural(len(excluded), 'module')} excluded by {declared.file} but stored in int8",
        hint=CONVERT,
    )
