"""A checkpoint described: what it stores, what its config declares, and the contradictions between the two.

Headers, scheme and experts come together here. Targets, plans and reports work on a :class:`Description` only.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from quarkconv.description.ascend import ascend_findings, with_other_description
from quarkconv.description.contradictions import (
    contradictions,
    is_linear,
    other_quantizations,
    rank_part,
    scheme_implied,
)
from quarkconv.description.disagreements import disagreements, merged_findings
from quarkconv.description.expert_names import expert_name_findings, identity_experts, wrapped_names
from quarkconv.description.float_modules import (
    engine_test,
    float_test,
    quantized_float_modules,
    quantized_float_modules_of,
)
from quarkconv.description.fp8 import Fp8Group, fp8_findings, fp8_groups
from quarkconv.description.function import function_findings, with_companions
from quarkconv.description.int8_modules import shapes_explained
from quarkconv.description.missing import linear_biases, missing_parts, norm_biases, shared_among_routed
from quarkconv.description.mtp import mtp_test, without_mtp
from quarkconv.description.output_scales import output_scale_findings
from quarkconv.errors import UsageError
from quarkconv.experts.config import ModelConfig, model_config
from quarkconv.experts.knowledge import families, float_in_one_engine
from quarkconv.experts.layer import Layout, MoELayer
from quarkconv.experts.naming import ENGINE_NAMES, FUSED_LEAVES, STACKED_MODEL_TYPES, ExpertNaming
from quarkconv.experts.topology import Topology, expert_topology
from quarkconv.experts.unread import are_modules
from quarkconv.files.base import Files
from quarkconv.files.json_files import has_file
from quarkconv.findings import OTHER_FORMAT, Finding, Severity, bounded, refusal
from quarkconv.headers.checkpoint import Checkpoint, open_checkpoint
from quarkconv.headers.collector import collector_paused
from quarkconv.headers.file_names import CONFIG_NAME, MODELOPT_NAME
from quarkconv.progress import SILENT, Progress
from quarkconv.scheme.declared import DeclaredScheme, ModelOptScheme, UnknownScheme
from quarkconv.scheme.formats.ascend import AscendScheme
from quarkconv.scheme.formats.readers import declared_scheme
from quarkconv.scheme.formats.undeclared import UndeclaredScheme, leaves_no_doubt
from quarkconv.scheme.options import DROP, KEEP, Mtp
from quarkconv.scheme.resolved import Groups, ResolvedModules, resolve_modules
from quarkconv.scheme.settings import unchecked_settings
from quarkconv.scheme.spec import INPUT_STATIC, MIXED, PTPC_NAME, ModuleScheme
from quarkconv.scheme.stored import StoredModules, stored_modules

NameTest = Callable[[str], bool]


@dataclass(frozen=True, slots=True)
class Description:
    """The headers and the config of a checkpoint, understood.

    Attributes:
        checkpoint: the files.
        config: the model by config.json.
        declared: the scheme that it declares; None without a quantization_config.
        stored: the modules that have a weight.
        modules: the same, with the scheme of each.
        topology: the routed experts.
        others: the modules that are in no layer of experts, grouped as in ``modules``.
        findings: everything that is wrong or worth knowing, worst first.
        is_mtp: whether a tensor or module belongs to a layer of multi-token prediction.
        is_float: whether engines keep a linear in float.
        float_in_one_engine: the engine that alone keeps a linear in float; None where none does.
        float_modules: modules stored in int8 that engines keep in float; conversion dequantizes them.
        float_modules_of: engine -> modules stored in int8 that it alone keeps in float.
        mtp_dropped: tensors of layers of multi-token prediction that were left out; None where they are kept.
        fp8: modules in FP8 beside INT8 modules, which some targets keep.
    """

    checkpoint: Checkpoint
    config: ModelConfig
    declared: DeclaredScheme | None
    stored: StoredModules
    modules: ResolvedModules
    topology: Topology
    others: Groups
    findings: tuple[Finding, ...]
    is_mtp: NameTest = field(compare=False)
    is_float: NameTest = field(compare=False)
    float_in_one_engine: Callable[[str], str | None] = field(compare=False)
    float_modules: tuple[str, ...] = ()
    float_modules_of: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    mtp_dropped: tuple[str, ...] | None = None
    fp8: tuple[Fp8Group, ...] = ()

    @property
    def moe_layers(self) -> tuple[MoELayer, ...]:
        """The layers with routed experts, in order."""
        return self.topology.layers

    @property
    def int8_layers(self) -> tuple[MoELayer, ...]:
        """The layers whose routed experts are all stored in int8."""
        return tuple(layer for layer in self.topology.layers if layer.quantized)

    @property
    def renamed_experts(self) -> list[str]:
        """Experts that make no layer, where each is a linear that targets can write as it is; else none."""
        unread = self.topology.unread
        if not unread or not are_modules(self.stored, unread):
            return []
        return [name for name in self.stored.linears if name in unread]

    @property
    def float_linears(self) -> list[str]:
        """The linears that are stored in float, routed experts among them."""
        experts = self.topology.members | self.topology.unread
        return [name for name, form in self.stored if form.is_float and (name in experts or is_linear(name, form))]

    @property
    def unchecked_settings(self) -> list[str]:
        """The settings of quantization_config that may change the computation, and that nothing checks."""
        declared, quantization = self.declared, self.config.quantization
        if declared is None or isinstance(declared, UnknownScheme):
            return []
        cache = [] if declared.runs_cache else ["the key-value cache"]
        return [*unchecked_settings(declared.method, quantization, declared.kv_cache_modules), *cache]

    @property
    def schemes(self) -> Counter[ModuleScheme]:
        """How many modules are stored quantized in each scheme."""
        return self.modules.schemes

    @property
    def scheme(self) -> str | None:
        """The scheme of the int8 modules: a name, ``mixed``, or None where others than :attr:`fp8` are quantized."""
        kept = {name for group in self.fp8 for name in group.modules}
        for (form, _), modules in self.modules.groups.items():
            if not form.quantized and not form.is_float and not kept.issuperset(modules):
                return None
        names = {self.modules.names.get(scheme) for scheme in self.schemes}
        if len(names) > 1 and None not in names:
            return MIXED
        return names.pop() if len(names) == 1 else None

    @property
    def static(self) -> bool:
        """Whether int8 modules have static activation scales."""
        return any(scheme.activation == INPUT_STATIC for scheme in self.schemes)

    @property
    def engine_naming(self) -> ExpertNaming | None:
        """The names by which engines route fused experts, where the source's may be others."""
        return ENGINE_NAMES.get(self.config.model_type or "", (None, None))[1]

    def unfused_layout(self, layer: MoELayer) -> Layout:
        """How the unquantized model lays out the experts of a layer: one by one, or all in one in 3-key models."""
        stacked = layer.layout == "stacked" or self.config.model_type in STACKED_MODEL_TYPES
        return "stacked" if stacked else "per_expert"

    def errors(self) -> list[Finding]:
        """The findings of severity ``error``."""
        return [item for item in self.findings if item.severity is Severity.ERROR]


