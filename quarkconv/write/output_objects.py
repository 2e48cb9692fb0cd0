"""The output below the URL of an object store before anything is written to it: begun or resumed, never mixed.

:mod:`quarkconv.write.object_destination` says what lies there while a conversion is under way.
"""

from __future__ import annotations

import json
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

from quarkconv.cloud.objects import ConditionsUnsupportedError, Objects
from quarkconv.plan.manifest import Manifest
from quarkconv.plan.shares import Share
from quarkconv.write.earlier_objects import (
    STATE,
    delete_earlier,
    finished_meanwhile,
    manifest_of,
    parsed,
    refuse_others,
)
from quarkconv.write.object_destination import ObjectDestination
from quarkconv.write.state import JOINED, refuse_difference


@dataclass(frozen=True, slots=True)
class OutputObjects:
    """The objects below a URL as an output; errors of all methods as of :class:`quarkconv.write.destination.Output`.

    Attributes:
        location: the URL.
    """

    location: str

    def finished(self, digest: str) -> Manifest | None:
        """The manifest of a finished conversion by the same plan; None without one, or before it is finished."""
        objects = Objects(self.location)
        entries = objects.entries()
        manifest = None if STATE in entries else manifest_of(objects, entries)
        return manifest if manifest is not None and manifest.plan == digest else None

    def has_begun(self) -> bool:
        """Whether there is an unfinished conversion below the URL."""
        return Objects(self.location).entry(STATE) is not None

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

    def _opened(self, state: dict[str, Any], plan_files: list[str], *, overwrite: bool = False) -> ObjectDestination:
        objects = Objects(self.location)
        entries = objects.entries()
        begun = STATE in entries
        if overwrite:
            delete_earlier(objects, entries)
        else:
            refuse_others(objects, entries, set(plan_files) if begun else set(), unfinished=begun)
        recorded = json.dumps({**state, "files": plan_files}).encode()
        if overwrite or not (begun or _create(objects, recorded)):
            objects.put(STATE, recorded)
        else:
            found = objects.get(STATE)
            if found is None:
                raise finished_meanwhile(self.location)
            refuse_difference(self.location, parsed(found[0]), state)
        if overwrite:
            entries = {}
        return ObjectDestination(objects, state["plan"], entries, shared=state.get("shares") == JOINED)


def _create(objects: Objects, state: bytes) -> bool:
    """Write plan.json if it does not exist; False if the store has no conditional writes."""
    try:
        objects.create(STATE, state)
    except ConditionsUnsupportedError:
        return False
    return True
