"""A checkpoint described as it will be once some of its float modules are quantized to ptpc_int8.

The description that results has int8 weights and F32 scales at positions of their own, outside of every file. A target
plans with it as with any other; :mod:`quarkconv.plan.quantize` then replaces these positions by
computations.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field

from quarkconv.description.contradictions import is_linear
from quarkconv.description.description import Description, described
from quarkconv.dtypes import QUANTIZABLE, TensorType
from quarkconv.errors import QuarkconvError, UnsupportedError, UsageError
from quarkconv.findings import NOT_UNDERSTOOD, refusal
from quarkconv.headers.checkpoint import Checkpoint
from quarkconv.headers.safetensors import TensorRef
from quarkconv.scheme.form import BLOCK_SCALE, Form, fused_names, linear_names
from quarkconv.scheme.merged import MERGED_WITH
from quarkconv.scheme.options import QUANTIZE, SourceOptions
from quarkconv.scheme.patterns import TimeLimit, name_filter, regex_matcher
from quarkconv.scheme.spec import FLOAT, PTPC, PTPC_NAME


@dataclass(frozen=True, slots=True)
class QuantizedCheckpoint(Checkpoint):
    """A checkpoint with int8 weights in the place of some float ones.

    Attributes:
        originals: int8 weight or its scale, by name -> the float weight, where it is stored.
    """

    originals: dict[str, TensorRef] = field(default_factory=dict)

    def refs(self) -> dict[str, TensorRef]:
        refs = Checkpoint.refs(self)
        for name, original in self.originals.items():
            found = self.types[name]
            refs[name] = TensorRef(found.dtype, found.shape, original.file, 0, found.nbytes)
        return refs

    @property
    def tensor_bytes(self) -> int:
        """Size of all tensors in bytes, as quantized."""
        return sum(found.nbytes for found in self.types.values())


def quantized_description(description: Description, options: SourceOptions, engine: str | None = None) -> Description:
    """The description of a checkpoint as if its float modules were quantized.

    Args:
        description: the checkpoint as it is.
        options: which modules.
        engine: the only engine that the output is for: what it alone keeps in float is not quantized; None for several.

    Raises:
        UsageError: an excluded name or pattern matches no module, or only some parts of a merged linear.
        UnsupportedError: no module is left, the layout is not supported, or the scheme needs calibration.
    """
    _check_dtypes(description, options)
    _check_experts(description)
    is_excluded = _exclusion(description, options.exclude)
    modules = {
        module: form
        for module, form in _modules(description, options, is_excluded)
        if engine is None or description.float_in_one_engine(module) != engine
    }
    root = str(description.checkpoint.root)
    if not modules:
        raise _nothing_left(description, options, root)
    _check(description, modules)
    _check_merged(description, modules, is_excluded)
    checkpoint = description.checkpoint
    refs, types, originals = checkpoint.refs(), dict(checkpoint.types), {}
    for module, form in modules.items():
        names = fused_names(module) if module in description.stored.fused else linear_names(module)
        shape = form.weight.shape
        scale = shape[:-1] if names.weight.endswith(".weight") else (*shape[:-1], 1)
        types[names.weight], types[names.scale] = TensorType("I8", shape), TensorType("F32", scale)
        originals[names.weight] = originals[names.scale] = refs[names.weight]
    virtual = QuantizedCheckpoint(
        store=checkpoint.store,
        config=checkpoint.config,
        shards=checkpoint.shards,
        types=_shared(types),
        findings=checkpoint.findings,
        ascend=checkpoint.ascend,
        originals=originals,
    )
    if options.quantize == "all":
        return described(virtual, scheme=PTPC_NAME, mtp_dropped=description.mtp_dropped)
    return described(virtual, description.declared, mtp_dropped=description.mtp_dropped)


def _check_experts(description: Description) -> None:
    """Refuse experts that are not understood: which of their tensors engines keep in float is unknown."""
    unread = (item for item in description.findings if item.code == NOT_UNDERSTOOD)
    blocked = refusal(unread, str(description.checkpoint.root), "source", "quantized")
    if blocked is not None:
        raise blocked


def _nothing_left(description: Description, options: SourceOptions, root: str) -> QuarkconvError:
    """The reason why no module is quantized."""
    undeclared = options.quantize == "missing" and description.declared is None
    option = "--mtp quantize" if options.quantize is None else "--quantize"
    return UnsupportedError(
        "The config declares no module quantized" if undeclared else "Nothing to quantize",
        file=root,
        hint="--quantize all quantizes every linear that engines run in int8"
        if undeclared
        else f"convert without {option}; `quarkconv inspect` shows what is float",
    )


def _shared(types: dict[str, TensorType]) -> dict[str, TensorType]:
    """The same types, each as one object: stored modules are grouped by identity."""
    pool: dict[TensorType, TensorType] = {}
    return {name: pool.setdefault(found, found) for name, found in types.items()}


def _exclusion(description: Description, patterns: Sequence[str]) -> Callable[[str], object]:
    """A test of the names of modules: whether ``--exclude`` keeps them in float."""
    limit = TimeLimit()
    names = [module for module, form in description.stored if form.is_float]
    for pattern in patterns:
        if pattern.startswith("re:") and regex_matcher(pattern[3:]) is None:
            raise UsageError(
                "Invalid --exclude", expected="a regular expression of Python's re after re:", found=repr(pattern)
            )
        if not any(map(name_filter([pattern], globs=True, limit=limit), names)):
            raise UsageError(
                "--exclude matches no module that is stored in float",
                expected="the name of a module, a pattern with *, ? or [], or re: and a regular expression",
                found=pattern,
            )
    return name_filter(patterns, globs=True, limit=limit)


def _modules(
    description: Description, options: SourceOptions, is_excluded: Callable[[str], object]
) -> Iterator[tuple[str, Form]]:
    """The modules to quantize and their forms."""
    members, declared = description.topology.members, description.declared
    layers = {module: layer for layer in description.moe_layers for module in layer.module_names}
    for module, form in description.stored:
        if not form.is_float or form.weight.dtype not in QUANTIZABLE or is_excluded(module):
            continue
        if module in members:
            claim = declared.resolve_expert(layers[module].prefix, module) if declared and module in layers else FLOAT
        elif is_linear(module, form) and not description.is_float(module):
            claim = declared.resolve(module) if declared else FLOAT
        else:
            continue
        if (
            options.quantize == "all"
            or (options.quantize == "missing" and claim.weight is not None)
            or (options.mtp == QUANTIZE and description.is_mtp(module))
        ):
            yield module, form


def _check_merged(description: Description, modules: Collection[str], is_excluded: Callable[[str], object]) -> None:
    """Refuse to exclude some parts of a linear that engines merge while the others are int8."""
    linears = description.stored.linears
    for module, form in linears.items():
        parent, _, leaf = module.rpartition(".")
        if not form.is_float or leaf not in MERGED_WITH or not is_excluded(module):
            continue
        parts, _ = MERGED_WITH[leaf]
        for other in (f"{parent}.{part}" for part in parts):
            if other in modules or (other in linears and linears[other].quantized):
                raise UsageError(
                    "--exclude leaves one part of a linear in float that engines merge with parts in int8",
                    tensor=module,
                    expected=f"all of {', '.join(parts)} excluded, or none",
                    found=f"{other} in int8",
                )


def _check_dtypes(description: Description, options: SourceOptions) -> None:
    """Refuse weights in another quantized dtype: as float weights they would have to be dequantized first."""
    kept = {name for group in description.fp8 for name in group.modules} if options.quantize != "all" else set()
    for module, form in description.stored:
        if form.is_float and any(form.tensors[1:]):
            raise UnsupportedError(
                "quarkconv does not quantize a float weight that has a scale: it may hold codes or values",
                file=str(description.checkpoint.root),
                tensor=f"{module}.weight",
                expected="float weights without scales",
                found="weights quantized in simulation, or int8 codes stored in float",
                hint="export the model again with int8 weights, or quantize the original model",
            )
        concerned = module not in kept or (options.mtp == QUANTIZE and description.is_mtp(module))
        if not form.is_float and not form.quantized and concerned:
            in_blocks = f"{module}{BLOCK_SCALE}" in description.stored.plain
            raise UnsupportedError(
                "quarkconv does not quantize weights that are already quantized",
                file=str(description.checkpoint.root),
                tensor=f"{module}.weight",
                expected="BF16, F16 or F32",
                found=form.weight.dtype + (", with a scale for each block (weight_scale_inv)" if in_blocks else ""),
                hint="dequantize the model to BF16 first, or quantize the original model",
            )


def _check(description: Description, modules: dict[str, Form]) -> None:
    """Refuse modules that need another arithmetic than ptpc_int8."""
    declared, root = description.declared, str(description.checkpoint.root)
    transposed = (layer for layer in description.moe_layers if layer.transposed)
    fused = next((name for layer in transposed for name in layer.module_names if name in modules), None)
    if fused is not None:
        raise UnsupportedError(
            "quarkconv quantizes fused experts along their rows, but this model stores them transposed",
            file=root,
            tensor=fused,
            expected="[E, 2I, H] and [E, H, I]",
            hint="split the experts into linears first",
        )
    if declared is not None and declared.method != "none":
        for module in modules:
            claim = declared.resolve(module)
            if claim.weight is not None and claim != PTPC:
                raise UnsupportedError(
                    "The config declares a scheme that quarkconv does not quantize to",
                    file=root,
                    tensor=module,
                    expected="ptpc_int8: int8 per channel, activations per token",
                    found=f"{claim.weight.dtype} {claim.weight.granularity}",
                    hint="other schemes need calibration data: quantize the model with Quark",
                )
