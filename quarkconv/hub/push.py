"""Uploading a finished conversion to the Hub; asked for explicitly, never done otherwise."""

from __future__ import annotations

import re
from contextlib import nullcontext
from pathlib import Path
from typing import Final

from quarkconv.errors import UsageError, WriteError

_REPO: Final = re.compile(r"[\w][\w.-]*/[\w][\w.-]*", re.ASCII)


def prepare_push(repo: str, *, private: bool = False) -> None:
    """Make the repo if there is none, so that a name or token that does not do is told before the conversion.

    Args:
        repo: ``org/name``.
        private: whether a repo that is made now is private; one that exists stays as it is.

    Raises:
        UsageError: the name is none of a repo.
        WriteError: the Hub refuses.
    """
    if not _REPO.fullmatch(repo):
        raise UsageError("This is no name of a repo", expected="org/name", found=repr(repo)[:100])
    from huggingface_hub import HfApi, constants

    try:
        HfApi(endpoint=constants.ENDPOINT).create_repo(repo, private=private or None, exist_ok=True)
    except Exception as error:  # of its HTTP client, of its own, OSError, ValueError
        raise _refused(repo, error) from error


def push_folder(folder: Path, repo: str, message: str, *, bars: bool = True) -> str:
    """Upload a folder; what the repo has already is not sent again, so a second call resumes. Returns its address.

    Args:
        folder: a finished conversion.
        repo: ``org/name``, made by :func:`prepare_push`.
        message: of the commit.
        bars: whether huggingface_hub shows how far it has come.

    Raises:
        WriteError: the upload failed.
    """
    from huggingface_hub import HfApi, constants

    from quarkconv.hub.download import no_bars

    api = HfApi(endpoint=constants.ENDPOINT)
    try:
        # From 2.0 on upload_folder does what upload_large_folder did: parallel, in several commits, resumable.
        large = getattr(api, "upload_large_folder", None)
        with nullcontext() if bars else no_bars():
            if large is not None:
                large(repo_id=repo, folder_path=folder, repo_type="model", print_report=False)
            else:
                api.upload_folder(repo_id=repo, folder_path=folder, commit_message=message)
    except Exception as error:  # of its HTTP client, of its own, OSError, ValueError
        raise _refused(repo, error) from error
    return f"{constants.ENDPOINT}/{repo}"


def _refused(repo: str, error: Exception) -> WriteError:
    from quarkconv.hub.errors import first_line, network_hint

    hint = "run `hf auth login` with a token that may write there, then give the same command again: it resumes"
    return WriteError(
        "The upload to the Hub failed; what was converted is kept", file=repo, found=first_line(error),
        hint=network_hint(error) or hint,
    )  # fmt: skip
