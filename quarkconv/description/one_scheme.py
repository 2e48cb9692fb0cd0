"""Findings where a checkpoint is not of one INT8 scheme, or not a mixture of experts."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Final

from quarkconv.experts.topology import Topology
from quarkconv.findings import NOT_UNDERSTOOD, Finding, FindingsAbout, Severity, finding
from quarkconv.scheme.declared import DeclaredScheme, UnknownScheme
from quarkconv.scheme.formats.undeclared import UndeclaredScheme
from quarkconv.scheme.resolved import ResolvedModules
from quarkconv.scheme.spec import PTPC_NAME, TensorSpec
from quarkconv.text import plural

_INT8_ONLY: Final = "quarkconv converts symmetric INT8 W8A8 only"
_SUPPORTED: Final = (
    "supported: symmetric int8 weights per channel or per tensor with int8 activations per token, or both per tensor "
    "and static"
)


def scheme_findings(
    declared: DeclaredScheme | None,
    modules: ResolvedModules,
    topology: Topology,
    is_mtp: Callable[[str], bool],
    fp8: frozenset[str],
    blocks: FindingsAbout,
) -> Iterator[Finding]:
    """The findings about the scheme of the whole checkpoint.

    Args:
        declared: the scheme that the config declares.
        modules, topology: the modules, with the scheme of each, and the experts among them.
        is_mtp: a test of names, see :func:`quarkconv.description.mtp.mtp_test`.
        fp8: the modules in FP8 that some target keeps.
        blocks: of :func:`quarkconv.description.other_scales.in_blocks`.
    """
    schemes = modules.schemes
    foreign = {
        name: form.weight.dtype
        for (form, _), group in modules.groups.items()
        if not form.quantized and not form.is_float
        for name in group
        if name not in fp8
    }
    other = sorted(set(foreign.values()))
    if other:
        only_mtp = all(map(is_mtp, foreign))
        yield from FindingsAbout(
            "scheme-unsupported",
            list(foreign),
            f"{plural(len(foreign), 'module')} stored in {', '.join(other)}",
            hint="all of these are in multi-token prediction layers: --mtp drop leaves those out"
            if only_mtp
            else _INT8_ONLY,
        )
    elif blocks.subjects:
        yield from blocks
    elif not schemes and declared is not None:
        kind = declared.default.weight.dtype if declared.default.weight else declared.method
        by_option = isinstance(declared, UndeclaredScheme)
        yield finding(
            "scheme-unsupported",
            declared.subject,
            f"{'--scheme' if by_option else declared.file} declares {kind}, but nothing is stored in int8",
            hint="convert with --quantize all, without --scheme" if by_option else _INT8_ONLY,
        )
    by_name = any(claim.is_foreign for _, claim in modules.groups)  # reported as such; they have no activation
    unnamed = [
        scheme
        for scheme in schemes
        if scheme not in modules.names and scheme.weight is not None and not (by_name and scheme.activation is None)
    ]
    if unnamed and declared is not None and not blocks.subjects:
        count = sum(schemes[scheme] for scheme in unnamed)
        message = f"{plural(count, 'int8 module')} with {_shown(unnamed[0].weight)} weights and "
        message += f"{_shown(unnamed[0].activation)} activations: an unsupported scheme"
        hint = _SUPPORTED
        if isinstance(declared, UnknownScheme):
            message = f"{plural(count, 'int8 module')} under the unsupported quant_method {declared.method}"
            hint = f"--scheme {PTPC_NAME} converts it, if scales are per row and activations quantized per token"
        yield finding("scheme-unsupported", declared.subject, message, hint=hint, count=count)
    names_found = sorted({modules.names[scheme] for scheme in schemes if scheme in modules.names})
    if len(names_found) > 1:
        subject = "config.json" if declared is None else declared.subject
        yield finding("mixed-scheme", subject, f"The int8 modules use {' and '.join(names_found)}")
    if not topology.members and not any(item.code == NOT_UNDERSTOOD for item in topology.findings):
        quantized = bool(schemes)
        yield finding(
            "not-moe",
            "config.json",
            "The checkpoint has no routed experts",
            hint="engines load a dense Quark export as it is; quarkconv converts and verifies mixtures of experts"
            if quantized
            else "quarkconv handles INT8 mixtures of experts",
            severity=Severity.WARNING if quantized else Severity.ERROR,
        )


def _shown(spec: TensorSpec | None) -> str:
    if spec is None:
        return "float"
    words = ("dynamic" if spec.dynamic else "static", "" if spec.symmetric else "asymmetric", spec.granularity)
    return " ".join([spec.dtype, *filter(None, words)])
