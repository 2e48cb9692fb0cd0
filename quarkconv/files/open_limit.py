"""How many files a process may have open."""

from __future__ import annotations

import errno
import resource

_OTHER_FILES = 64
"""Open files that a process needs beside those that it counts."""


def allow_open_files(count: int) -> None:
    """Raise the limit on open files, as far as it has to be and may be, for `count` of them beside the others."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = count + _OTHER_FILES
    if soft != resource.RLIM_INFINITY and soft < wanted:
        wanted = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def hint_about_open_files(error: OSError) -> str | None:
    """What to do about a file that cannot be opened, if it is for that limit."""
    return "raise the limit with `ulimit -n`" if error.errno == errno.EMFILE else None