def describe(
    model: Path | Files, progress: Progress = SILENT, *, scheme: str | None = None, mtp: Mtp = KEEP
) -> Description:
    """Describe a checkpoint, from its headers and its config alone.

    Args:
        model: its directory, or its files.
        progress: counts the headers that were read.
        scheme: see :func:`described`.
        mtp: ``drop`` to leave out the layers of multi-token prediction, as if they were not stored.

    Raises:
        SourceError: the checkpoint cannot be read.
        UnsupportedError: its weights are in another format than safetensors; :func:`described` has this as a finding.
        UsageError: another ``scheme``, or the files declare one.
    """
    checkpoint, dropped = open_checkpoint(model, progress), None
    other_formats = (item for item in checkpoint.findings if item.code == OTHER_FORMAT)
    unsupported = refusal(other_formats, str(checkpoint.root), "model", "read")
    if unsupported is not None:
        raise unsupported
    if mtp == DROP:
        checkpoint, dropped = without_mtp(checkpoint)
    if scheme is not None:
        _check_scheme(scheme, checkpoint)
    return described(checkpoint, scheme=scheme, mtp_dropped=dropped)


def _check_scheme(scheme: str, checkpoint: Checkpoint) -> None:
    """Refuse a scheme of an unknown name, or beside one that the files declare."""
    if scheme != PTPC_NAME:
        raise UsageError("Invalid --scheme", expected=PTPC_NAME, found=scheme)
    declared = _declared(checkpoint, model_config(checkpoint.config))
    if declared is not None and not isinstance(declared, UnknownScheme):
        raise UsageError(
            "--scheme is for int8 weights whose scheme is not declared",
            file=f"{checkpoint.root}/{declared.file}",
            expected="no scheme, or one that is not read",
            found=f"a scheme, by {declared.method}",
            hint="leave --scheme out",
        )


def _declared(checkpoint: Checkpoint, config: ModelConfig) -> DeclaredScheme | None:
    """The scheme that the files declare."""
    declared = declared_scheme(config.quantization)
    if checkpoint.ascend is not None and (declared is None or isinstance(declared, UnknownScheme)):
        return AscendScheme(checkpoint.ascend, checkpoint.types)
    if declared is None and has_file(checkpoint.store, MODELOPT_NAME):
        return ModelOptScheme()
    return declared


