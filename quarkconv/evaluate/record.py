"""The inputs of MoE layers as a safetensors file, written batch by batch."""

from __future__ import annotations

import json
import os
from pathlib import Path
from threading import Lock
from types import TracebackType
from typing import Any, Final

import torch
from torch import Tensor

from quarkconv.errors import WriteError
from quarkconv.evaluate.request import RECORD_CONTENT

_HEADER: Final = 2**20
"""Bytes before the tensors. A header that is shorter is filled up with spaces, as the format allows."""
_DTYPES: Final = {torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32"}


class Record:
    """A file under way; a context manager. The file has its name once it is complete.

    Args:
        path: the file.
        rows: tokens of each tensor.

    Raises:
        WriteError: it cannot be written; also of every method.
    """

    def __init__(self, path: str | Path, rows: int) -> None:
        self._path, self._rows = Path(path), rows
        self._unfinished = self._path.with_name(f"{self._path.name}.unfinished")
        self._tensors: dict[str, tuple[int, Tensor]] = {}
        self._end = 0
        self._lock = Lock()

    def __enter__(self) -> Record:
        try:
            self._file = os.open(self._unfinished, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o644)
        except OSError as error:
            raise self._error(error) from error
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self._finish()
        finally:
            os.close(self._file)
            self._unfinished.unlink(missing_ok=True)

    def add(self, name: str, first: int, rows: Tensor) -> None:
        """Write rows of a tensor; any thread may do so.

        Args:
            name: of the tensor.
            first: place of the first row.
            rows: floats [n, H] on the CPU.
        """
        size = rows[0].nbytes
        with self._lock:
            if name not in self._tensors:
                self._tensors[name] = (self._end, rows[:0])
                self._end += self._rows * size
            start, _ = self._tensors[name]
        self._write(rows.contiguous().view(torch.uint8).numpy().data.cast("B"), _HEADER + start + first * size)

    def _finish(self) -> None:
        about: dict[str, Any] = {"__metadata__": {"content": RECORD_CONTENT}}
        header = about | {
            name: {
                "dtype": _DTYPES[kind.dtype],
                "shape": [self._rows, kind.shape[1]],
                "data_offsets": [start, start + self._rows * kind.shape[1] * kind.element_size()],
            }
            for name, (start, kind) in self._tensors.items()
        }
        text = json.dumps(header).encode().ljust(_HEADER - 8)
        self._write(memoryview(len(text).to_bytes(8, "little") + text), 0)
        try:
            self._unfinished.replace(self._path)
        except OSError as error:
            raise self._error(error) from error

    def _write(self, values: memoryview, at: int) -> None:
        try:
            while values:
                count = os.pwrite(self._file, values, at)
                values, at = values[count:], at + count
        except OSError as error:
            raise self._error(error) from error

    def _error(self, error: OSError) -> WriteError:
        found = error.strerror or str(error)
        return WriteError(
            "The recorded inputs cannot be written",
            file=str(self._path),
            found=found,
            hint="free space there, or name another file with --record; the same command resumes",
        )
