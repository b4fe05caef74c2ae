"""The contract of a bus, and how one is found by its URL.

Adapters (`amqp`, `kafka`, `embedded`) keep every word of it; tests/contract proves each of them.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from datetime import datetime
from ipaddress import ip_address
from pathlib import Path
from typing import Protocol, Self

from virtbus import plugins
from virtbus.errors import ConfigError
from virtbus.model import Binding, Check, Message, Outcome, Record
from virtbus.sequences import MissingEvents
from virtbus.telemetry import emit

ENTRY_POINT_GROUP = "virtbus.buses"

REASON_HEADER = "x-virtbus-reason"
"""The header of a dead letter that says why it was dead-lettered; at most 1,024 bytes of UTF-8."""

CUT_HEADER = "x-virtbus-cut"
"""The header of a dead letter that says what of it was left out, where it did not fit as it came."""

_SCHEME = re.compile(r"[a-z][a-z0-9+.-]*\Z")
_NEXT_URL = re.compile(r"\s*[;,]\s*(?=[a-z][a-z0-9+.-]*://)", re.IGNORECASE)
_GROUP = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}\Z")


@dataclass(frozen=True, slots=True)
class BusOptions:
    """What every bus gets besides its URL; an adapter ignores what does not concern it.

    Secrets stay out of it but for the URL's own password: `password_file` is read at each connect, so
    that a rotated password is used without a restart.
    """

    exchange: str = "virtbus.events"  # AMQP: the topic exchange
    topic: str = "virtbus.events"  # Kafka; its dead letters are in "<topic>.dead"
    declare: bool = True  # False: the operator owns the topology; what is missing is an error
    window: int = 256  # unconfirmed records in flight
    structured: bool = False  # CloudEvents content mode of what is published
    heartbeat: float = 10.0  # seconds, a dead peer is found after two of them; 0 is off
    confirm_timeout: float = 30.0  # seconds from sending to confirmation, on the monotonic clock
    connect_timeout: float = 5.0  # seconds for each address
    max_record_bytes: int = 16 * 1024 * 1024  # larger is refused without asking the broker
    username: str | None = None  # wins over the URL's
    password_file: Path | None = None  # wins over the URL's password
    auth: str = "plain"  # "plain", or "external" (the TLS certificate is the identity)
    sasl_mechanism: str | None = None  # Kafka: PLAIN (what a user name means by itself), SCRAM-…, OAUTHBEARER
    oauth_token_file: Path | None = None  # Kafka, OAUTHBEARER: the token, read again before it expires
    oauth_token_command: tuple[str, ...] = ()  # the same from a command's output; a list, no shell
    tls_ca_file: Path | None = None  # None: the system's
    tls_cert_file: Path | None = None
    tls_key_file: Path | None = None
    tls_server_name: str | None = None  # the name the certificate must carry, when it is not the URL's host
    topic_partitions: int = 12  # Kafka, when the topic is created
    topic_replication: int | None = None  # None: the broker's default
    topic_config: Mapping[str, str] = field(default_factory=dict)
    extra: Mapping[str, str] = field(default_factory=dict, repr=False)  # Kafka: librdkafka's own settings
    state_dir: Path | None = None  # embedded: where `embedded:` without a path keeps its file
    client_name: str = "virtbus"  # how the broker's tools show this connection

    def __post_init__(self) -> None:
        """Refuse what can't work; every problem is named in one error."""
        problems = [
            f"{name} is {value}: it must be at least {least}"
            for name, value, least in (
                ("window", self.window, 1),
                ("heartbeat", self.heartbeat, 0),
                ("confirm_timeout", self.confirm_timeout, 0.001),
                ("connect_timeout", self.connect_timeout, 0.001),
                ("max_record_bytes", self.max_record_bytes, 1024),
                ("topic_partitions", self.topic_partitions, 1),
            )
            if value < least
        ]
        if self.auth not in ("plain", "external"):
            problems.append(f'auth is "{self.auth}": known are "plain" and "external"')
        if self.tls_key_file is not None and self.tls_cert_file is None:
            problems.append("tls_key_file is set without tls_cert_file: set both")
        if self.auth == "external" and self.tls_cert_file is None:
            problems.append('auth "external" needs a client certificate: set tls_cert_file and tls_key_file')
        for name in ("exchange", "topic"):
            if not getattr(self, name):
                problems.append(f"{name} is empty: leave it out for the default")
        if problems:
            raise ConfigError("\n".join(f"bus.{problem}" for problem in problems))


