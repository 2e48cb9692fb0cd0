"""From the name of a model to a directory: a local one, or a snapshot in the Hub's cache."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Final

from quarkconv.errors import SourceError

_REPO: Final = re.compile(r"[\w][\w.-]*/[\w][\w.-]*(@[\w][\w./-]*)?", re.ASCII)


def resolve_model(model: str | Path) -> Path:
    """The directory of a model.

    Args:
        model: a local directory, or a Hub repo id ``org/name`` or ``org/name@revision``. What exists on disk is never
            looked up on the Hub. A repo that is not in the cache is downloaded to it.

    Raises:
        SourceError: there is no such directory, and it is no repo id or the Hub does not have it.
    """
    path = Path(model)
    if path.exists() or not isinstance(model, str) or not _REPO.fullmatch(model):
        return path
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError

    repo, _, revision = model.partition("@")
    try:
        return Path(snapshot_download(repo, revision=revision or None))
    except (RepositoryNotFoundError, HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        raise SourceError(
            "The model is neither a local directory nor available from the Hub", code="shard-missing", file=model,
            expected="a directory, or a repo id that you can read",
            found=str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__,
            hint="check the name; for a private or gated repo run `hf auth login`",
        ) from error  # fmt: skip
