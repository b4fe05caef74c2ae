"""The embedded bus's kombu transport: topic exchanges, queues and leases over the log.

Any kombu program can use it: `Connection(transport="virtbus-embedded", transport_options={"path": …})`
after this module has been imported.
"""

from __future__ import annotations

import time
from collections import deque
from pathlib import Path
from queue import Empty
from typing import Any

import kombu
from kombu.exceptions import ChannelError
from kombu.transport import TRANSPORT_ALIASES, virtual

from virtbus.bus import REASON_HEADER
from virtbus.bus.embedded_log import DEFAULT_MAX_BYTES, Entry, Leased, Log
from virtbus.errors import BusUnavailable

TRANSPORT = "virtbus-embedded"
# The property that carries the partition key also where the CloudEvent is inside the body. Other
# producers' messages have the key of their `ce-partitionkey` header, or their routing key.
KEY = "virtbus_key"
# How many messages a consumer leases at once: fewer commits; a killed one's come back all the same.
LEASE_BLOCK = 64

TRANSPORT_ALIASES[TRANSPORT] = f"{__name__}:Transport"


class QoS(virtual.QoS):
    """Counts what is unacknowledged for the prefetch limit; the truth about it is in the log."""

    def ack(self, delivery_tag: str) -> None:
        """Settle the message in the log."""
        self.channel.log.settle(*_place(delivery_tag))
        super().ack(delivery_tag)

    def reject(self, delivery_tag: str, requeue: bool = False) -> None:
        """Hand the message out again (`requeue`), or move it to the queue's dead letters."""
        if requeue:
            self.channel.delay(delivery_tag, 0.0)
        else:
            self.channel.dead_letter(delivery_tag, "rejected")

    def forget(self, delivery_tag: str) -> None:
        """Stop counting a message whose verdict the log already has."""
        super().ack(delivery_tag)


class Channel(virtual.Channel):
    """Topic exchanges and durable queues over the log; transport options: `path`, `max_bytes`.

    A publish is on disk when it returns, or with `tx_select` when `tx_commit` returns. An `exclusive` or
    `auto_delete` queue goes with its connection.
    """

    QoS = QoS
    do_restore = False  # closing ends the leases in the log: nothing is put anywhere

    def __init__(self, connection: Any, **kwargs: Any) -> None:
        super().__init__(connection, **kwargs)
        self._leased: dict[str, deque[Leased]] = {}
        self._transaction: list[Entry] | None = None

    @property
    def log(self) -> Log:
        """The log of this connection."""
        if self.connection is None:
            raise BusUnavailable("embedded bus: the channel is closed")
        log: Log = self.connection.log
        return log

    # publishing ------------------------------------------------------------------------------

    def exchange_declare(self, exchange: str | None = None, type: str = "topic", **kwargs: Any) -> None:
        """Only topic exchanges; they live in their bindings."""
        if type not in ("topic", "", None):
            raise ChannelError(f"the embedded bus has topic exchanges only, not {type!r}")
        super().exchange_declare(exchange, "topic", **kwargs)

    def basic_publish(self, message: dict[str, Any], exchange: str, routing_key: str, **_: Any) -> None:
        """Store a message, or keep it for `tx_commit`. The empty exchange names a queue by routing key."""
        headers, properties, body = message["headers"], message["properties"], message["body"]
        key = properties.get(KEY) or headers.get("ce-partitionkey") or routing_key or ""
        entry = Entry(
            exchange=exchange or "",
            routing_key=routing_key or "",
            key=str(key),
            content_type=message["content-type"],
            content_encoding=message["content-encoding"],
            headers=headers,
            properties={k: v for k, v in properties.items() if k not in ("delivery_info", KEY)},
            body=body.encode() if isinstance(body, str) else bytes(body),
            queue=None if exchange else routing_key,
        )
        if self._transaction is None:
            self.log.append([entry])
        else:
            self._transaction.append(entry)

    def tx_select(self) -> None:
        """From now on publishes wait for `tx_commit`."""
        self._transaction = []

    def tx_commit(self) -> None:
        """Store what was published since the last commit: all of it durably, or none (and it raises)."""
        entries, self._transaction = self._transaction or [], []
        if entries:
            self.log.append(entries)

    # queues ----------------------------------------------------------------------------------

    def _new_queue(self, queue: str, **kwargs: Any) -> None:
        self.log.declare(queue, temporary=bool(kwargs.get("exclusive") or kwargs.get("auto_delete")))

    def _has_queue(self, queue: str, **_: Any) -> bool:
        return self.log.exists(queue)

    def _size(self, queue: str) -> int:
        return self.log.size(queue)

    def _purge(self, queue: str) -> int:
        return self.log.purge(queue)

    def queue_bind(self, queue: str, exchange: str | None = None, routing_key: str = "", **_: Any) -> None:
        """Durable, and seen by every process at once."""
        self.log.bind(queue, exchange or "", routing_key)

    def queue_unbind(self, queue: str, exchange: str | None = None, routing_key: str = "", **_: Any) -> None:
        """Take a binding back."""
        self.log.unbind(queue, exchange or "", routing_key)

    def queue_delete(self, queue: str, if_unused: bool = False, if_empty: bool = False, **_: Any) -> None:
        """Forget a queue: what it had not read no longer holds room in the log."""
        if not (if_empty and self._size(queue)):
            self.log.delete(queue)

    # consuming -------------------------------------------------------------------------------

    def _get(self, queue: str, timeout: float | None = None) -> dict[str, Any]:
        ready = self._leased.setdefault(queue, deque())
        if not ready:
            room = self.qos.can_consume_max_estimate()
            ready.extend(self.log.take(queue, LEASE_BLOCK if room is None else min(LEASE_BLOCK, room)))
        if not ready:
            raise Empty
        return payload_of(ready.popleft())

    def delay(self, delivery_tag: str, seconds: float) -> None:
        """Hand a message out again after `seconds`, and nothing of its key before it.

        Messages of the key that were delivered before this call stay with whoever has them.
        """
        queue, pos = _place(delivery_tag)
        ready = self._leased.get(queue, deque())
        key = self.qos.get(delivery_tag).properties[KEY]
        later = [item for item in ready if item.entry.key == key]
        self.log.give_back([(queue, item.pos) for item in later], delivered=False)
        for item in later:
            ready.remove(item)
        self.log.give_back([(queue, pos)], after=seconds)
        self.qos.forget(delivery_tag)

    def dead_letter(self, delivery_tag: str, reason: str) -> None:
        """Move a message to the queue `<queue>.dead`, durably, with the reason in its headers."""
        queue, pos = _place(delivery_tag)
        self.log.dead_letter(
            queue,
            pos,
            f"{queue}.dead",
            {REASON_HEADER: reason.encode()[:1024].decode(errors="ignore")},
        )
        self.qos.forget(delivery_tag)