def described(
    checkpoint: Checkpoint,
    declared: DeclaredScheme | None = None,
    *,
    scheme: str | None = None,
    mtp_dropped: tuple[str, ...] | None = None,
) -> Description:
    """Describe a checkpoint whose headers have been read.

    Args:
        checkpoint: the headers.
        declared: the scheme, instead of the one in the files.
        scheme: name of the scheme of all int8 modules, instead of what the files declare: ``ptpc_int8``.
        mtp_dropped: tensors of layers of multi-token prediction that were left out of it; None where they are kept.
    """
    with collector_paused():
        config = model_config(checkpoint.config)
        family = families(config.raw)
        stored = stored_modules(checkpoint.types, FUSED_LEAVES)
        declared = declared or _declared(checkpoint, config)
        topology = with_companions(
            expert_topology(stored, config.local_experts, config.hidden_layers, family, config.local_experts_of), stored
        )
        implied = scheme is None and declared is None and bool(checkpoint.config) and leaves_no_doubt(stored)
        if implied or scheme is not None:
            declared = UndeclaredScheme(stored)
        modules = resolve_modules(stored, declared)
        if any(form.quantized and len(form.weight.shape) == 3 for form, _ in modules.groups):
            stored = stored.with_convolutions(topology.members | topology.unread)
            modules = resolve_modules(stored, declared)
        others = modules.only(topology.others)
        is_mtp, is_float = mtp_test(checkpoint.types, config), float_test(topology, family)
        in_one_engine = engine_test(stored.linears, float_in_one_engine(config), is_mtp)
        float_modules = quantized_float_modules(others, is_float, topology.unread)
        fp8 = fp8_groups(modules, stored, topology.layers)
        in_fp8 = [name for group in fp8 for name in group.modules]
        function = tuple(function_findings(config, stored, checkpoint.types, is_mtp, is_float))
        findings = [
            *checkpoint.findings,
            *shared_among_routed(shapes_explained(topology.findings, declared), config, topology.layers, others),
            *(() if config.rank.is_whole else (rank_part(config.rank),)),
            *(ascend_findings(declared, checkpoint) if isinstance(declared, AscendScheme) else ()),
            *((scheme_implied(),) if implied else ()),
            *contradictions(
                declared, stored, modules, topology, others, family, is_mtp, is_float, float_modules, in_fp8
            ),
            *other_quantizations(config),
            *fp8_findings(fp8, "config.json" if declared is None else declared.file),
            *expert_name_findings(config, topology),
            *identity_experts(topology.layers),
            *wrapped_names(topology, others),
            *function,
            *output_scale_findings(declared, config.quantization, stored),
            *norm_biases(config, topology.layers, stored.biases),
            *linear_biases(config, topology.layers, stored.biases, family),
            *(
                ()
                if any(item.severity is Severity.ERROR for item in checkpoint.findings)  # tensors that cannot be read
                else (
                    *disagreements(config, topology.layers, checkpoint.types, stored.vectors, is_mtp),
                    *missing_parts(config, topology.layers, others, is_mtp),
                )
            ),
            *merged_findings(others, stored.linears, float_modules),
        ]
    return Description(
        checkpoint=checkpoint,
        config=config,
        declared=declared,
        stored=stored,
        modules=modules,
        topology=topology,
        others=others,
        findings=_reported(findings, checkpoint),
        is_mtp=is_mtp,
        is_float=is_float,
        float_in_one_engine=in_one_engine,
        float_modules=float_modules,
        float_modules_of=quantized_float_modules_of(others, in_one_engine),
        mtp_dropped=mtp_dropped,
        fp8=fp8,
    )


def _reported(findings: list[Finding], checkpoint: Checkpoint) -> tuple[Finding, ...]:
    """The findings by severity, without those that only follow from files that cannot be read."""
    if not checkpoint.types and any(item.severity is Severity.ERROR for item in checkpoint.findings):
        findings = list(checkpoint.findings)  # no tensor could be read: all others would only follow from that
    unread = any((item.code, item.subject) == ("config-invalid", CONFIG_NAME) for item in checkpoint.findings)
    if unread and has_file(checkpoint.store, CONFIG_NAME):
        findings = [item for item in findings if item.code != "quant-config-missing"]  # it may be there
    order = list(Severity)
    completed = (with_other_description(item, checkpoint) for item in bounded(findings))
    return tuple(sorted(completed, key=lambda item: order.index(item.severity)))
