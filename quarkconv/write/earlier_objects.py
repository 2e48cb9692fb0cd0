"""The objects of an earlier conversion below the URL of an output: found, refused or deleted."""

from __future__ import annotations

from typing import NamedTuple

from quarkconv.cloud.bucket import Bucket
from quarkconv.cloud.objects import Objects
from quarkconv.cloud.uploads import clear_uploads
from quarkconv.errors import SourceError, UsageError
from quarkconv.files.remote import Entry
from quarkconv.headers.file_names import CONFIG_NAME, MANIFEST_NAME
from quarkconv.headers.unfinished import STAGING_NAME, STATE_PATH, parse_state
from quarkconv.plan.manifest import Manifest, read_manifest
from quarkconv.text import shortened


def finished_meanwhile(url: str) -> UsageError:
    """The error of a process that still worked on a conversion when another one finished it."""
    return UsageError(
        "Another process has finished this conversion",
        file=url,
        expected="an unfinished conversion",
        hint="nothing is left to do; check the output with `quarkconv verify`",
    )


def refuse_others(objects: Objects, entries: dict[str, Entry], expected: set[str]) -> None:
    """Refuse a URL with objects beside ``expected`` and the notes of conversions."""
    foreign = sorted(name for name in entries if name not in expected and not name.startswith(f"{STAGING_NAME}/"))
    if foreign:
        replaceable = MANIFEST_NAME in entries and not expected
        raise UsageError(
            "There are other objects at the output's URL",
            file=objects.url,
            expected="no objects below it",
            found=shortened(foreign[0]) + (f" and {len(foreign) - 1} more" if len(foreign) > 1 else ""),
            hint="replace the earlier conversion with --overwrite" if replaceable else "choose another --out",
        )


class Earlier(NamedTuple):
    """The objects of an earlier conversion, finished or not, and nothing else. Made by :func:`earlier_objects`.

    Attributes:
        objects: where they are.
        names: those that it wrote, or would have written, without the notes.
        present: the names of all objects.
    """

    objects: Objects
    names: set[str]
    present: list[str]

    def delete(self) -> None:
        """Delete them.

        config.json goes first, so that no engine takes the rest for a model if this is interrupted; the manifest and
        plan.json go last, so that the deletion can be repeated.
        """
        clear_uploads(self.objects.url, self.names)
        last = [name for name in (MANIFEST_NAME, STATE_PATH) if name in self.present]
        self.objects.delete(name for name in self.present if name == CONFIG_NAME)
        self.objects.delete(name for name in self.present if name != CONFIG_NAME and name not in last)
        for name in last:
            self.objects.delete([name])


def earlier_objects(objects: Objects, entries: dict[str, Entry]) -> Earlier:
    """The objects of an earlier conversion below a URL.

    Raises:
        UsageError: there are others, or the manifest cannot be read.
    """
    try:
        manifest = manifest_of(objects, entries)
    except SourceError as error:
        raise UsageError(
            "The manifest at the output's URL cannot be read",
            file=objects.url,
            found=error.message,
            hint="delete the objects, or choose another --out",
        ) from error
    written = set() if manifest is None else set(manifest.file_names())
    state = objects.get(STATE_PATH) if STATE_PATH in entries else None
    files = (parse_state(state[0]) or {}).get("files") if state is not None else None
    if isinstance(files, list):  # it was begun where there was nothing, so that these are its own
        written.update(name for name in files if isinstance(name, str))
    refuse_others(objects, entries, written)
    return Earlier(objects, written, list(entries))


def manifest_of(objects: Objects, entries: dict[str, Entry]) -> Manifest | None:
    """The manifest among the objects below a URL; None without one.

    Raises:
        SourceError: it cannot be read.
    """
    return read_manifest(Bucket(objects.url, objects.store, entries)) if MANIFEST_NAME in entries else None
