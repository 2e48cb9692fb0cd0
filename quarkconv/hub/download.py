"""How far huggingface_hub has come, when it is told not to draw bars of its own."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from quarkconv.files.base import Progress, Reading

if TYPE_CHECKING:
    from quarkconv.hub.repo import HubRepo


def missing_bytes(repo: HubRepo) -> int:
    """Bytes of the files of a commit that are not in the cache."""
    from huggingface_hub import try_to_load_from_cache

    return sum(
        entry.size
        for name, entry in repo.entries.items()
        if not isinstance(try_to_load_from_cache(repo.repo, name, revision=repo.commit), str)
    )


@contextmanager
def no_bars() -> Iterator[None]:
    """Keep huggingface_hub from drawing."""
    from huggingface_hub.utils.tqdm import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    before = are_progress_bars_disabled()
    with warnings.catch_warnings():  # it warns where HF_HUB_DISABLE_PROGRESS_BARS says something else, and wins
        warnings.simplefilter("ignore")
        disable_progress_bars()
        try:
            yield
        finally:
            if not before:
                enable_progress_bars()


def counted(reading: Progress, total: int | None) -> Any:
    """A class for huggingface_hub to use in place of its bars, which draws nothing and tells what it was told.

    Args:
        reading: told how many bytes were downloaded.
        total: bytes that are to be downloaded; None where that is not known.
    """
    from huggingface_hub.utils import tqdm  # type: ignore[attr-defined]

    lock = threading.Lock()
    done = 0

    class Counted(tqdm):
        """A bar of huggingface_hub as one that is switched off, but for what it counts."""

        def __init__(self, *args: Any, **options: Any) -> None:
            # Of several bars the one of bytes that are on the disk is meant, and not of those that came over the line.
            transfer = str(options.get("name")).endswith(".transfer")
            self._counts = options.get("unit") == "B" and not transfer
            super().__init__(*args, **{**options, "disable": True})  # type: ignore[no-untyped-call]

        def update(self, n: float | None = 1) -> bool | None:
            nonlocal done
            with lock:
                self.n += n or 0
                if self._counts:
                    done += int(n or 0)
                    reading(Reading("download", done, None if total is None else max(total, done), in_bytes=True))
            return None

    reading(Reading("download", 0, total, in_bytes=True))
    return Counted
