"""The output below the URL of an object store before anything is written to it: begun or resumed, never mixed.

:mod:`quarkconv.write.object_destination` says what lies there while a conversion is under way.
"""

from __future__ import annotations

import json
from contextlib import AbstractContextManager, nullcontext
from functools import cached_property
from typing import Any, Final

from quarkconv.cloud.objects import ConditionsUnsupportedError, Objects
from quarkconv.files.remote import Entry
from quarkconv.headers.file_names import CONFIG_NAME
from quarkconv.headers.unfinished import STATE_PATH, parse_state
from quarkconv.plan.manifest import Manifest
from quarkconv.plan.pieces import OutputShard
from quarkconv.plan.shares import Share
from quarkconv.write.earlier_objects import (
    earlier_objects,
    finished_meanwhile,
    manifest_of,
    refuse_others,
)
from quarkconv.write.object_destination import ObjectDestination, note_name
from quarkconv.write.state import JOINED, refuse_difference


class OutputObjects:
    """The objects below a URL as an output; errors of all methods as of :class:`quarkconv.write.destination.Output`.

    Args:
        location: the URL.
    """

    def __init__(self, location: str) -> None:
        self.location: Final = location

    @cached_property
    def _objects(self) -> Objects:
        """The objects, over connections that all methods share."""
        return Objects(self.location)

    def finished(self, digest: str) -> Manifest | None:
        """The manifest of a finished conversion by the same plan; None without one, or before it is finished.

        An output without config.json is one that is being deleted.
        """
        entries = self._objects.entries()
        is_whole = STATE_PATH not in entries and CONFIG_NAME in entries
        manifest = manifest_of(self._objects, entries) if is_whole else None
        return manifest if manifest is not None and manifest.plan == digest else None

    def has_begun(self) -> bool:
        """Whether there is an unfinished conversion below the URL."""
        return self._objects.entry(STATE_PATH) is not None

    def begin(
        self,
        state: dict[str, Any],
        plan_files: list[str],
        *,
        needed: int,  # noqa: ARG002 - a store has no end
        overwrite: bool,
    ) -> AbstractContextManager[ObjectDestination]:
        """Begin or resume a conversion. Nothing keeps another process away: both write the same bytes."""
        return nullcontext(self._opened(state, plan_files, overwrite=overwrite))

    def join(
        self,
        state: dict[str, Any],
        plan_files: list[str],
        share: Share | None,  # noqa: ARG002 - there are no locks
    ) -> AbstractContextManager[ObjectDestination]:
        """Begin or resume a conversion of several processes."""
        return nullcontext(self._opened(state, plan_files))

    def rejoin(
        self,
        state: dict[str, Any],
        plan_files: list[str],  # noqa: ARG002 - compared when the conversion was begun
        shard: OutputShard,
    ) -> AbstractContextManager[ObjectDestination]:
        """Go on with a conversion: what there is of one shard is looked up, and nothing is listed."""
        self._compare(state)
        entries = {}
        for name in (note_name(shard.file), shard.file):
            entry = self._objects.entry(name)
            if entry is None:
                break
            entries[name] = entry
        return nullcontext(self._destination(state, entries))

    def _opened(self, state: dict[str, Any], plan_files: list[str], *, overwrite: bool = False) -> ObjectDestination:
        objects = self._objects
        entries = objects.entries()
        begun = STATE_PATH in entries
        if begun and not overwrite:  # before objects are compared: another plan has other names
            self._compare(state)
        if overwrite:
            earlier_objects(objects, entries).delete()
        else:
            refuse_others(objects, entries, set(plan_files) if begun else set())
        recorded = json.dumps({**state, "files": plan_files}).encode()
        if overwrite or not (begun or _create(objects, recorded)):
            objects.put(STATE_PATH, recorded)
        elif not begun:  # another process may have been faster
            self._compare(state)
        return self._destination(state, {} if overwrite else entries)

    def _compare(self, state: dict[str, Any]) -> None:
        """Refuse a conversion that is not the one that was begun."""
        found = self._objects.get(STATE_PATH)
        if found is None:
            raise finished_meanwhile(self.location)
        refuse_difference(self.location, parse_state(found[0]) or {}, state)

    def _destination(self, state: dict[str, Any], entries: dict[str, Entry]) -> ObjectDestination:
        return ObjectDestination(self._objects, state["plan"], entries, shared=state.get("shares") == JOINED)


def _create(objects: Objects, state: bytes) -> bool:
    """Write plan.json if it does not exist; False if the store has no conditional writes."""
    try:
        objects.create(STATE_PATH, state)
    except ConditionsUnsupportedError:
        return False
    return True
