"""Finished layers of an evaluation on disk, so that the same command resumes."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from quarkconv.evaluate.hidden_states import LayerOutput, Streams
from quarkconv.evaluate.sums import TENSORS, LayerSums


def state_folder() -> Path:
    """Where states are kept: ``$XDG_CACHE_HOME/quarkconv/evaluate``, or below ``~/.cache``."""
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(base) / "quarkconv" / "evaluate"


def state_key(*parts: object) -> str:
    """The name of an evaluation: a digest of everything that its hidden states depend on."""
    return hashlib.sha256(json.dumps([str(part) for part in parts]).encode()).hexdigest()[:24]


def fingerprint(root: Path) -> str:
    """Names, sizes and modification times of a checkpoint's files."""
    files = sorted(path for path in root.iterdir() if path.is_file())
    return json.dumps([(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in files])


class EvaluationState:
    """The state of one evaluation: a file that is replaced after each layer, and removed at the end."""

    def __init__(self, key: str, folder: Path | None = None) -> None:
        self.path = (folder or state_folder()) / f"{key}.safetensors"

    def load(self) -> Streams | None:
        """The streams of an earlier run; None without a readable state."""
        for unfinished in self.path.parent.glob(f"{self.path.stem}.[0-9]*"):
            if not Path(f"/proc/{unfinished.suffix[1:]}").exists():  # its process was killed while it wrote
                unfinished.unlink(missing_ok=True)
        try:
            with safe_open(self.path, framework="pt") as handle:
                about: dict[str, Any] = json.loads(handle.metadata()["streams"])
                outputs = {
                    name: [
                        LayerOutput(*(handle.get_tensor(f"{part}.{name}.{batch}") for part in parts))
                        for batch, parts in enumerate(batches)
                    ]
                    for name, batches in about["outputs"].items()
                }
                sums = []
                for number, values in enumerate(about["sums"]):
                    tensors = {name: handle.get_tensor(f"{name}.{number}") for name in values.pop("tensors")}
                    sums.append(LayerSums(**values, **tensors))
        except Exception:  # missing, cut off or of another version: the evaluation starts over
            return None
        return Streams(outputs, about["finished"], sums)

    def save(self, streams: Streams) -> None:
        """Replace the state.

        Raises:
            OSError: it cannot be written.
        """
        tensors: dict[str, Tensor] = {}
        outputs: dict[str, list[list[str]]] = {}
        for name, batches in streams.outputs.items():
            outputs[name] = []
            for batch, output in enumerate(batches):
                parts = {part: value for part, value in output._asdict().items() if value is not None}
                outputs[name].append(list(parts))
                tensors |= {f"{part}.{name}.{batch}": _on_host(value) for part, value in parts.items()}
        sums = []
        for number, item in enumerate(streams.sums):
            values = {name: getattr(item, name) for name in LayerSums.__slots__ if name not in TENSORS}
            held = [name for name in TENSORS if getattr(item, name) is not None]
            tensors |= {f"{name}.{number}": getattr(item, name) for name in held}
            sums.append({**values, "tensors": held})
        about = {"outputs": outputs, "finished": streams.finished, "sums": sums}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = self.path.with_suffix(f".{os.getpid()}")
        try:
            save_file(tensors, unfinished, metadata={"streams": json.dumps(about)})
            unfinished.replace(self.path)
        finally:
            unfinished.unlink(missing_ok=True)

    def remove(self) -> None:
        """Delete the file."""
        self.path.unlink(missing_ok=True)


def _on_host(tensor: Tensor) -> Tensor:
    """A computed tensor on the CPU; kernels of a GPU run on meanwhile."""
    if tensor.device.type != "cuda":
        return tensor.contiguous()
    with torch.cuda.stream(torch.cuda.Stream(tensor.device)):  # type: ignore[no-untyped-call]
        return tensor.contiguous().cpu()
