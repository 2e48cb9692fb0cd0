"""Uploading a finished conversion to the Hub, only on request."""

from __future__ import annotations

import shutil
from contextlib import nullcontext, suppress
from pathlib import Path

from quarkconv.errors import WriteError
from quarkconv.progress import SILENT, Progress


def create_repo(repo: str, *, private: bool, progress: Progress = SILENT) -> None:
    """Create a repo, if it does not exist.

    Args:
        repo: ``org/name``.
        private: whether a new repo is private; an existing one is not changed.
        progress: receives that the Hub is contacted.

    Raises:
        WriteError: the Hub refuses.
    """
    from huggingface_hub import HfApi, constants

    progress.step("Contacting the Hub")
    try:
        HfApi(endpoint=constants.ENDPOINT).create_repo(repo, private=private or None, exist_ok=True)
    except Exception as error:  # of its HTTP client, of its own, OSError, ValueError
        raise _refused("The repo for --push cannot be created", repo, error) from error


def upload_folder(folder: Path, repo: str, message: str, *, bars: bool = False) -> str:
    """Upload a folder and return the URL of the repo. Files that the repo holds are skipped, so a second call resumes.

    Args:
        folder: a finished conversion.
        repo: ``org/name``, created by :func:`create_repo`.
        message: of the commit.
        bars: whether huggingface_hub shows progress bars.

    Raises:
        WriteError: the upload failed.
    """
    from huggingface_hub import HfApi, constants

    from quarkconv.hub.download import no_bars

    api = HfApi(endpoint=constants.ENDPOINT)
    try:
        # Since 2.0, upload_folder works as upload_large_folder did: parallel, in several commits, resumable.
        large = getattr(api, "upload_large_folder", None)
        with nullcontext() if bars else no_bars():
            if large is not None:
                large(repo_id=repo, folder_path=folder, repo_type="model", print_report=False)
                _remove_cache(folder)
            else:
                api.upload_folder(repo_id=repo, folder_path=folder, commit_message=message)
    except Exception as error:  # of its HTTP client, of its own, OSError, ValueError
        raise _refused("The upload to the Hub failed; the converted files are kept", repo, error) from error
    return f"{constants.ENDPOINT}/{repo}"


def _remove_cache(folder: Path) -> None:
    """Remove the notes of ``upload_large_folder``: --overwrite refuses a folder with files that are not quarkconv's."""
    shutil.rmtree(folder / ".cache" / "huggingface", ignore_errors=True)
    with suppress(OSError):
        (folder / ".cache").rmdir()


def _refused(message: str, repo: str, error: Exception) -> WriteError:
    from huggingface_hub.errors import OfflineModeIsEnabled

    from quarkconv.hub.errors import first_line, network_hint

    cause = "run `hf auth login` with a token that may write there"
    if isinstance(error, OfflineModeIsEnabled):
        cause = "unset HF_HUB_OFFLINE"
    hint = network_hint(error) or f"{cause}, then run the same command again"
    return WriteError(message, file=repo, found=first_line(error), hint=hint)
