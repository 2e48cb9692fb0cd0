"""Worker processes of throughput.py, one for each backend."""

from __future__ import annotations

import argparse
import json
import os
import re
import select
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

from filled import DISTINCT, SHARED, TURN
from worker import BACKENDS

REPACKED = ("humming", "humming-int8")
"""Backends with layouts of their own; the others can share the parameters of one. They load first, since repacking
takes more memory than the model."""


class Server:
    """A worker process with one LLM. It answers one request at a time: "load", then names of figures."""

    def __init__(self, name: str, model: Path, options: argparse.Namespace, folder: Path) -> None:
        reading, writing = os.pipe()
        environment = os.environ | BACKENDS[name][1] | {"VLLM_CACHE_ROOT": str(folder / f"cache-{name}")}
        if "VLLM_TUNED_CONFIG_FOLDER" in BACKENDS[name][1]:
            environment["VLLM_TUNED_CONFIG_FOLDER"] = str(options.tables.resolve())
        self.turn = folder / f"turn-{name}"
        environment[TURN] = str(self.turn)
        if options.share and name not in REPACKED:
            environment[SHARED] = str(folder / "shared")
        if options.distinct is not None:
            environment[DISTINCT] = str(options.distinct)
        paths = [str(folder), str(HERE), *filter(None, [os.environ.get("PYTHONPATH")])]
        environment["PYTHONPATH"] = os.pathsep.join(paths)
        self.name = name
        self.log = folder / f"{name}.log"
        given = {
            key: getattr(options, key) for key in ("cache_bytes", "tensor_parallel", "capture_prefill", "new_tokens")
        }
        given["traces"] = str(folder / f"traces-{name}") if options.profile else ""
        command = [sys.executable, str(HERE / "worker.py"), name, str(model), str(writing), json.dumps(given)]
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=log, stderr=log, env=environment, pass_fds=[writing]
            )
        os.close(writing)
        self.results = os.fdopen(reading)

    def request(self, what: str) -> None:
        """Send a request; `read` returns the answer."""
        assert self.process.stdin is not None
        with suppress(BrokenPipeError):
            self.process.stdin.write(f"{what}\n".encode())
            self.process.stdin.flush()

    def read(self) -> Any:
        """The next answer, or None if the process has ended."""
        line = self.results.readline()
        return json.loads(line) if line else None

    def measure(self, figure: str) -> Any:
        """Measure a figure once, or `PROFILE`; None if the process has ended."""
        self.request(figure)
        return self.read()

    def wait(self, seconds: float) -> None:
        """Until there is an answer to read; after so many seconds the process is ended."""
        if not select.select([self.results], [], [], max(seconds, 0.0))[0]:
            self.process.kill()

    def load(self) -> None:
        """Let it build its model; returns when the weights are loaded, or the process has ended."""
        self.turn.touch()
        while self.process.poll() is None and b"Model loading took" not in self.log.read_bytes():
            time.sleep(0.5)

    def end(self) -> None:
        """Let the process end, without waiting for it."""
        assert self.process.stdin is not None
        with suppress(BrokenPipeError):
            self.process.stdin.close()

    def stop(self) -> None:
        """End the process."""
        self.end()
        try:
            self.process.wait(60)
        except subprocess.TimeoutExpired:
            self.process.kill()

    def backend_lines(self) -> list[str]:
        """What vLLM logged about the backend of the experts, without times."""
        text = self.log.read_text(errors="replace")
        lines = re.findall(r"(?:Using [^\n]*MoE backend[^\n]*|quarkconv: [^\n]*)", text)
        return list(dict.fromkeys(lines))
