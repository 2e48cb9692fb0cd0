"""The version of this package."""

from __future__ import annotations


def own_version() -> str:
    """The installed version of quarkconv."""
    from importlib.metadata import version  # imports the email package, and most commands need no version

    return version("quarkconv")
