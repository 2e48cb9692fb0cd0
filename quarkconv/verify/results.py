"""The results of ``verify``."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any, Final, NamedTuple

from quarkconv.findings import Finding
from quarkconv.text import plural

RESCALED: Final = (
    "Weights differ from the unquantized model's by factors per channel, as SmoothQuant and AWQ leave them; the errors "
    "are without these factors"
)
SCHEMA: Final = "quarkconv.verify/1"

SCALE_EDGES: Final = tuple(round(-8 + 0.25 * step, 2) for step in range(41))
"""Edges of the bins of a histogram of scales, as powers of ten."""


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
class Distance:
    """How far two outputs [M, H] are from one another.

    Attributes:
        relative_error: Frobenius norm of the difference over that of the reference.
        cosine: cosine of the angle between the two.
        snr_db: signal to noise in decibels; None when they are equal.
        max_error: largest difference, over the root mean square of the reference.
        bound: largest accepted ``relative_error``.
    """

    relative_error: float
    cosine: float
    snr_db: float | None
    max_error: float
    bound: float

    @property
    def ok(self) -> bool:
        """Within the bound; never for NaN."""
        return self.relative_error <= self.bound


@dataclass(frozen=True, slots=True)
class LayerNumbers:
    """The numbers of one layer.

    Attributes:
        layer: number of the layer.
        module: module of its experts.
        tokens: number of tokens requested.
        inputs: the source of their hidden states, for people.
        experts, reached: E, and how many of them got tokens.
        routing: how tokens were routed, for people.
        activation: the activation function.
        exact: distance of the INT8 forward from the exact reference.
        dequantized: distance of the INT8 forward from the dequantized reference, for Gaussian or recorded inputs.
        outliers: the same for inputs with outlier channels; None where none were drawn.
        unquantized: distance of the INT8 forward from the unquantized model, for the inputs of ``dequantized``, without
            a bound; None without ``--unquantized``.
        seconds: wall time of the layer.
    """

    layer: int
    module: str
    tokens: int
    inputs: str
    experts: int
    reached: int
    routing: str
    activation: str
    exact: Distance
    dequantized: Distance
    outliers: Distance | None
    unquantized: Distance | None
    seconds: float

    @property
    def is_zero(self) -> bool:
        """Whether both outputs are zero, so that their distance is meaningless."""
        return self.exact.relative_error == 0 and math.isnan(self.exact.cosine)

    @property
    def ok(self) -> bool:
        """All distances within their bounds, of outputs that are not zero."""
        if self.is_zero:
            return False
        distances = (self.exact, self.dequantized, self.outliers, self.unquantized)
        return all(item.ok for item in distances if item is not None)


@dataclass(frozen=True, slots=True)
class WeightError:
    """How far the dequantized weights of one projection of an expert are from the unquantized ones.

    Attributes:
        relative_error: Frobenius norm of the difference over that of the unquantized weight.
        snr_db: the same in decibels; None when they are equal.
        clipped: share of the weights outside the range of the codes.
    """

    relative_error: float
    snr_db: float | None
    clipped: float


class ExpertWeight(NamedTuple):
    """The weight of one projection of an expert, by its place, and its error.

    Attributes:
        layer: number of the layer.
        module: module of the layer's experts.
        role: ``gate``, ``up`` or ``down``.
        expert: number of the expert.
        error: how far it is from the unquantized weight.
    """

    layer: int
    module: str
    role: str
    expert: int
    error: WeightError


@dataclass(frozen=True, slots=True)
class LayerExperts:
    """Statistics of each expert of a layer.

    Attributes:
        layer: number of the layer.
        module: module of its experts.
        load: tokens that the routing sent to each expert, of those that were drawn.
        scale_min, scale_max: smallest and largest magnitude of the weight scales of each expert.
        scale_histogram: how many weight scales of the layer lie in each bin of :data:`SCALE_EDGES`.
        weights: role -> the weight errors of each expert; empty without ``--unquantized``.
        rescaled: the weights differ by factors per channel, as SmoothQuant and AWQ leave them; errors exclude them.
    """

    layer: int
    module: str
    load: tuple[int, ...]
    scale_min: tuple[float, ...]
    scale_max: tuple[float, ...]
    scale_histogram: tuple[int, ...]
    weights: dict[str, tuple[WeightError, ...]]
    rescaled: bool = False

    def to_json(self) -> dict[str, Any]:
        """Columns rather than rows: a large model has 50,000 projections."""
        weights = {
            role: {
                "relative_error": [_rounded(item.relative_error) for item in errors],
                "clipped": [_rounded(item.clipped) for item in errors],
            }
            for role, errors in self.weights.items()
        }
        return {
            "layer": self.layer,
            "module": self.module,
            "load": list(self.load),
            "scale_min": list(map(_rounded, self.scale_min)),
            "scale_max": list(map(_rounded, self.scale_max)),
            "scale_histogram": list(self.scale_histogram),
            "weights": weights,
            "rescaled": self.rescaled,
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
    """

    device: str
    backend: str
    tokens: tuple[int, ...]
    seed: int
    layers: tuple[LayerNumbers, ...] = ()
    experts: tuple[LayerExperts, ...] = ()
    skipped: str | None = None

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
        if not skipped:
            return "Verified"
        checked = ["structure", *(name for name in ("bytes", "numbers") if name not in skipped)]
        return f"Verified: {' and '.join(checked)}; not checked: {' and '.join(skipped)}"

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
            },
            "problems": [asdict(problem) for problem in self.problems],
            "findings": [asdict(item) for item in self.findings],
            **({} if self.part is None else {"part": asdict(self.part)}),
        }


def _rounded(value: float) -> float | None:
    """Four digits: enough for a picture, and short."""
    return float(f"{value:.4g}") if math.isfinite(value) else None


def _finite(value: dict[str, Any]) -> dict[str, Any]:
    """NaN and infinity as null: JSON has neither."""

    def finite(item: Any) -> Any:
        if isinstance(item, dict):
            return _finite(item)
        return None if isinstance(item, float) and not math.isfinite(item) else item

    return {key: finite(item) for key, item in value.items()}
