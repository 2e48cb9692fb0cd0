"""What verification found."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any, Final

SCHEMA: Final = "quarkconv.verify/1"


@dataclass(frozen=True, slots=True)
class Problem:
    """Something that is not as it must be.

    Attributes:
        stage: ``structure``, ``bytes`` or ``numbers``.
        layer: number of the MoE layer concerned; None for what belongs to none.
        tensor: the tensor concerned, or the file.
        message: what is wrong, one sentence.
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

    ``readable`` is False when what is wrong keeps tensors from being read as what they are.
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
        bound: what ``relative_error`` must not exceed.
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
        prefix: module of its experts.
        experts, reached: E, and how many of them got tokens.
        routing: how tokens were routed, for people.
        activation: the activation function.
        exact: distance of the INT8 forward from the exact reference.
        reference: distance of the INT8 forward from the dequantized reference.
        seconds: wall time of the layer.
    """

    layer: int
    prefix: str
    experts: int
    reached: int
    routing: str
    activation: str
    exact: Distance
    reference: Distance
    seconds: float

    @property
    def ok(self) -> bool:
        """Both distances within their bounds."""
        return self.exact.ok and self.reference.ok


@dataclass(frozen=True, slots=True)
class NumbersResult:
    """The numbers of all layers. ``skipped`` says why there are none; None when there are."""

    device: str
    backend: str
    tokens: int
    seed: int
    layers: tuple[LayerNumbers, ...] = ()
    skipped: str | None = None


@dataclass(frozen=True, slots=True)
class Verification:
    """The answer of ``verify``.

    Attributes:
        model: the model as it was named.
        source: the source it was compared with, as it was named; None without.
        scheme: the scheme of what is stored quantized.
        structure, bytes, numbers: what was checked.
        problems: everything that is wrong.
    """

    model: str
    source: str | None
    scheme: str | None
    structure: StructureResult
    bytes: BytesResult
    numbers: NumbersResult
    problems: tuple[Problem, ...]

    @property
    def ok(self) -> bool:
        """True when nothing is wrong."""
        return not self.problems

    def to_json(self) -> dict[str, Any]:
        """The object that ``verify --json`` prints."""
        layers = [{**_finite(asdict(layer)), "ok": layer.ok} for layer in self.numbers.layers]
        return {
            "schema": SCHEMA,
            "model": self.model,
            "source": self.source,
            "scheme": self.scheme,
            "ok": self.ok,
            "structure": asdict(self.structure),
            "bytes": asdict(self.bytes),
            "numbers": {**asdict(self.numbers), "layers": layers},
            "problems": [asdict(problem) for problem in self.problems],
        }


def _finite(value: dict[str, Any]) -> dict[str, Any]:
    """NaN and infinity as null: JSON has neither."""
    return {
        key: _finite(item) if isinstance(item, dict)
        else None if isinstance(item, float) and not math.isfinite(item)
        else item
        for key, item in value.items()
    }  # fmt: skip
