"""The contract of a bus, and how one is found by its URL.

Adapters (`amqp`, `kafka`, `embedded`) keep every word of it; tests/contract proves each of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from collections.abc import Set as AbstractSet
from typing import Protocol

from virtbus.model import Check, Message, Outcome, Record


class Feed(Protocol):
    """Where a bus gets its records: the spool, or a list in a test."""

    def take(self, limit: int, busy: AbstractSet[str]) -> Sequence[Record]:
        """Up to `limit` next records, at most one a key, none whose key is in `busy`. Never blocks.

        A record that was taken comes again only after its outcome has been settled as not confirmed.
        """


class Subscription(Protocol):
    """One consumer's stream. Not thread-safe; every message ends in exactly one of the three verdicts."""

    def receive(self, timeout: float) -> Message | None:
        """The next message, or None after `timeout` seconds. Reconnects by itself.

        Raises BusDenied where waiting can't help, BusUnavailable when the broker is away (call again).
        """

    def ack(self, message: Message) -> None:
        """The effect is done: never deliver it again. A lost connection means it comes again."""

    def retry(self, message: Message, after: float) -> None:
        """Deliver it again after about `after` seconds, and nothing of its key before it."""

    def dead_letter(self, message: Message, reason: str) -> None:
        """Put it aside with the reason, durably, then treat it as acknowledged."""

    def close(self) -> None:
        """Leave; what was not acknowledged is delivered again to somebody."""


class Bus(Protocol):
    """A broker. One publisher thread owns an instance; `close` may be called from another."""

    def publish(self, feed: Feed) -> Iterator[tuple[Record, Outcome]]:
        """Publish what `feed` gives until it gives nothing and nothing is unconfirmed.

        Guarantees:
        1. every record taken gets exactly one outcome, `Confirmed` only when the broker holds it durably;
        2. at most one unconfirmed record a key, so order a key survives anything;
        3. records of other keys go on while one is unroutable or refused;
        4. after anything unclear the connection is thrown away: what was unconfirmed is `Deferred`, and
           the iterator ends; the next call connects anew. It never raises for a broker's fault, except
           BusUnavailable / BusDenied when no connection can be made (nothing was taken then).
        """

    def consume(self, group: str | None, *, prefetch: int = 100) -> Subscription:
        """Subscribe: a durable group shared by its members, or (None) everything from now on, for this one."""

    def probe(self) -> Sequence[Check]:
        """Look at reachability, credentials, TLS and topology; changes nothing."""

    def close(self) -> None:
        """Let go of connections; idempotent."""
