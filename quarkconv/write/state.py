"""The identity of a conversion: a later run resumes only work of the same identity."""

from __future__ import annotations

import hashlib
import json
import shlex
from pathlib import Path
from typing import Any, Final

from quarkconv.errors import UsageError
from quarkconv.plan.plan import Plan
from quarkconv.text import word
from quarkconv.version import own_version

FileState = tuple[str, int, int | str]
"""Name, size in bytes, and time of modification in ns of a source file, or its ETag where it is on the Hub."""

_SOURCE_WORD: Final = 2
"""Of the command: `quarkconv convert SOURCE`."""
_LONGEST: Final = 300
JOINED: Final = 0
"""The number of shares of a conversion whose workers take shards by leases."""

_LABELS: Final = {
    "quarkconv": "version of quarkconv",
    "target": "target",
    "max_shard_size": "largest shard size",
    "quantize": "--quantize",
    "exclude": "--exclude",
    "scheme": "--scheme",
    "mtp": "--mtp",
    "config": "config.json of the source",
    "copies": "other files of the source",
    "shares": "number of parts",
}


def plan_state(
    plan: Plan, digest: str, files: list[FileState], source: str, output: Path | str, *, shares: int | None = None
) -> dict[str, Any]:
    """The identity of a conversion, and the command that resumes it.

    Args:
        plan, digest: the plan and its digest.
        files: the source's files as they are now.
        source, output: where they are; part of the command, not of the identity. The output of one rank is its folder.
        shares: the number of shares that the work is divided into, or :data:`JOINED`; None where one process does all
            that is left.
    """
    whole = plan.rank.is_whole
    absolute = output if isinstance(output, str) else str(output.absolute())
    out = absolute if whole else absolute.rpartition("/")[0]
    words = ["quarkconv", "convert", source, "--to", plan.target, "--out", out, *plan.options.words()]
    words += [] if whole else [f"--{plan.rank.parallel}", str(plan.rank.world_size)]
    config = json.dumps(plan.config, sort_keys=True)
    return {
        "quarkconv": own_version(),
        "target": plan.target,
        "max_shard_size": plan.max_shard_size,
        **{key: value or None for key, value in plan.options.to_json().items()},
        "config": _hash(config),
        "copies": [*map(list, plan.copies), *([name, _hash(text)] for name, text in plan.texts)],
        "sources": [list(file) for file in files],
        "plan": digest,
        "shares": shares,
        "shards": len(plan.shards),
        "command": shlex.join([*words, "--max-shard-size", str(plan.max_shard_size)]),
    }


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def refuse_difference(output: str, begun: object, now: dict[str, Any]) -> None:
    """Refuse to resume an unfinished conversion that is not the one requested now.

    Args:
        output: where it was begun.
        begun: its identity as it was recorded.
        now: the identity of the one requested.

    Raises:
        UsageError: they differ; the error names the difference.
    """
    found = difference(begun, now)
    if found is not None:
        start_over = "start over with --overwrite" if now.get("shares") is None else "delete the output to start over"
        raise UsageError(
            "The output holds a different unfinished conversion",
            file=output,
            expected="the same source, unchanged, and the same options",
            found=found,
            hint=f"run its original command, or {start_over}",
        )


def difference(begun: object, now: dict[str, Any]) -> str | None:
    """The difference between an unfinished conversion and the requested one; None if it can be resumed."""
    if not isinstance(begun, dict):
        return "unreadable notes"
    # One process may finish the shares of others; a share cannot join a conversion that was divided in another way.
    divided = now.get("shares") is None or begun.get("shares") == now.get("shares")
    if divided and all(begun.get(key) == now[key] for key in ("plan", "sources", "quarkconv")):
        return None
    if (sources := _other_source(begun, now)) is not None:
        return sources
    for key, label in _LABELS.items():
        before, after = begun.get(key), now.get(key)
        if before != after and (key != "shares" or not divided):
            if key == "shares":
                return f"{label} {_divided(before)}, now {_divided(after)}"
            if key in ("config", "copies"):
                return f"{label} {'has' if key == 'config' else 'have'} changed"
            return f"{label} {word(before)}, now {after}"
    return _source_difference(begun.get("sources"), now["sources"]) or "another plan"


def _other_source(begun: dict[str, Any], now: dict[str, Any]) -> str | None:
    """The names of both sources, where neither they nor their files are the same."""
    if begun.get("sources") == now["sources"] and begun.get("config") == now["config"]:
        return None
    try:
        before, after = (shlex.split(state["command"])[_SOURCE_WORD] for state in (begun, now))
    except (KeyError, AttributeError, ValueError, IndexError):
        return None
    return None if before == after else f"source {before[:_LONGEST]}, now {after}"


def _divided(shares: object) -> str:
    return "chosen by --join" if shares == JOINED else word(1 if shares is None else shares)


def _source_difference(before: Any, after: list[list[Any]]) -> str | None:
    try:
        old = {str(name): (size, time) for name, size, time in before}
    except (TypeError, ValueError):
        return "unreadable notes"
    new = {name: (size, time) for name, size, time in after}
    if old.keys() != new.keys():
        return f"other shards in the source: {word(sorted(old.keys() ^ new.keys())[0])}"
    for name, (size, _) in new.items():
        if old[name][0] != size:
            return f"{name} of the source had {word(old[name][0])} bytes, now {size}"
        before_state, now_state = old[name][1], new[name][1]
        if before_state != now_state:
            if isinstance(before_state, str) != isinstance(now_state, str):
                now_on_disk = isinstance(before_state, str)
                return f"a source on {'the Hub, now on disk' if now_on_disk else 'disk, now on the Hub'}"
            if isinstance(now_state, str):
                return f"{name} of the source had the ETag {word(before_state)}, now {now_state}"
            return f"{name} of the source was written to since"
    return None
