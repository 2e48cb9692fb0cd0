"""What a conversion will write, or wrote, as data and as JSON."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quarkconv.headers.checkpoint import CONFIG_NAME, INDEX_NAME, MANIFEST_NAME
from quarkconv.plan.plan import Plan

if TYPE_CHECKING:
    from quarkconv.plan.manifest import Manifest


@dataclass(frozen=True, slots=True)
class Part:
    """The part of a model that one rank gets: its plan, and the folder that it is written to."""

    plan: Plan
    folder: Path


@dataclass(frozen=True, slots=True)
class ConversionResult:
    """A finished conversion.

    Attributes:
        source: directory of the source, or ``org/name@commit`` of one that was read from the Hub.
        output: directory of the output.
        parts: what each rank got; a single part of a whole model.
        manifests: the manifest of each part, in order.
    """

    source: Path | str
    output: Path
    parts: tuple[Part, ...]
    manifests: tuple[Manifest, ...]

    @property
    def plan(self) -> Plan:
        """The plan; where there are several ranks, that of the first."""
        return self.parts[0].plan

    @property
    def manifest(self) -> Manifest:
        """The manifest; where there are several ranks, that of the first."""
        return self.manifests[0]

    def to_json(self) -> dict[str, Any]:
        """The object that ``convert --json`` prints."""
        value = conversion_json(self.source, self.output, self.parts, dry_run=False)
        return value if not self.plan.rank.is_whole else {**value, "plan": self.manifest.plan}


def conversion_json(source: Path | str, output: Path, parts: tuple[Part, ...], *, dry_run: bool) -> dict[str, Any]:
    """A conversion as ``convert --json`` prints it; with several ranks, one object for each under ``ranks``."""
    plans = [_part_json(source, part) for part in parts]
    if parts[0].plan.rank.is_whole:
        return {**plans[0], "dry_run": dry_run}
    shared = ("schema", "source", "target", "scheme", "findings")
    return {
        **{key: plans[0][key] for key in shared},
        "output": str(output),
        "bytes": sum(plan["bytes"] for plan in plans),
        "ranks": [{**part.plan.rank.to_json(), **plan} for part, plan in zip(parts, plans, strict=True)],
        "dry_run": dry_run,
    }


def _part_json(source: Path | str, part: Part) -> dict[str, Any]:
    plan = part.plan
    tensors = [tensor for shard in plan.shards for tensor in shard.tensors]
    return {
        "schema": "quarkconv.convert/1",
        "source": str(source),
        "output": str(part.folder),
        "target": plan.target,
        "scheme": plan.scheme,
        "moe": {
            "layers": list(plan.moe.layers),
            "experts": plan.moe.experts,
            "hidden_size": plan.moe.hidden_size,
            "intermediate_size": plan.moe.intermediate_size,
        },
        "shards": len(plan.shards),
        "tensors": len(tensors),
        "pieces": sum(len(tensor.pieces) for tensor in tensors),
        "bytes": plan.output_bytes,
        "files": [
            *(shard.file for shard in plan.shards),
            *(CONFIG_NAME, INDEX_NAME, MANIFEST_NAME),
            *(copy.name for copy in plan.copies),
            *(text.name for text in plan.texts),
        ],
        "findings": [asdict(loss) for loss in plan.losses],
    }
