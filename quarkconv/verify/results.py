"""The results of ``verify``."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any, Final

from quarkconv.findings import NOT_UNDERSTOOD, Finding
from quarkconv.text import plural
from quarkconv.verify.layer_results import ExpertWeight, LayerExperts, LayerNumbers, LinearError

SCHEMA: Final = "quarkconv.verify/1"


@dataclass(frozen=True, slots=True)
class Problem:
    """Something that is not as it must be.

    Attributes:
        stage: ``structure``, ``bytes`` or ``numbers``.
        layer: number of the MoE layer concerned, if any.
        tensor: the tensor concerned, or the file.
        message: one sentence.
        count: how many places it is about.
    """

    stage: str
    layer: int | None
    tensor: str
    message: str
    count: int = 1


@dataclass(frozen=True, slots=True)
class StructureResult:
    """Headers, index and manifest: how many files and tensors were looked at.

    ``readable`` is False when a problem keeps tensors from being read correctly.
    """

    files: int
    tensors: int
    manifest: bool
    readable: bool


@dataclass(frozen=True, slots=True)
class BytesResult:
    """Checksums: how many pieces and bytes were compared, and whether with the source as well.

    ``skipped`` says why bytes could not be checked; None when they were.
    """

    pieces: int = 0
    nbytes: int = 0
    against_source: bool = False
    skipped: str | None = None


@dataclass(frozen=True, slots=True)
class UncheckedLayer:
    """A layer whose numbers are not checked, though those of others are.

    Attributes:
        module: module of its experts.
        reason: why not.
    """

    module: str
    reason: str


@dataclass(frozen=True, slots=True)
class LinearsResult:
    """Int8 linears outside of the routed experts beside those of the unquantized model.

    Attributes:
        compared: how many were compared.
        rescaled: how many of these differ by factors per input channel, as SmoothQuant and AWQ leave them.
        worst: those with the largest errors, largest first.
        not_compared: the others, with the reason why not.
    """

    compared: int
    rescaled: int
    worst: tuple[LinearError, ...]
    not_compared: tuple[UncheckedLayer, ...]

    def to_json(self) -> dict[str, Any]:
        """The fields; an infinite error is null."""
        return {
            "compared": self.compared,
            "rescaled": self.rescaled,
            "worst": [_finite(item._asdict()) for item in self.worst],
            "not_compared": [asdict(item) for item in self.not_compared],
        }


@dataclass(frozen=True, slots=True)
class NumbersResult:
    """The numbers of all layers; ``skipped`` is the reason where they were not computed.

    Attributes:
        device: kind of device, and how many where it is more than one.
        backend: implementation of the INT8 forward.
        tokens: the numbers of tokens that were drawn for each layer.
        seed: of the random tokens.
        layers: one for each layer and number of tokens.
        experts: one for each layer.
        skipped: the reason why numbers were not computed; None where they were.
        not_checked: the layers that were left out, where others were computed.
        linears: the other int8 linears beside the unquantized model's; None without ``--unquantized``.
    """

    device: str
    backend: str
    tokens: tuple[int, ...]
    seed: int
    layers: tuple[LayerNumbers, ...] = ()
    experts: tuple[LayerExperts, ...] = ()
    skipped: str | None = None
    not_checked: tuple[UncheckedLayer, ...] = ()
    linears: LinearsResult | None = None

    def label(self, layer: int, module: str) -> str:
        """The number of a layer; its module where layers share the number."""
        modules = {item.module for item in self.layers if item.layer == layer}
        modules |= {item.module for item in self.experts if item.layer == layer}
        return str(layer) if len(modules) < 2 else module

    def worst(self, count: int = 10) -> list[ExpertWeight]:
        """The weights with the largest errors, largest first."""
        found = [
            ExpertWeight(layer.layer, layer.module, role, expert, error)
            for layer in self.experts
            for role, errors in layer.weights.items()
            for expert, error in enumerate(errors)
        ]
        return sorted(found, key=lambda item: -item.error.relative_error)[:count]


@dataclass(frozen=True, slots=True)
class VerifiedPart:
    """Which part of a verification a result is.

    Attributes:
        number: number of the part, from 1.
        count: number of parts.
        identity: what the parts of one verification have in common; see :func:`quarkconv.verify.parts.identity`.
    """

    number: int
    count: int
    identity: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Verification:
    """The answer of ``verify``.

    Attributes:
        model: the model as it was named.
        source: the source it was compared with, as it was named; None without.
        unquantized: the unquantized model it was compared with, as it was named; None without.
        scheme: the scheme of the quantized modules.
        structure, bytes, numbers: the results of the three stages.
        problems: everything that is wrong.
        findings: files and tensors of the checkpoint or its source that were not checked.
        part: which part of a verification this is; None for a whole one.
    """

    model: str
    source: str | None
    unquantized: str | None
    scheme: str | None
    structure: StructureResult
    bytes: BytesResult
    numbers: NumbersResult
    problems: tuple[Problem, ...]
    findings: tuple[Finding, ...] = ()
    part: VerifiedPart | None = None

    @property
    def ok(self) -> bool:
        """True without problems."""
        return not self.problems

    def verdict(self) -> str:
        """One line for people: whether anything is wrong, and what was not checked."""
        if self.part is None:
            return self._verdict()
        return f"Part {self.part.number} of {self.part.count}: {self._verdict()}; the other parts: not checked here"

    def _verdict(self) -> str:
        skipped = [name for name, why in (("bytes", self.bytes.skipped), ("numbers", self.numbers.skipped)) if why]
        if self.problems:
            outcome = f"Not verified: {plural(len(self.problems), 'problem')}"
            return outcome + (f"; not checked: {' and '.join(skipped)}" if skipped else "")
        checked = ["structure", *(name for name in ("bytes", "numbers") if name not in skipped)]
        if "numbers" in checked and any(item.code == NOT_UNDERSTOOD for item in self.findings):
            skipped.append("numbers of experts that were not recognised")
        if self.numbers.not_checked:
            skipped.append(f"numbers of {plural(len(self.numbers.not_checked), 'layer')}")
        if "numbers" in checked and self.unquantized is not None:
            skipped += self._not_compared()
        if not skipped:
            return "Verified"
        return f"Verified: {' and '.join(checked)}; not checked: {' and '.join(skipped)}"

    def _not_compared(self) -> list[str]:
        """The weights that were not compared with those of the unquantized model."""
        linears = self.numbers.linears
        left_out = "norms, embeddings and linears in float against the unquantized model's"
        if linears is None:
            return [f"int8 linears, {left_out}"]
        count = len(linears.not_compared)
        return [f"{plural(count, 'int8 linear')}, {left_out}" if count else left_out]

    def to_json(self) -> dict[str, Any]:
        """The object that ``verify --json`` prints."""
        numbers = self.numbers
        layers = [{**_finite(asdict(layer)), "ok": layer.ok} for layer in numbers.layers]
        worst = [
            {
                "layer": item.layer,
                "module": item.module,
                "role": item.role,
                "expert": item.expert,
                **_finite(asdict(item.error)),
            }
            for item in numbers.worst()
        ]
        return {
            "schema": SCHEMA,
            "model": self.model,
            "source": self.source,
            "unquantized": self.unquantized,
            "scheme": self.scheme,
            "ok": self.ok,
            "structure": asdict(self.structure),
            "bytes": asdict(self.bytes),
            "numbers": {
                "device": numbers.device,
                "backend": numbers.backend,
                "tokens": list(numbers.tokens),
                "seed": numbers.seed,
                "layers": layers,
                "experts": [layer.to_json() for layer in numbers.experts],
                "worst": worst,
                "skipped": numbers.skipped,
                "not_checked": [asdict(layer) for layer in numbers.not_checked],
                "linears": None if numbers.linears is None else numbers.linears.to_json(),
            },
            "problems": [asdict(problem) for problem in self.problems],
            "findings": [asdict(item) for item in self.findings],
            **({} if self.part is None else {"part": asdict(self.part)}),
        }


def _finite(value: dict[str, Any]) -> dict[str, Any]:
    """NaN and infinity as null: JSON has neither."""

    def finite(item: Any) -> Any:
        if isinstance(item, dict):
            return _finite(item)
        return None if isinstance(item, float) and not math.isfinite(item) else item

    return {key: finite(item) for key, item in value.items()}
