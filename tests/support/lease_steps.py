"""The life of a lease between two workers, in any object store."""

from __future__ import annotations

from quarkconv.cloud.objects import Objects
from quarkconv.write import leases
from quarkconv.write.leases import Leases
from quarkconv.write.object_leases import ObjectLeases


def check_takeover(url: str) -> Leases:
    """A lease is taken once, kept while it is renewed, and taken over when it is not; the leases of its last owner."""
    now = [0.0]
    first, second = (Leases(ObjectLeases(Objects(url)), lambda: now[0]) for _ in range(2))
    assert first.take("shard")
    assert not second.take("shard")
    now[0] += leases.LEASE_SECONDS - 1
    first.renew()
    assert not second.take("shard")
    now[0] += leases.LEASE_SECONDS + 1
    assert second.take("shard")
    first.renew()
    assert (first.holds("shard"), second.holds("shard")) == (False, True)
    return second
