"""The result of ``inspect``: contents, contradictions, possible targets, engines."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final, NamedTuple

from quarkconv.description.contradictions import is_linear
from quarkconv.description.description import Description, described
from quarkconv.errors import QuarkconvError
from quarkconv.experts.function import Unknown
from quarkconv.experts.knowledge import knowledge_by_stack, layer_activation, layer_routing
from quarkconv.findings import DISAGREEING, IDENTITIES, Finding, Severity
from quarkconv.headers.checkpoint import open_checkpoint
from quarkconv.hub.locate import locate
from quarkconv.inspection.advice import Advice, advice
from quarkconv.inspection.engine_facts import EngineFact
from quarkconv.inspection.engines import engines_for, stored_form
from quarkconv.progress import SILENT, Progress
from quarkconv.scheme.formats.undeclared import UndeclaredScheme
from quarkconv.scheme.spec import ModuleScheme, TensorSpec
from quarkconv.targets import TARGETS
from quarkconv.targets.base import Int8Count, Target, count_int8
from quarkconv.targets.changes import target_findings
from quarkconv.targets.convertible import check_convertible
from quarkconv.text import plural

_NOT_LOADED: Final = frozenset({"quantizer-names", "file-conflict", IDENTITIES})
"""Warnings about checkpoints that engines do not load unconverted."""
_NEVER_LOADED: Final = DISAGREEING | {"merged-mixed", "wrapped-names", "norm-biases", "linear-biases"}
"""Warnings about checkpoints that engines do not load, converted or not."""
_NOT_READ: Final = {
    "tensors of unknown meaning": {"tensor-unrecognised", "companion-unknown"},
    "scales of outputs and of the key-value cache": {"output-scales"},
    "files that the index does not list": {"file-unused"},
    "files that are not shards of the model": {"file-conflict"},
}
"""Parts of a checkpoint that no comparison covers -> the findings that name them."""
SCHEMA: Final = "quarkconv.inspect/1"


class TargetSupport(NamedTuple):
    """Whether a checkpoint can be converted to a target.

    Attributes:
        nbytes: size of the tensors after conversion.
        reason: why it cannot be converted.
        losses: settings and tensors that the target does not keep, as findings.
    """

    supported: bool
    nbytes: int | None = None
    reason: str | None = None
    losses: tuple[Finding, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """The fields of the contract, and ``findings`` where something is lost."""
        if not self.supported:
            return {"supported": False, "reason": self.reason}
        lost = {"findings": [asdict(loss) for loss in self.losses]} if self.losses else {}
        return {"supported": True, "bytes": self.nbytes, **lost}


class Inspection(NamedTuple):
    """The result of ``inspect``.

    Attributes:
        model: the model as the user named it.
        description: everything that headers and config say.
        findings: those of the description and, after a deep inspection, those of scales and zero points.
        targets: target -> whether the checkpoint can be converted to it.
        engines: what engines do with it, best first.
        deep: whether scales and zero points were read.
    """

    model: str
    description: Description
    findings: tuple[Finding, ...]
    targets: dict[str, TargetSupport]
    engines: tuple[EngineFact, ...]
    deep: bool = False

    @property
    def not_checked(self) -> tuple[str, ...]:
        """Parts that this inspection did not check."""
        missed = [] if self.deep else ["scales and zero points (--deep reads them)"]
        found = {item.code for item in self.findings}
        missed += [what for what, codes in _NOT_READ.items() if not found.isdisjoint(codes)]
        if any(item.code == "scale-invalid" and item.severity is Severity.WARNING for item in self.findings):
            missed.append("codes of rows whose scale is 0 (verify reads them)")
        if settings := self.description.unchecked_settings:
            missed.append(f"other settings of the quantization ({', '.join(settings)})")
        if not self.description.moe_layers:
            missed.append("the function of the model (no experts were recognised)")
        unknown = unknown_functions(self.description)
        return (*missed, *dict.fromkeys(f"{what} ({found.reason})" for what, found in unknown))

    @property
    def headline(self) -> str:
        """The verdict in one line."""
        if not self.ok:
            codes = dict.fromkeys(item.code for item in self.findings if item.severity is Severity.ERROR)
            count = sum(item.severity is Severity.ERROR for item in self.findings)
            return f"{plural(count, 'error')}: {', '.join(codes)}"
        layers = self.description.moe_layers
        sizes = sorted({layer.experts for layer in layers})
        least = f"{sizes[0]} to " if len(sizes) > 1 else ""
        experts = (
            f"{plural(len(layers), 'MoE layer')} of {least}{plural(sizes[-1], 'expert')}" if layers else "no MoE layers"
        )
        held = f"{self.scheme or 'no INT8 scheme'}, {experts}"
        disagreeing = dict.fromkeys(item.code for item in self.findings if item.code in DISAGREEING)
        if disagreeing:
            return f"Config and tensors disagree ({', '.join(disagreeing)}): {held}"
        if isinstance(self.description.declared, UndeclaredScheme):
            return f"Read from the tensors, without a quantization_config: {held}"
        if self.not_checked or any(item.code in _NEVER_LOADED for item in self.findings):
            return f"Config and tensors agree: {held}"
        return f"Sound: config, tensors, scales and zero points agree ({held})"

    @property
    def ok(self) -> bool:
        """True when nothing of severity ``error`` was found."""
        return all(item.severity is not Severity.ERROR for item in self.findings)

    @property
    def scheme(self) -> str | None:
        """The scheme of the modules that are stored quantized."""
        return self.description.scheme

    @property
    def advice(self) -> tuple[Advice, ...]:
        """For each engine that runs it: as it is, or what to convert it to."""
        return advice(stored_form(self.description), self.engines)

    def to_json(self) -> dict[str, Any]:
        """The object that ``inspect --json`` prints."""
        description = self.description
        declared = description.declared
        default = declared.default if declared else ModuleScheme()
        main = main_scheme(description)
        return {
            "schema": SCHEMA,
            "model": self.model,
            "quant_method": declared.method if declared else None,
            "producer_version": declared.version if declared else None,
            "scheme": self.scheme,
            "declared": None
            if declared is None
            else {"weight": _spec(default.weight), "activation": _spec(default.activation)},
            "weight": _spec(main.weight),
            "activation": _spec(main.activation),
            "moe": _moe(description),
            "linear": linear_counts(description),
            "tensors": len(description.checkpoint.types),
            "bytes": description.checkpoint.tensor_bytes,
            "shards": len(description.checkpoint.shards),
            "findings": [asdict(item) for item in self.findings],
            "targets": {name: support.to_json() for name, support in self.targets.items()},
            "engines": [fact.to_json() for fact in self.engines],
        }


def inspect_checkpoint(model: str | Path, *, deep: bool = False, progress: Progress = SILENT) -> Inspection:
    """Inspect a checkpoint from its headers.

    Args:
        model: directory or Hub repo id.
        deep: also read scales and zero points, never weights.
        progress: receives how far reading has come.

    Raises:
        SourceError: the checkpoint cannot be read at all.
    """
    description = described(open_checkpoint(locate(model, progress=progress).files, progress))  # of any format
    extra: tuple[Finding, ...] = ()
    if deep:
        from quarkconv.inspection.deep import deep_findings

        extra = tuple(deep_findings(description, progress))
    return make_inspection(str(model), description, extra, deep=deep)


def make_inspection(
    model: str, description: Description, extra: tuple[Finding, ...] = (), *, deep: bool = False
) -> Inspection:
    """Add targets and engines to a description.

    Args:
        model: the model as the user named it.
        description: its headers and config.
        extra: findings of a deep inspection.
        deep: whether scales and zero points were read.
    """
    modules = count_int8(description)
    stops = next((item for item in extra if item.severity is Severity.ERROR), None)
    targets = {name: _support(description, target, modules, stops) for name, target in TARGETS.items()}
    findings = sorted((*description.findings, *extra), key=lambda item: list(Severity).index(item.severity))
    possible = {name for name, support in targets.items() if support.supported}
    contradicted = any(item.severity is Severity.ERROR or item.code in _NOT_LOADED for item in findings)
    contradicted = contradicted or bool(description.unchecked_settings)
    if any(item.code in _NEVER_LOADED for item in findings):
        possible, contradicted = set(), True
    unusual = (unknown for _, unknown in unknown_functions(description) if not unknown.missing)
    known = next(unusual, None) is None
    engines = engines_for(description, possible, contradicted=contradicted, known=known)
    return Inspection(model, description, tuple(findings), targets, tuple(engines), deep)


def unknown_functions(description: Description) -> Iterator[tuple[str, Unknown]]:
    """What is not known of the layers' functions, which no comparison of tensors and config shows, and why."""
    known_of = knowledge_by_stack(description.checkpoint.config)
    for layer in description.moe_layers:
        known = known_of(layer.moe)
        activation, routing = layer_activation(known, layer), layer_routing(known, layer)
        if isinstance(activation, Unknown):
            yield "the function of the experts", activation
        elif isinstance(routing, Unknown):
            yield "the routing", routing


