"""The limit on open files of a process."""

from __future__ import annotations

import errno
import os
import resource

_OTHER_FILES = 64
"""Files that a process opens beside those that are counted."""


def allow_open_files(count: int) -> None:
    """Raise the soft limit on open files, as far as necessary and allowed, for ``count`` more than are open now."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        used = len(os.listdir("/proc/self/fd"))
    except OSError:  # it takes a file itself, and there is none left
        used = soft
    limit = used + count + _OTHER_FILES
    if soft != resource.RLIM_INFINITY and soft < limit:
        limit = limit if hard == resource.RLIM_INFINITY else min(limit, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))


def hint_about_open_files(error: OSError) -> str | None:
    """The hint for a file that cannot be opened because of that limit; None for other errors."""
    return "raise the limit with `ulimit -n`" if error.errno == errno.EMFILE else None
