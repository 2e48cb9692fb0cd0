"""What the Hub answers when it does not answer, in the words of this tool."""

from __future__ import annotations

from quarkconv.errors import HubError

TOKEN_HINT = "for a private or gated repo run `hf auth login`, or set HF_TOKEN"


def hub_error(error: Exception, place: str, file: str | None = None) -> HubError:
    """The error for a failed request.

    Args:
        error: what huggingface_hub or its HTTP client raised.
        place: the repo, with its revision where one was asked for.
        file: the file that was asked for.
    """
    from huggingface_hub import constants
    from huggingface_hub.errors import (
        BadRequestError,
        GatedRepoError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RemoteEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    named = place if file is None else f"{place}/{file}"
    found = _first_line(error)
    if isinstance(error, GatedRepoError):
        return HubError(
            "The repo is gated, and you have no access to it", file=named, found=found,
            hint=f"ask for access at {constants.ENDPOINT}/{place.partition('@')[0]}, then run `hf auth login` or set "
            "HF_TOKEN",
        )  # fmt: skip
    if isinstance(error, RepositoryNotFoundError | ValueError) and not isinstance(error, BadRequestError):
        return HubError(
            "The model is neither a local directory nor available from the Hub", file=named,
            expected="a directory, or a repo id that you can read", found=found, hint=f"check the name; {TOKEN_HINT}",
        )  # fmt: skip
    if isinstance(error, RevisionNotFoundError):
        return HubError(
            "The repo has no such revision", file=named, expected="a branch, a tag or a commit", found=found,
            hint=f"see {constants.ENDPOINT}/{place.partition('@')[0]}/commits/main",
        )  # fmt: skip
    if isinstance(error, RemoteEntryNotFoundError):
        return HubError("The repo has no such file", file=named, found=found, hint="give the command again")
    if isinstance(error, OfflineModeIsEnabled | LocalEntryNotFoundError):
        return HubError(
            "The Hub cannot be asked, and the cache does not have this model", file=named, found=found,
            hint="unset HF_HUB_OFFLINE, or download the model before with `hf download`",
        )  # fmt: skip
    if isinstance(error, HfHubHTTPError):
        status = error.response.status_code
        hint = TOKEN_HINT if status in (401, 403) else "wait a little, then give the same command again"
        return HubError("The Hub refused a request", file=named, found=found, hint=hint)
    return HubError(
        "The Hub cannot be reached", file=named, expected=f"an answer from {constants.ENDPOINT}", found=found,
        hint="check the network (HF_ENDPOINT, HTTPS_PROXY), then give the same command again",
    )  # fmt: skip


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:300] if lines else type(error).__name__