class Feed(Protocol):
    """Where a bus gets its records: the spool, or a list in a test."""

    def take(self, limit: int, busy: AbstractSet[str]) -> Sequence[Record]:
        """Up to `limit` next records, at most one per key, none whose key is in `busy`. Never blocks.

        Fewer may come although there are more, so that the first are on their way while the next are read;
        none means that none can be taken now.
        A record that was taken comes again only after its outcome has been settled as not confirmed.
        An outcome other than `Confirmed` has to be settled before the next one is asked for: only then
        does the feed know that its key must wait.
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
        """Deliver it again after about `after` seconds, and nothing of its key before it.

        What `receive` had handed out already is the caller's. A lost connection ends the wait early.
        """

    def dead_letter(self, message: Message, reason: str) -> None:
        """Dead-letter it as it came, with the reason in REASON_HEADER, durably; only then acknowledge it.

        Never raises for a broker's fault. What can't be dead-lettered now (the dead-letter queue is gone,
        full, refused, or the broker blocks publishers) stays unacknowledged and is tried again with backoff,
        while other messages go on; a lost connection, a kill or `close` in between delivers it again. What
        does not fit as it came is cut, and CUT_HEADER says what is missing. Without a group there is nowhere
        to put it: it is only logged.
        """

    def close(self) -> None:
        """Leave; what was not acknowledged is delivered again to somebody."""


@dataclass(frozen=True, slots=True)
class DeadLetter:
    """One message that a group dead-lettered, or that the broker gave up on."""

    position: str  # where it stands, unique among the letters of one look: for logs and for `handle`
    id: str | None  # the CloudEvent's id, or the message's; None where it has neither
    source: str | None  # the CloudEvent's source
    type: str | None  # the CloudEvent's type
    reason: str  # REASON_HEADER, or the broker's own word ("delivery_limit"), or ""
    at: datetime | None  # when it was dead-lettered, where that is known
    size_bytes: int  # of the body
    message: Message  # as it lies there

    @classmethod
    def of(cls, message: Message, *, name: str | None, reason: str, at: datetime | None) -> DeadLetter:
        """The letter in a message; `name` and `reason` are for one without headers that say it."""

        def text(header: str) -> str | None:
            value = message.headers.get(header)
            value = value.decode("utf-8", "replace") if isinstance(value, bytes) else value
            return value if isinstance(value, str) else None

        prefix = "ce_" if message.binding is Binding.KAFKA else "ce-"
        return cls(
            position=message.position,
            id=text(f"{prefix}id") or name,
            source=text(f"{prefix}source"),
            type=text(f"{prefix}type"),
            reason=text(REASON_HEADER) or reason,
            at=at,
            size_bytes=len(message.body),
            message=message,
        )


class DeadLetters(ABC):
    """One look at a group's dead letters, oldest first. Not thread-safe; a context manager.

    A letter without a verdict stays where it is, also when the process is killed; looking changes nothing
    and counts as nothing. Raises BusUnavailable or BusDenied, in each method. A letter that was sent back
    may be there twice after a kill in between (at least once), never lost.
    """

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @abstractmethod
    def count(self) -> int:
        """How many letters wait; 0 where the group has no dead letters (yet)."""

    @abstractmethod
    def read(self, limit: int | None = None) -> Iterator[DeadLetter]:
        """The oldest `limit` letters that this look has not given out yet; None: all that are there now."""

    @abstractmethod
    def send_back(self, letter: DeadLetter) -> None:
        """Hand it to its group again, as it came (without our headers), to nobody else; then remove it.

        RecordRefused when it was cut (CUT_HEADER): it is not what came, and stays where it is.
        """

    @abstractmethod
    def drop(self, letter: DeadLetter) -> None:
        """Remove it for good."""

    @abstractmethod
    def close(self) -> None:
        """Let go; idempotent."""


class Memory:
    """What a subscription remembers over a restart, and to whom it reports what is lost to the group."""

    def __init__(
        self, notes: dict[str, str] | None = None, on_missing: Callable[[MissingEvents], None] = emit
    ) -> None:
        """`notes` are those on disk."""
        self._notes = notes if notes is not None else {}
        self.fresh: dict[str, str] = {}  # not on disk yet
        self.missing = on_missing  # events that the group will never get

    def recall(self, name: str) -> str | None:
        """The note of this name as it was last kept."""
        return self._notes.get(name)

    def names(self) -> list[str]:
        """Of what there are notes."""
        return list(self._notes)

    def keep(self, name: str, value: str) -> None:
        """Note this; it is on disk with the next marks that are, and with `Consumer.close`."""
        self._notes[name] = self.fresh[name] = value


class DeferredMemory(Memory):
    """What is missing is reported when `tell` is called: the author's function may raise."""

    def __init__(self, notes: dict[str, str], on_missing: Callable[[MissingEvents], None]) -> None:
        self._on_missing = on_missing
        self._missing: deque[MissingEvents] = deque()
        super().__init__(notes, self._missing.append)

    def tell(self) -> None:
        """Report what is missing to the author's function."""
        while self._missing:
            self._on_missing(self._missing.popleft())


