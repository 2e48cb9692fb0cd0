"""The output below the URL of an object store while a conversion is under way.

A shard is streamed to its final name, where it appears when its last part has arrived; config.json comes last, so that
until then no engine takes the objects for a model. Beside them lie, until the conversion is finished,

    .quarkconv/plan.json          the identity of the conversion: a later run resumes only the same one
    .quarkconv/notes/NAME.json    the checksums of the pieces of a finished shard, and the ETag of its object
    .quarkconv/checked-K-of-N     says that the checks of a share hold

A finished shard whose object still has the ETag of its note is never written again. There are no locks: two processes
that write one shard write the same bytes, and the later object replaces the earlier.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from typing import Any, Final

import xxhash

from quarkconv.cloud.objects import PART_BYTES, ConditionsUnsupportedError, Objects, ObjectWriter
from quarkconv.cloud.uploads import clear_uploads
from quarkconv.errors import WriteError
from quarkconv.files.remote import Entry
from quarkconv.headers.file_names import CONFIG_NAME, MANIFEST_NAME
from quarkconv.headers.unfinished import NOTES_NAME, STAGING_NAME, STATE_PATH, parse_state
from quarkconv.plan.manifest import WrittenFile, WrittenShard
from quarkconv.plan.pieces import OutputShard, SourceFile
from quarkconv.plan.shares import MAX_SHARES, Share
from quarkconv.write.earlier_objects import earlier_objects, finished_meanwhile
from quarkconv.write.notes import note_of, written_of
from quarkconv.write.object_leases import ObjectLeases, lease_name
from quarkconv.write.refusals import source_changed
from quarkconv.write.source import Source
from quarkconv.write.state import JOINED

_NOTES: Final = f"{STAGING_NAME}/{NOTES_NAME}/"

_log: Final = logging.getLogger(__name__)


class ObjectShard:
    """A shard that is streamed to an object."""

    in_order: Final = True

    def __init__(self, writer: ObjectWriter, nbytes: int) -> None:
        self._writer = writer
        self._nbytes = nbytes
        self._written = 0

    def write(self, block: memoryview, offset: int) -> None:
        """Append a block; what pads the last one is dropped."""
        if offset != self._written:
            raise ValueError(f"block at {offset} of a stream at {self._written}")
        block = block[: self._nbytes - offset]
        self._writer.write(block)
        self._written += len(block)

    def flush(self) -> None:
        """Do nothing: parts are sent as they fill."""

    def seal(self) -> None:
        """Send the rest and create the object."""
        self._writer.finish()

    def close(self) -> None:
        """Discard what was sent, unless the object was created."""
        self._writer.abort()


class ObjectDestination:
    """The output of one conversion in an object store. See :mod:`quarkconv.write.output_objects`."""

    has_locks: Final = False
    streams: Final = True

    def __init__(self, objects: Objects, plan_digest: str, entries: dict[str, Entry], *, shared: bool) -> None:
        self.objects = objects
        self.plan_digest = plan_digest
        self._shared = shared
        self._entries = entries
        self._notes: dict[str, dict[str, Any]] = {}
        self._config = b""

    def refresh(self) -> None:
        """List the objects again.

        Raises:
            UsageError: another process has finished the conversion.
        """
        before, self._entries = self._entries, self.objects.entries()
        if STATE_PATH not in self._entries:
            raise finished_meanwhile(self.objects.url)
        for name in [name for name in self._notes if before.get(name) != self._entries.get(name)]:
            del self._notes[name]

    def read_records(self, shards: Iterable[OutputShard]) -> None:
        """Read the notes of some shards, over several connections.

        Raises:
            UsageError: another process has finished the conversion.
        """
        names = [name for name in map(note_name, (shard.file for shard in shards)) if name not in self._notes]
        names = [name for name in names if name in self._entries]
        found = self.objects.get_many(names)
        if len(found) < len(names) and self.objects.entry(STATE_PATH) is None:  # notes are deleted at the end
            raise finished_meanwhile(self.objects.url)
        for name, data in found.items():
            self._notes[name] = parse_state(data) or {}

    def open(self, shard: OutputShard) -> ObjectShard:
        """Begin to stream a shard."""
        return ObjectShard(self.objects.writer(shard.file, shard.nbytes), shard.nbytes)

    def record(self, shard: WrittenShard) -> bool:
        """Note the checksums of a shard and the ETag of its object; False where another worker has.

        Raises:
            WriteError: the object is not the one that was sent.
        """
        entry = self.objects.entry(shard.file)
        if entry is None or entry.size != shard.size:
            raise WriteError(
                "The object store's object is not the shard that was written",
                file=f"{self.objects.url}/{shard.file}",
                expected=f"{shard.size} bytes",
                found="no object" if entry is None else f"{entry.size} bytes",
                hint="run the same command again, and check that nothing else writes there",
            )
        note = {**note_of(shard, self.plan_digest), "etag": entry.etag}
        name, data = note_name(shard.file), json.dumps(note).encode()
        if not self._shared:
            self.objects.put(name, data)
            return True
        try:
            if self.objects.create(name, data):
                return True
        except ConditionsUnsupportedError:  # who writes last, writes the same
            self.objects.put(name, data)
            return True
        found = self.objects.get(name)
        before = {} if found is None else parse_state(found[0]) or {}
        if before != note:  # of an object that this one replaced
            self.objects.put(name, data)
        return before.get("plan") != self.plan_digest

    def is_listed(self, shard: OutputShard) -> bool:
        """Whether a shard and its note were there when the objects were last listed."""
        entry = self._entries.get(shard.file)
        return entry is not None and entry.size == shard.nbytes and note_name(shard.file) in self._entries

    def is_leased(self, shard: OutputShard) -> bool:
        """Whether a shard had a lease when the objects were last listed."""
        return lease_name(shard.file) in self._entries

    def finished(self, shard: OutputShard) -> WrittenShard | None:
        """The record of a shard that was finished when the objects were last listed."""
        entry = self._entries.get(shard.file)
        if entry is None or entry.size != shard.nbytes:
            return None
        self.read_records([shard])
        note = self._notes.get(note_name(shard.file))
        if note is None or entry.etag != str(note.get("etag")):
            return None
        return written_of(shard, note, self.plan_digest)

    def finished_now(self, shard: OutputShard) -> bool:
        """Whether a shard is finished: its note is looked for again.

        Raises:
            UsageError: another process has finished the conversion.
        """
        if self.objects.entry(note_name(shard.file)) is None:
            if self.objects.entry(STATE_PATH) is None:  # notes are deleted after it
                raise finished_meanwhile(self.objects.url)
            return False
        self.refresh()
        return self.finished(shard) is not None

    def checks_hold(self, share: Share) -> bool:
        """Whether an earlier run recorded that the checks of a share hold."""
        found = self.objects.get(_checked(share))
        return found is not None and parse_state(found[0]) == {"plan": self.plan_digest}

    def record_checks(self, share: Share) -> None:
        """Record that the checks of a share hold."""
        self.objects.put(_checked(share), json.dumps({"plan": self.plan_digest}).encode())

    def shares(self) -> int:
        """The number of shares that the conversion was begun with: 1 for a whole one, 0 for one with leases."""
        found = self.objects.get(STATE_PATH)
        count = None if found is None else (parse_state(found[0]) or {}).get("shares")
        return count if isinstance(count, int) and JOINED <= count <= MAX_SHARES else 1

    def leases(self) -> ObjectLeases:
        """Leases as objects.

        Raises:
            ConditionsUnsupportedError: the store has no conditional writes.
        """
        self.objects.require_conditions(f"{STAGING_NAME}/conditions")
        return ObjectLeases(self.objects)

    def copy(self, file: SourceFile, sources: Source) -> WrittenFile:
        """Copy a file of the source as it is."""
        hasher, size = xxhash.xxh3_128(), 0
        writer = self.objects.writer(file.name, file.size) if file.size > PART_BYTES else None
        whole = bytearray()
        try:
            for block in sources.blocks(file):
                hasher.update(block)
                size += len(block)
                if writer is None:
                    whole += block
                else:
                    writer.write(block)
            if size != file.size:
                raise source_changed(file.name, f"{file.size} bytes", f"{size} bytes")
            if writer is None:
                self.objects.put(file.name, bytes(whole))
            else:
                writer.finish()
        finally:
            if writer is not None:
                writer.abort()
        return WrittenFile(file.name, size, hasher.hexdigest())

    def write(self, name: str, data: bytes) -> None:
        """Write a small file of the output; config.json waits until the rest is there."""
        if name == CONFIG_NAME:
            self._config = data
        else:
            self.objects.put(name, data)

    def publish(self, names: list[str], manifest: bytes) -> None:  # noqa: ARG002
        """Write the manifest, then config.json, and remove the notes.

        plan.json is the first of them to go: without it the output counts as finished.
        """
        self.objects.put(MANIFEST_NAME, manifest)
        self.objects.put(CONFIG_NAME, self._config)
        self.objects.delete([STATE_PATH])
        self.objects.delete(name for name in self.objects.entries() if name.startswith(f"{STAGING_NAME}/"))

    def discard(self) -> None:
        """Delete everything that the conversion wrote."""
        earlier_objects(self.objects, self.objects.entries()).delete()

    def require_space(self, nbytes: int, shards: tuple[OutputShard, ...]) -> None:
        """Do nothing: a store has no end."""

    def discard_partial(self, shards: tuple[OutputShard, ...]) -> None:
        """Discard the unfinished multipart uploads of some shards."""
        cleared = clear_uploads(self.objects.url, {shard.file for shard in shards})
        if cleared:
            _log.info("%s: %d unfinished uploads of an earlier run discarded", self.objects.url, cleared)

    def failures(self, left: Callable[[], int]) -> nullcontext[None]:  # noqa: ARG002
        """Nothing: objects raise such errors themselves."""
        return nullcontext()


def note_name(file: str) -> str:
    """The name of the note of a shard."""
    return f"{_NOTES}{file}.json"


def _checked(share: Share) -> str:
    return f"{STAGING_NAME}/checked-{share.number}-of-{share.count}"