class Transport(virtual.Transport):
    """kombu's door to the embedded bus, under the name `virtbus-embedded`."""

    Channel = Channel
    driver_type = "sqlite"
    driver_name = "sqlite3"
    log: Log

    def establish_connection(self) -> Any:
        """Open the log; raises BusUnavailable, BusDenied."""
        options = self.client.transport_options
        self.log = Log(Path(options["path"]), max_bytes=options.get("max_bytes", DEFAULT_MAX_BYTES))
        try:
            return super().establish_connection()
        except BaseException:
            self.log.close()
            raise

    def close_connection(self, connection: Any) -> None:
        """Close the channels, give back the leases, let go of the file."""
        try:
            super().close_connection(connection)
        finally:
            self.log.close()

    def drain_events(self, connection: Any, timeout: float | None = None) -> None:
        """Deliver one message to its callback; TimeoutError after `timeout` seconds without any."""
        end = None if timeout is None else time.monotonic() + timeout
        while True:
            seen = self.log.version()
            try:
                self.cycle.get(self._deliver)
            except Empty:
                left = 1.0 if end is None else end - time.monotonic()
                if left <= 0:
                    raise TimeoutError from None
                self.log.wait(seen, left)
            else:
                return


def _place(delivery_tag: str) -> tuple[str, int]:
    queue, _, pos = delivery_tag.rpartition("#")
    return queue, int(pos)


def payload_of(lease: Leased) -> dict[str, Any]:
    """A leased message as kombu's virtual transport wants it."""
    entry = lease.entry
    return {
        "body": entry.body,
        "content-type": entry.content_type,
        "content-encoding": entry.content_encoding,
        "headers": dict(entry.headers),
        "properties": {
            **entry.properties,
            KEY: entry.key,
            "body_encoding": None,
            "delivery_tag": f"{lease.queue}#{lease.pos}",
            "delivery_info": {
                "exchange": entry.exchange,
                "routing_key": entry.routing_key,
                "redelivered": lease.deliveries > 1,
            },
        },
    }


def connect(path: Path, max_bytes: int) -> kombu.Connection:
    """A kombu connection to the log at `path`; raises BusUnavailable, BusDenied."""
    connection = kombu.Connection(
        transport=TRANSPORT, transport_options={"path": str(path), "max_bytes": max_bytes}
    )
    connection.connect()
    return connection