class Publishing(Protocol):
    """What an agent needs of a broker. One thread owns an instance; `close` may be called from another."""

    def publish(self, feed: Feed) -> Iterator[tuple[Record, Outcome]]:
        """Publish what `feed` gives until it gives nothing and nothing is unconfirmed.

        `envelope.to_amqp(record.attributes, record.body, structured=options.structured)` gives a record's
        headers, content type and body (`to_kafka` those of Kafka), `envelope.routing_key` a subject.

        Guarantees:
        1. every record taken gets exactly one outcome, `Confirmed` only when the broker holds it durably;
        2. at most one unconfirmed record per key, so the order of a key survives anything;
        3. records of other keys go on while one is unroutable or refused;
        4. after anything unclear the connection is thrown away: what was unconfirmed is `Deferred`, and
           the iterator ends; the next call reconnects. It never raises for a broker's fault, except
           BusUnavailable / BusDenied when no connection can be made (nothing was taken then).
        """

    def tick(self) -> None:
        """Serve the idle connection: heartbeats out, what came in; never blocks, never raises.

        The publisher thread calls it about once a second when it has nothing to publish. A connection
        found dead is thrown away; the next `publish` reconnects. Without a connection it does nothing.
        """

    def close(self) -> None:
        """Let go of connections; idempotent.

        From another thread it ends a running `publish`: what is unconfirmed is `Deferred`.
        """


class Bus(Publishing, Protocol):
    """A broker."""

    def consume(
        self, group: str | None, *, prefetch: int = 100, exclusive: bool = False, memory: Memory | None = None
    ) -> Subscription:
        """Subscribe: a durable group shared by its members, or (None) all from now on, for this one.

        With `exclusive` one member at a time is active: another one stands by until it is gone (AMQP,
        embedded), or takes over at once and the older one gets GroupTakenOver (Kafka). `memory` belongs to
        the group on this bus; where the broker can skip events, it gets to know which.
        """

    def dead_letters(self, group: str) -> DeadLetters:
        """The group's dead letters. Raises BusUnavailable, BusDenied, or ConfigError for the name."""

    def probe(self) -> Sequence[Check]:
        """Look at reachability, credentials, TLS and topology; changes nothing."""


