"""The findings of ``inspect``, as a table of stable codes.

A finding is a fact about a checkpoint that its user should know: ``error`` when an engine would fail or compute
other results, ``warning`` when it may, ``info`` otherwise. Codes are part of the
public interface: they are never renamed, and ``docs/findings.md`` is made from this table.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Final, NamedTuple

from quarkconv.errors import QuarkconvError, SourceError, UnsupportedError
from quarkconv.text import examples, shortened


class Severity(StrEnum):
    """The severity of a finding. ``error`` makes ``inspect`` exit 1."""

    ERROR = "error"
    WARNING = "warning"
    INFO = "info"


class FindingCode(NamedTuple):
    """A row of the table.

    Attributes:
        severity: the default.
        meaning: what the code means, one sentence.
        blocks: the error with which a conversion refuses such a source; None where conversion is possible.
    """

    severity: Severity
    meaning: str
    blocks: type[QuarkconvError] | None = None


OTHER_FORMAT: Final = "format-unsupported"

MAX_FINDINGS: Final = 200
"""Findings of one code that are listed; the largest models have half as many layers."""

_E, _W, _I = Severity.ERROR, Severity.WARNING, Severity.INFO
_BROKEN, _UNSUPPORTED = SourceError, UnsupportedError

CODES: Final[dict[str, FindingCode]] = {
    # Files that cannot be read
    "config-invalid": FindingCode(_E, "config.json is missing, is not valid JSON, or is not an object.", _BROKEN),
    "shard-missing": FindingCode(_E, "The index names a file that does not exist.", _BROKEN),
    "shard-truncated": FindingCode(_E, "A file is shorter than its header declares.", _BROKEN),
    "header-invalid": FindingCode(_E, "A safetensors header violates the format.", _BROKEN),
    "index-invalid": FindingCode(_E, "model.safetensors.index.json is not a valid index.", _BROKEN),
    "index-mismatch": FindingCode(
        _E, "The index and the headers place a tensor in different files, or one of them lacks it.", _BROKEN
    ),
    "tensor-duplicate": FindingCode(_E, "A tensor is stored in more than one file.", _BROKEN),
    OTHER_FORMAT: FindingCode(
        _E,
        "The weights are not in safetensors (.bin, .gguf and others), or are files that an engine saved for each rank.",
        _UNSUPPORTED,
    ),
    "index-total-size": FindingCode(_I, "The total size in the index is not a number of bytes; quarkconv ignores it."),
    "file-outside": FindingCode(_E, "A file is a link out of the model's directory.", _BROKEN),
    "tensor-name": FindingCode(_E, "The name of a tensor has unprintable characters, or (info) slashes.", _BROKEN),
    "file-unused": FindingCode(_W, "The index does not list a safetensors file; engines may or may not load it."),
    "file-conflict": FindingCode(
        _W,
        "Engines load a safetensors file that is not a shard of the model. Without an index they load every "
        "file; vLLM loads consolidated*.safetensors alone where it exists.",
    ),
    # Claims of the config
    "quant-config-missing": FindingCode(_E, "config.json has no quantization_config.", _UNSUPPORTED),
    "scheme-implied": FindingCode(_W, "config.json has no quantization_config; the tensors imply ptpc_int8."),
    "quantizer-names": FindingCode(
        _W,
        "Scales are named weight_quantizer.scale, or weight_scale_inv as scales of blocks are; engines look for "
        "weight_scale.",
    ),
    "rotation-online": FindingCode(
        _E, "The model rotates activations at run time; engines do not, and would compute wrong results.", _UNSUPPORTED
    ),
    "smoothing-online": FindingCode(
        _E,
        "Stored factors multiply inputs at run time; engines do not apply them, and would compute wrong results.",
        _UNSUPPORTED,
    ),
    "companion-unknown": FindingCode(
        _W, "Int8 weights have companion tensors of unknown meaning, or float weights have scales."
    ),
    "output-scales": FindingCode(
        _W, "Scales of outputs or the key-value cache are stored but not declared, or declared but not stored."
    ),
    "mtp-missing": FindingCode(_I, "config.json declares multi-token prediction layers that are not stored."),
    "float-module-quantized": FindingCode(
        _E,
        "Modules that engines keep in float, such as routers and heads, are stored in int8; conversion "
        "dequantizes them. A warning if all of them are in multi-token prediction layers.",
    ),
    "quant-config-invalid": FindingCode(
        _E, "quantization_config has fields with the wrong type or an invalid value; quarkconv ignores them."
    ),
    "scheme-unsupported": FindingCode(_E, "The scheme of the tensors or the config is not INT8 W8A8.", _UNSUPPORTED),
    "description-mismatch": FindingCode(
        _E,
        "quant_model_description.json (Ascend) and the tensors disagree, or linears that engines merge differ in type.",
    ),
    "mixed-precision": FindingCode(
        _I, "FP8 linears are stored beside INT8 experts; the targets compressed-tensors and fused-int8 keep them."
    ),
    "mixed-scheme": FindingCode(_W, "The model mixes more than one INT8 scheme."),
    "granularity-mismatch": FindingCode(_E, "Scales have a different granularity than config.json declares."),
    "excluded-but-quantized": FindingCode(_E, "config.json excludes a module that is stored in int8."),
    "quantized-but-stored-float": FindingCode(
        _E, "config.json declares a linear quantized, but it is stored in float."
    ),
    "experts-not-quantized": FindingCode(
        _E,
        "Experts are stored in float, although config.json declares them quantized or other experts of their "
        "layer are int8.",
    ),
    "experts-excluded": FindingCode(
        _I, "config.json excludes all routed experts of a layer, and they are stored in float."
    ),
    # Stored tensors
    "weight-shape": FindingCode(_E, "An int8 weight has no elements, or more matrices than a layer can have.", _BROKEN),
    "scale-missing": FindingCode(_E, "An int8 weight has no weight_scale.", _BROKEN),
    "scale-shape": FindingCode(_E, "The shape of a scale is neither per-channel nor per-tensor.", _BROKEN),
    "scale-dtype": FindingCode(_E, "The dtype of a scale is not F32, BF16 or F16.", _UNSUPPORTED),
    "dtype-mismatch": FindingCode(_E, "A module is stored in int8 or FP8, but config.json declares another dtype."),
    "scale-narrow": FindingCode(_I, "Scales are stored in BF16 or F16; conversion widens them to F32 exactly."),
    "scale-invalid": FindingCode(
        _E,
        "A scale is NaN or infinite, or an activation scale is not positive (found by --deep, and by convert, "
        "which stops). A warning if a weight scale is zero: harmless if its codes are zero.",
    ),
    "scale-negative": FindingCode(_I, "Weight scales are negative, as auto-round writes them (found by --deep)."),
    "scale-subnormal": FindingCode(_W, "A scale is so small that GPUs may flush it to zero (found by --deep)."),
    "zero-point-present": FindingCode(
        _I, "Zero points are stored. Engines do not read them; conversion drops them if they are zero."
    ),
    "zero-point-shape": FindingCode(
        _E, "The numbers of zero points and scales differ, as when zero points are packed.", _UNSUPPORTED
    ),
    "zero-point-nonzero": FindingCode(
        _E, "A zero point is not zero: the quantization is asymmetric (found by --deep)."
    ),
    "tensor-unrecognised": FindingCode(
        _W, "A tensor with codes or scales belongs to an unknown module; engines may drop it."
    ),
    # Experts
    "expert-missing": FindingCode(_E, "Experts of a layer, or projections of an expert, are missing.", _BROKEN),
    "expert-shape": FindingCode(_E, "Projections of a layer's experts have shapes that do not fit together.", _BROKEN),
    "expert-count": FindingCode(_E, "The number of stored experts differs from config.json.", _BROKEN),
    "shared-among-routed": FindingCode(
        _E, "Shared experts seem to be stored among the routed ones, as SGLang holds them in memory.", _UNSUPPORTED
    ),
    "layout-conflict": FindingCode(_E, "A layer stores its experts in more than one layout or naming.", _BROKEN),
    "config-mismatch": FindingCode(
        _W,
        "Sizes or layers in config.json differ from the tensors; engines build the model from config.json, and "
        "may fail.",
    ),
    "class-mismatch": FindingCode(
        _W, "architectures in config.json names a class of another model type; engines use that class."
    ),
    "router-mismatch": FindingCode(_W, "A router is missing, or its shape does not fit the experts of its layer."),
    "merged-mixed": FindingCode(
        _W, "Linears that engines merge are stored partly in int8, partly in FP8 or float; engines refuse them."
    ),
    "expert-names": FindingCode(_W, "Engines use other names for the experts of this model type."),
    "identity-experts": FindingCode(
        _W, "Experts that return their input have a gate and an up, as transformers saves them; vLLM fails on these."
    ),
    "wrapped-names": FindingCode(
        _W,
        "Tensor names have the prefix of a wrapper, such as module., or belong to adapters inside the model; "
        "engines do not know them.",
    ),
    "layer-geometry": FindingCode(_I, "MoE layers differ in the number or the size of their experts."),
    "norm-biases": FindingCode(
        _W, "Norms have biases that models of this type do not have; engines drop them or fail."
    ),
    "linear-biases": FindingCode(
        _W, "Linears have biases that models of this type do not have; engines drop them without an error."
    ),
    "rank-part": FindingCode(_W, "The checkpoint is the part of one rank; engines load whole models."),
    "experts-not-understood": FindingCode(
        _E,
        "quarkconv does not know the names or the layout of the routed experts. Targets that write modules one "
        "by one convert them, with a warning, if it can read their modules.",
        _UNSUPPORTED,
    ),
    "not-moe": FindingCode(_W, "The checkpoint has no routed experts.", _UNSUPPORTED),
    # Changes by a conversion (reported by convert, for one target)
    "setting-dropped": FindingCode(_W, "The target cannot express a setting of the source's quantization_config."),
    "tensor-dropped": FindingCode(_I, "The target leaves out some tensors of the source."),
    "module-dequantized": FindingCode(
        _I, "Conversion dequantizes modules that engines, or the only engine of the target, keep in float."
    ),
    "left-in-float": FindingCode(_I, "Linears that --quantize leaves in float: routers, heads, and excluded ones."),
    "mtp-dropped": FindingCode(_I, "Conversion leaves out the multi-token prediction layers."),
}
"""Code -> default severity and meaning. Codes are stable."""

IDENTITIES: Final = "identity-experts"
NOT_UNDERSTOOD: Final = "experts-not-understood"
"""The code of experts that targets convert which write every module as it is stored."""
DISAGREEING: Final = frozenset({"config-mismatch", "router-mismatch"})
"""Codes of warnings by which config.json is not that of the tensors, though these can be converted."""
PASSED_ON: Final = DISAGREEING | {
    "class-mismatch", "wrapped-names", "norm-biases", "linear-biases", "file-unused", "file-conflict",
    "tensor-unrecognised", "companion-unknown", "output-scales",
}  # fmt: skip
"""Files that conversion leaves out, tensors that it copies unread, and disagreements that go over to the output:
``convert`` and ``verify`` report these."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One fact about a checkpoint.

    Attributes:
        severity: see :class:`Severity`.
        code: key of :data:`CODES`.
        subject: the module, tensor or file concerned; the first of several.
        count: number of modules, tensors or files concerned.
        message: one sentence.
        hint: the next step, one sentence; empty where nothing has to be done.
    """

    severity: Severity
    code: str
    subject: str
    count: int
    message: str
    hint: str = ""


def finding(
    code: str, subject: str, message: str, *, hint: str = "", count: int = 1, severity: Severity | None = None
) -> Finding:
    """A finding with the default severity of its code. Raises ``KeyError`` for an unknown code."""
    return Finding(severity or CODES[code].severity, code, subject, count, message, hint)


def finding_from_json(value: dict[str, Any]) -> Finding:
    """The finding that :func:`dataclasses.asdict` gave.

    Raises:
        KeyError, TypeError, ValueError: it is malformed.
    """
    return Finding(**{**value, "severity": Severity(value["severity"])})


@dataclass(frozen=True, slots=True)
class FindingsAbout:
    """The finding about several modules, tensors or files: it names the first of them and counts all.

    Iterating gives it, or nothing where there are no subjects: ``yield from FindingsAbout(...)``.

    Attributes:
        code: as for :func:`finding`, like ``hint`` and ``severity``.
        subjects: their names.
        message: what they are, such as ``3 scales with negative values``. The first names follow it.
    """

    code: str
    subjects: Sequence[str]
    message: str
    hint: str = ""
    severity: Severity | None = None

    def __iter__(self) -> Iterator[Finding]:
        if self.subjects:
            text, first = f"{self.message}: {examples(self.subjects)}", shortened(self.subjects[0])
            count = len(self.subjects)
            yield finding(self.code, first, text, hint=self.hint, count=count, severity=self.severity)


def as_finding(error: SourceError) -> Finding:
    """An error as a finding, where ``inspect`` can go on after it; an error with another code is raised."""
    if error.code not in CODES:
        raise error
    parts = [error.message, *(f"{label} {text}" for label, text in error.details() if label in ("expected", "found"))]
    subject = error.file or error.tensor or ""
    if error.tensor is not None:
        parts.insert(1, f"tensor {error.tensor}")
    return finding(error.code, subject, "; ".join(parts), hint=error.hint or "")


def refusal(findings: Iterable[Finding], file: str, noun: str, participle: str) -> QuarkconvError | None:
    """The error with which a command refuses a checkpoint for the first finding that blocks; None where none does.

    Args:
        findings: of the checkpoint.
        file: its directory.
        noun: what the command calls it, such as ``source``.
        participle: what the command does with it, such as ``converted``.
    """
    for item in findings:
        blocks = CODES[item.code].blocks
        if item.severity is Severity.INFO or blocks is None:
            continue
        hint = item.hint or "run `quarkconv inspect` for all findings"
        is_file = item.code in ("file-outside", OTHER_FORMAT) or item.subject.endswith((".json", ".safetensors"))
        path, tensor = (f"{file}/{item.subject}", None) if is_file else (file, item.subject)
        if blocks is SourceError:
            message = f"The {noun} is inconsistent ({item.code}): {item.message}"
            return SourceError(message, code=item.code, file=path, tensor=tensor, hint=hint)
        message = f"The {noun} cannot be {participle} ({item.code}): {item.message}"
        return UnsupportedError(message, file=path, tensor=tensor, hint=hint)
    return None


def bounded(findings: Iterable[Finding]) -> list[Finding]:
    """The findings; those of one code beyond :data:`MAX_FINDINGS` are summed up in one."""
    kept: list[Finding] = []
    more: dict[str, list[Finding]] = {}
    counts: Counter[str] = Counter()
    for item in findings:
        counts[item.code] += 1
        (kept if counts[item.code] <= MAX_FINDINGS else more.setdefault(item.code, [])).append(item)
    for code, rest in more.items():
        message = f"{len(rest)} more of these, first of {rest[0].subject}: {rest[0].message}"
        worst = min((item.severity for item in rest), key=list(Severity).index)
        count = sum(item.count for item in rest)
        kept.append(finding(code, rest[0].subject, message, hint=rest[0].hint, count=count, severity=worst))
    return kept
