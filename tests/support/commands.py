"""Commands run in this process, and names that try to control a terminal."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any, Final, NamedTuple

HOSTILE: Final = "\x1b]0;owned\x07\x1b[31m\r\n[bold red]x[/] :boom: \u202e"
"""Terminal escapes, line ends, rich's markup, and a mark that turns text around."""


class Result(NamedTuple):
    """Exit code, stdout and stderr of a command."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> dict[str, Any]:
        """The one object on stdout."""
        assert self.out.endswith("}\n")
        assert self.out.count("\n") == 1
        value = json.loads(self.out)
        assert isinstance(value, dict)
        return value


Run = Callable[..., Result]


def assert_harmless(text: str) -> None:
    """Nothing in a text controls the terminal; escapes are shown as text."""
    assert not set("\x1b\x07\r\u202e") & set(text)
    assert "\\x1b" in text
