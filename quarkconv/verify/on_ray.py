"""Verification as tasks of a Ray cluster: a part for each layer, whose results are merged."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from quarkconv.cluster import ClusterTasks
from quarkconv.description.description import describe
from quarkconv.hub.locate import locate
from quarkconv.load.layer_reads import LayerPart
from quarkconv.load.select import select_layers
from quarkconv.plan.shares import MAX_SHARES, Share
from quarkconv.progress import SILENT, Progress
from quarkconv.verify.merged import merged, verification_from_json
from quarkconv.verify.results import Verification

_BASE_BYTES: Final = 2**30
"""Memory of a task beside the codes of its layers: torch, and one expert at a time in float64."""


def verify_on_ray(
    model: str | Path,
    source: str | Path | None = None,
    device: str = "auto",
    *,
    address: str = "auto",
    progress: Progress = SILENT,
    **options: Any,
) -> Verification:
    """As :func:`quarkconv.verify_checkpoint`, on a Ray cluster whose nodes all see the models under the same names.

    Args:
        model, source, progress: as of :func:`quarkconv.verify_checkpoint`.
        device: ``cpu``; ``cuda`` reserves a GPU for each task; ``auto`` does where the cluster has GPUs.
        address: of the cluster, as ``ray.init`` takes it.
        options: the others of :func:`quarkconv.verify_checkpoint`.

    Raises:
        UsageError: Ray is not installed, or the cluster cannot be reached; errors of
            :func:`quarkconv.verify_checkpoint`.
    """
    named = _absolute(model)
    description = describe(locate(named, progress=progress).files, progress)
    layers = select_layers(description.int8_layers, options.get("layers"), named)
    count = min(max(len(layers), 1), MAX_SHARES)
    memory = _BASE_BYTES + 3 * max((LayerPart(layer).nbytes for layer in layers), default=0)
    progress.step("Checking", count, "part")
    with ClusterTasks(address, memory, gpus=1 if device == "cuda" else 0) as cluster:
        paths = {name: _absolute(options[name]) for name in ("unquantized", "activations") if options.get(name)}
        common = {"source": None if source is None else _absolute(source), "device": device, **options, **paths}
        common = cluster.put({"model": named, **common, "share": None})
        results = {}
        for number, value in cluster.run([(_part, common, number, count) for number in range(1, count + 1)]):
            results[f"part {number}"] = value
            progress.advance()
    return verification_from_json(merged(results))


def _part(common: dict[str, Any], number: int, count: int) -> tuple[int, dict[str, Any]]:
    from quarkconv.verify.verify import verify_checkpoint

    verify: Callable[..., Verification] = verify_checkpoint
    return number, verify(**{**common, "share": Share(number, count)}).to_json()


def _absolute(model: str | Path) -> str:
    """The name of a model for a task, whose working directory is another."""
    return str(Path(model).absolute()) if Path(model).exists() else str(model)