def open_bus(url: str, options: BusOptions | None = None) -> Bus:
    """The bus of a URL, found by its scheme; connects to nothing yet.

    The entry point of the group `virtbus.buses` that has the scheme's name is called as
    `factory(url, options=…)`; it raises ConfigError when the URL can't be used, and opens no connection.

    Raises ConfigError that names the known schemes when nobody serves this one, or that says which
    part of the URL can't be used. The message never holds a password.
    """
    if not url:
        raise ConfigError(f"no bus URL: set bus.url, VIRTBUS_BUS__URL or --bus-url ({_examples()})")
    # Not urlsplit(): several brokers may stand in one string, which is not a URL as a whole.
    scheme = url.partition(":")[0].strip().lower()
    if ":" not in url or not _SCHEME.match(scheme):
        raise ConfigError(f"the bus URL does not begin with a scheme: use one like {_examples()}")
    point = plugins.find(ENTRY_POINT_GROUP, scheme)
    if point is None:
        raise ConfigError(
            f'no bus serves "{scheme}:" URLs; known are {", ".join(plugins.names(ENTRY_POINT_GROUP))}. '
            f"Fix bus.url, or install the package whose entry point {ENTRY_POINT_GROUP} names this scheme"
        )
    factory: Callable[..., Bus] = plugins.load(point, f'"{scheme}:"')
    return factory(url, options=options if options is not None else BusOptions())


def bus_name(url: str, options: BusOptions) -> str:
    """A bus that `open_bus` accepted, by name: without credentials, the same in any order of its hosts.

    It ends with what the events are in on that broker. Which option names that for a third party's adapter
    nobody knows here, so all of them count.
    """
    brokers = [_broker_name(each) for each in _NEXT_URL.split(url.strip(" ;,"))]
    kind, folder = brokers[0].partition(":")[0], str(options.state_dir or "")
    within = {"amqp": options.exchange, "kafka": options.topic, "embedded": folder}.get(
        kind, " ".join(filter(None, (options.exchange, options.topic, folder)))
    )
    return f"{';'.join(sorted(brokers))} {within}"


def _broker_name(url: str) -> str:
    scheme, _, rest = url.partition(":")
    authority, slash, path = rest.removeprefix("//").partition("/")
    hosts = ",".join(sorted(re.split("[,;]", authority.rpartition("@")[2].lower())))
    return f"{_without_tls(scheme.lower())}://{hosts}{slash}{path}"


def _without_tls(scheme: str) -> str:
    """The scheme without its "s" where that only means TLS: the same adapter serves both."""
    with_tls, plain = (plugins.find(ENTRY_POINT_GROUP, name) for name in (scheme, scheme.removesuffix("s")))
    same = with_tls is not None and plain is not None and with_tls.value == plain.value
    return scheme.removesuffix("s") if same else scheme


def checked_group(group: str | None) -> str | None:
    """The consumer group's name as it came, or ConfigError when a broker could not carry it in a name."""
    if group is not None and (
        not isinstance(group, str) or not _GROUP.fullmatch(group) or group.endswith(".dead")
    ):
        raise ConfigError(
            f"consumer group {str(group)[:129]!r} can't be used: take letters, digits, "
            '".", "_" or "-", at most 128, beginning with a letter or digit and not ending in ".dead"'
        )
    return group


def is_loopback(host: str) -> bool:
    """Whether traffic to `host` stays on this machine, going by its name alone."""
    try:
        return ip_address(host).is_loopback
    except ValueError:  # a name; one that begins with "127." is anybody's
        return host == "localhost"


def _examples() -> str:
    return "amqps://user@host/vhost, kafka://host:9092 or embedded:"
