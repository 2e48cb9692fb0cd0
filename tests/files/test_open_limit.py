"""The limit on open files."""

from __future__ import annotations

import contextlib
import os
import resource

from quarkconv.files.open_limit import allow_open_files


def test_the_limit_allows_for_files_that_are_open_already() -> None:
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.ExitStack() as opened:
        opened.callback(resource.setrlimit, resource.RLIMIT_NOFILE, limits)
        for _ in range(100):
            opened.callback(os.close, os.open(os.devnull, os.O_RDONLY))
        soft = len(os.listdir("/proc/self/fd")) + 10
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, limits[1]))
        allow_open_files(80)
        for _ in range(80):
            opened.callback(os.close, os.open(os.devnull, os.O_RDONLY))
