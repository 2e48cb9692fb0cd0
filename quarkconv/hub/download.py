"""The progress of huggingface_hub's downloads, reported instead of drawn."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from quarkconv.progress import Progress

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
    """Keep huggingface_hub from drawing bars."""
    from huggingface_hub.utils.tqdm import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    before = are_progress_bars_disabled()
    with warnings.catch_warnings():  # it warns where HF_HUB_DISABLE_PROGRESS_BARS differs and takes precedence
        warnings.simplefilter("ignore")
        disable_progress_bars()
        try:
            yield
        finally:
            if not before:
                enable_progress_bars()


def progress_bar(progress: Progress) -> Any:
    """A class that huggingface_hub uses as its progress bar; it draws nothing and reports the bytes.

    Args:
        progress: counts the bytes that were downloaded.
    """
    from huggingface_hub.utils import tqdm  # type: ignore[attr-defined]

    lock = threading.Lock()

    class ReportingBar(tqdm):
        """A disabled bar that reports what it counts."""

        def __init__(self, *args: Any, **options: Any) -> None:
            # Of several bars, the one that counts bytes on the disk is reported, not the one of bytes transferred.
            transfer = str(options.get("name")).endswith(".transfer")
            self._reports = options.get("unit") == "B" and not transfer
            super().__init__(*args, **{**options, "disable": True})  # type: ignore[no-untyped-call]

        def update(self, n: float | None = 1) -> bool | None:
            with lock:
                self.n += n or 0
            if self._reports:
                progress.advance(int(n or 0))
            return None

    return ReportingBar