def main_scheme(description: Description) -> ModuleScheme:
    """The scheme of most quantized modules."""
    return next((scheme for scheme, _ in description.schemes.most_common(1)), ModuleScheme())


def linear_counts(description: Description) -> dict[str, int]:
    """Linears outside the routed experts, in int8 and in float; other formats count as neither."""
    counts = {"int8": 0, "unquantized": 0}
    for (form, _), modules in description.others.items():
        if form.quantized or form.is_float:
            linears = sum(is_linear(module, form) for module in modules)
            counts["int8" if form.quantized else "unquantized"] += linears
    return counts


def _support(
    description: Description, target: Target, modules: Sequence[Int8Count], stops: Finding | None
) -> TargetSupport:
    """Whether a target is possible; ``stops`` is the finding about values at which a conversion stops."""
    try:
        check_convertible(description, target)
    except QuarkconvError as error:
        return TargetSupport(False, reason=error.message)
    if stops is not None:
        return TargetSupport(False, reason=f"Conversion stops at values ({stops.code}): {stops.message}")
    nbytes, losses = target.output_bytes(description, modules), target_findings(description, target)
    return TargetSupport(True, nbytes=nbytes, losses=losses)


def _moe(description: Description) -> dict[str, Any] | None:
    layers = description.moe_layers
    if not layers:
        return None
    numbers = [layer.index for layer in layers]
    return {
        "layers": numbers if len(set(numbers)) == len(numbers) else [layer.prefix for layer in layers],
        "experts": layers[0].experts,
        "top_k": description.config.top_k,
        "hidden_size": layers[0].hidden,
        "intermediate_size": layers[0].intermediate,
        "layout": layers[0].layout,
        "activation_function": description.config.activation,
    }


def _spec(spec: TensorSpec | None) -> dict[str, object] | None:
    return None if spec is None else spec.to_json()
