"""The result of a conversion, planned or finished, as data and as JSON."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quarkconv.errors import UsageError
from quarkconv.headers.file_names import CONFIG_NAME, INDEX_NAME, MANIFEST_NAME
from quarkconv.plan.plan import Plan
from quarkconv.plan.shares import Share
from quarkconv.write.modes import Join, Mode

if TYPE_CHECKING:
    from quarkconv.plan.manifest import Manifest


@dataclass(frozen=True, slots=True)
class RankOutput:
    """The output of one rank: its plan, and its directory or URL. A whole model is the output of a single rank."""

    plan: Plan
    location: Path | str

    @property
    def folder(self) -> Path:
        """The directory."""
        return _directory(self.location)


@dataclass(frozen=True, slots=True)
class ConversionResult:
    """A finished conversion.

    Attributes:
        source: directory of the source, or ``org/name@commit`` or the URL of a remote one.
        location: directory of the output, or its URL in an object store.
        outputs: one for each rank; a whole model has a single one.
        manifests: the manifest of each output, in order.
    """

    source: Path | str
    location: Path | str
    outputs: tuple[RankOutput, ...]
    manifests: tuple[Manifest, ...]

    @property
    def output(self) -> Path:
        """The directory of the output.

        Raises:
            UsageError: the output is in an object store; see :attr:`location`.
        """
        return _directory(self.location)

    @property
    def plan(self) -> Plan:
        """The plan; where there are several ranks, that of the first."""
        return self.outputs[0].plan

    @property
    def manifest(self) -> Manifest:
        """The manifest; where there are several ranks, that of the first."""
        return self.manifests[0]

    @property
    def commit_message(self) -> str:
        """The message of a commit that holds the output."""
        return f"{self.plan.target} by quarkconv, plan {self.manifest.plan[:12]}"

    def to_json(self) -> dict[str, Any]:
        """The object that ``convert --json`` prints."""
        value = conversion_json(self.source, self.location, self.outputs, dry_run=False)
        return value if not self.plan.rank.is_whole else {**value, "plan": self.manifest.plan}


@dataclass(frozen=True, slots=True)
class Outcome:
    """What one call did of a conversion.

    Attributes:
        mode: how it carried the conversion out.
        result: the conversion, if this call saw it finished; None while other processes are at work.
        shards, nbytes: number and bytes of the shards that it wrote, where shards are taken by leases.
    """

    mode: Mode
    result: ConversionResult | None
    shards: int = 0
    nbytes: int = 0

    def finished(self) -> ConversionResult:
        """The result of a call that finishes the conversion, or fails."""
        if self.result is None:
            raise ValueError("other processes have to finish this conversion")
        return self.result

    def to_json(self) -> dict[str, Any]:
        """What ``convert --json`` prints beside the plan."""
        value: dict[str, Any] = {}
        if isinstance(self.mode, Join):
            value["joined"] = {"shards": self.shards, "bytes": self.nbytes}
        if isinstance(self.mode, Join | Share):
            value["finished"] = self.result is not None
        return value if self.result is None else value | self.result.to_json()


def conversion_json(
    source: Path | str, output: Path | str, outputs: tuple[RankOutput, ...], *, dry_run: bool
) -> dict[str, Any]:
    """A conversion as ``convert --json`` prints it; with several ranks, one object for each under ``ranks``."""
    plans = [_output_json(source, output) for output in outputs]
    if outputs[0].plan.rank.is_whole:
        return {**plans[0], "dry_run": dry_run}
    shared = ("schema", "source", "target", "scheme", "quantized", "findings")
    return {
        **{key: plans[0][key] for key in shared},
        "output": str(output),
        "bytes": sum(plan["bytes"] for plan in plans),
        "ranks": [{**item.plan.rank.to_json(), **plan} for item, plan in zip(outputs, plans, strict=True)],
        "dry_run": dry_run,
    }


def _output_json(source: Path | str, output: RankOutput) -> dict[str, Any]:
    plan = output.plan
    tensors = [tensor for shard in plan.shards for tensor in shard.tensors]
    return {
        "schema": "quarkconv.convert/1",
        "source": str(source),
        "output": str(output.location),
        "target": plan.target,
        "scheme": plan.scheme,
        "quantized": plan.options.quantizes,  # the source has another scheme, or none, in some modules
        "moe": None
        if plan.moe is None
        else {
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


def _directory(location: Path | str) -> Path:
    if isinstance(location, str):
        raise UsageError("The output is not a directory", file=location, hint="read it by its URL")
    return location
