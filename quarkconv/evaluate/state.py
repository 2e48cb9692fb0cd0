"""Finished layers of an evaluation on disk, so that the same command resumes."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import torch
from safetensors import safe_open
from torch import Tensor

from quarkconv.errors import WriteError
from quarkconv.evaluate.hidden_states import LayerOutput, Streams
from quarkconv.evaluate.sums import TENSORS, LayerSums
from quarkconv.text import size

_DTYPES: Final = {
    torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32", torch.float64: "F64", torch.bool: "BOOL",
    torch.int8: "I8", torch.uint8: "U8", torch.int16: "I16", torch.int32: "I32", torch.int64: "I64",
}  # fmt: skip
"""Of what a state holds, as safetensors names them."""


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

    def require_room(self, nbytes: int) -> None:
        """Refuse to begin where the disk does not hold so many bytes twice: a state is written beside the one before.

        Raises:
            WriteError: the disk is too full.
        """
        folder = next(parent for parent in self.path.parents if parent.exists())
        before = self.path.stat().st_size if self.path.exists() else 0
        free = shutil.disk_usage(folder).free + before
        if free < 2 * nbytes:
            raise WriteError(
                "The disk is too full for the hidden states of so many tokens",
                file=str(self.path),
                expected=f"{size(2 * nbytes)} free",
                found=size(free),
                hint="free space there, set XDG_CACHE_HOME, give fewer --windows, or --no-resume",
            )

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
                tensors |= {f"{part}.{name}.{batch}": value for part, value in parts.items()}
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
            _write(unfinished, tensors, {"streams": json.dumps(about)})
            unfinished.replace(self.path)
        finally:
            unfinished.unlink(missing_ok=True)

    def remove(self) -> None:
        """Delete the file."""
        self.path.unlink(missing_ok=True)


def _write(path: Path, tensors: Mapping[str, Tensor], about: Mapping[str, str]) -> None:
    """Write a safetensors file, with one tensor at a time in the host's memory."""
    header: dict[str, Any] = {"__metadata__": about}
    end = 0
    for name, tensor in tensors.items():
        start, end = end, end + tensor.nbytes
        header[name] = {"dtype": _DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors.values():
            file.write(_on_host(tensor).reshape(-1).view(torch.uint8).numpy().data)


def _on_host(tensor: Tensor) -> Tensor:
    """A computed tensor on the CPU; kernels of a GPU run on meanwhile."""
    if tensor.device.type != "cuda":
        return tensor.contiguous()
    with torch.cuda.stream(torch.cuda.Stream(tensor.device)):  # type: ignore[no-untyped-call]
        return tensor.contiguous().cpu()
