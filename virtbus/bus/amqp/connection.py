"""Connections to RabbitMQ, for publishers and consumers: which broker, logging in, and what errors mean."""

from __future__ import annotations

import os
import random
import re
import socket
import ssl
import struct
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import amqp
from amqp.exceptions import AMQPError
from kombu.connection import Connection

from virtbus import errors
from virtbus.bus import BusOptions, is_loopback
from virtbus.bus.amqp.wire import Channel, Transport, WireConnection
from virtbus.bus.certificates import seen_broker
from virtbus.bus.url import DEFAULT_PORTS, password, read_url
from virtbus.errors import BusDenied, BusUnavailable, ConfigError
from virtbus.telemetry import BusConnected, BusLost, InsecureTransport, TelemetryEvent, emit

_CLOSE_SECONDS = 1.0

LINK_FAULTS: tuple[type[BaseException], ...] = (OSError, AMQPError, struct.error)
"""What reading from, writing to or talking over a connection can raise (TLS errors are OSError)."""

REFUSING_CODES = frozenset({311, 406, 501, 502})
"""Reply codes that speak of one message: too large, or malformed."""


class ExchangeDiffers(TelemetryEvent, level="warning", every=600, by="bus,exchange"):
    """the exchange is not a durable topic exchange: events may reach nobody; delete it, or name another"""

    bus: str
    exchange: str
    told: str


@dataclass(frozen=True, slots=True)
class Endpoint:
    """One broker: its `name` is safe for logs, the password is not part of `repr`."""

    host: str
    port: int
    vhost: str
    tls: bool
    username: str
    password: str = field(repr=False)

    @property
    def name(self) -> str:
        """The address as a URL without user and password."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        vhost = "" if self.vhost == "/" else self.vhost
        return f"{'amqps' if self.tls else 'amqp'}://{host}:{self.port}/{vhost}"


def endpoints(urls: str | Sequence[str], options: BusOptions) -> tuple[Endpoint, ...]:
    """Every broker of `urls` (one string may hold several, by ";" or ","). Raises ConfigError.

    The virtual host is the path: none, "/" and "//" mean "/", and "%2F" inside it is a slash.
    """
    texts = [urls] if isinstance(urls, str) else list(urls)
    found = []
    for url in filter(None, (part.strip() for text in texts for part in re.split("[;,]", text))):
        if not url.lower().startswith(("amqp://", "amqps://")):
            raise ConfigError(
                "each broker of a list needs a whole URL that begins with amqp:// or amqps:// "
                '(a ";" or "," inside a password is written %3B or %2C)'
            )
        parts = read_url(url)
        (host, port), tls = parts.host, parts.scheme == "amqps"
        if parts.query:
            raise ConfigError(
                f"the bus URL of host {host} has a query: set bus.* in the configuration instead"
            )
        if options.auth == "external" and not tls:
            raise ConfigError(
                f'bus.auth is "external" but broker {host} is amqp://: the identity is the TLS certificate, '
                "so use amqps://"
            )
        found.append(
            Endpoint(
                host=host,
                port=port or DEFAULT_PORTS[parts.scheme],
                vhost=parts.path[1:] or "/",
                tls=tls,
                username=options.username or parts.username or "guest",
                password=parts.password if parts.password is not None else "guest",
            )
        )
    if not found:
        raise ConfigError("no broker URL: write amqps://user@host/vhost")
    return tuple(found)


class Waker:
    """Ends a `pump` from another thread, now or the next one."""

    def __init__(self) -> None:
        self.fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)

    def wake(self) -> None:
        """The pump that waits on `fd` returns at once."""
        os.eventfd_write(self.fd, 1)

    def __del__(self) -> None:
        os.close(self.fd)


class BrokerLink:
    """An open connection to one broker. One thread at a time."""

    def __init__(self, endpoint: Endpoint, options: BusOptions, waker: Waker) -> None:
        """Connect and log in. Raises BusUnavailable, BusDenied."""
        self.endpoint, self.options, self.name = endpoint, options, endpoint.name
        self.is_private = endpoint.tls or is_loopback(endpoint.host)
        # PLAIN proves the user. EXTERNAL's user is whatever the broker reads out of the certificate,
        # which only the operator knows; a wrong guess would have every message refused.
        self.user = options.username if options.auth == "external" else endpoint.username
        # Called with True and the reason, or with False, when the broker blocks publishers or stops blocking
        # them.
        self.on_blocked: Callable[[bool, str | None], None] = lambda blocked, reason: None
        with errors.translating(faults(self.name, doing="connecting")):
            client = Connection(
                hostname=endpoint.host,
                port=endpoint.port,
                userid=endpoint.username,
                password=password(options.password_file, endpoint.password),
                virtual_host=endpoint.vhost,
                ssl=_tls(endpoint, options) if endpoint.tls else False,
                login_method="EXTERNAL" if options.auth == "external" else "PLAIN",
                connect_timeout=options.connect_timeout,
                heartbeat=round(options.heartbeat),
                transport=Transport,
                transport_options={
                    "wake_fd": waker.fd,
                    # Also of a broker that accepts, and then says nothing but heartbeats.
                    "patience": 2 * options.connect_timeout,
                    "socket_settings": _socket_settings(options),
                    "on_blocked": lambda reason: self.on_blocked(True, reason),
                    "on_unblocked": lambda: self.on_blocked(False, None),
                    "client_properties": {"product": "virtbus", "connection_name": options.client_name},
                },
            )
            # Not Connection.connect(): that retries on its own.
            self.connection: WireConnection = client.transport.establish_connection()
            seen_broker(self.connection.transport.sock)

    def channel(self) -> Channel:
        """Open a channel. Raises as LINK_FAULTS."""
        self.be_patient()
        channel: Channel = self.connection.channel()
        channel.auto_decode = False  # by an encoding that the sender names: punycode takes hours
        return channel

    @contextmanager
    def brief_channel(self) -> Iterator[Channel]:
        """A channel for one question: a refusal closes it and nothing else. Raises as LINK_FAULTS."""
        channel = self.channel()
        try:
            yield channel
        finally:
            if channel.is_open and self.connection.connected:
                channel.close()

    def finds(self, question: Callable[[Channel], object]) -> bool:
        """Ask for a queue or exchange (passively): False when it is not there. Raises as LINK_FAULTS."""
        try:
            with self.brief_channel() as channel:
                question(channel)
        except amqp.NotFound:
            return False
        return True

    def is_stream(self, queue: str) -> bool:
        """Whether a queue is a stream: no other kind takes an offset. Raises as LINK_FAULTS."""
        try:
            with self.brief_channel() as channel:
                channel.basic_qos(0, 1, False)
                channel.basic_consume(queue, arguments={"x-stream-offset": "next"})
        except amqp.PreconditionFailed:
            return False
        return True

    def be_patient(self) -> None:
        """The synchronous calls that follow have `connect_timeout` seconds together."""
        self.connection.limit = time.monotonic() + self.options.connect_timeout

    def declare_exchange(self) -> None:
        """Make sure that the exchange is there, where we may. Raises BusDenied, and as LINK_FAULTS.

        An existing one with other arguments, or that we may not declare, is used as it is.
        """
        exchange = self.options.exchange
        if not self.options.declare:
            return  # publishing finds out
        refusal = self.exchange_refusal()
        if refusal is None:
            return
        if not self.has_exchange():
            raise BusDenied(
                f"{self.name}: exchange {exchange} does not exist and user {self.user} may not create it: "
                f"grant it configure rights on {exchange}, or create it (topic, durable) and set "
                "bus.declare = false"
            ) from refusal
        if isinstance(refusal, amqp.PreconditionFailed):
            emit(ExchangeDiffers(self.name, exchange, str(refusal.reply_text)))

    def exchange_refusal(self) -> amqp.AccessRefused | amqp.PreconditionFailed | None:
        """Declare the exchange; why the broker refuses that. Raises as LINK_FAULTS."""
        try:
            with self.brief_channel() as channel:
                channel.exchange_declare(self.options.exchange, "topic", durable=True, auto_delete=False)
        except (amqp.AccessRefused, amqp.PreconditionFailed) as error:
            return error
        return None

    def has_exchange(self) -> bool:
        """Whether the exchange is there; changes nothing. Raises as LINK_FAULTS."""
        return self.finds(
            lambda channel: channel.exchange_declare(self.options.exchange, "topic", passive=True)
        )

    def declare_queue(self, queue: str, **more: Any) -> amqp.AccessRefused | amqp.PreconditionFailed | None:
        """Declare a durable queue of ours; why the broker refuses that. Raises as LINK_FAULTS.

        RabbitMQ 4 gives up on a message after 20 deliveries, and counts what was only prefetched when a
        connection ended; which event kills its consumer only the consumer knows (`Consumer.max_attempts`).
        A queue that an older broker or release made lacks that argument, and is used as it is.
        """
        server = self.connection.server_properties or {}
        major = str(server.get("version", "")).partition(".")[0]
        plain = {"x-queue-type": "quorum", **more}
        unlimited = server.get("product") == "RabbitMQ" and major.isdigit() and int(major) >= 4
        refusal = None
        for arguments in [{**plain, "x-delivery-limit": -1}, plain] if unlimited else [plain]:
            try:
                with self.brief_channel() as channel:
                    channel.queue_declare(queue, durable=True, auto_delete=False, arguments=arguments)
                return None
            except (amqp.AccessRefused, amqp.PreconditionFailed) as error:
                refusal = error
        return refusal

    def discard(self) -> None:
        """Throw the connection away; nothing that is under way may still be trusted."""
        self.connection.abort()

    def close(self) -> None:
        """Say goodbye, within a second, then let go."""
        try:
            self.connection.limit = time.monotonic() + _CLOSE_SECONDS
            self.connection.close()
        except LINK_FAULTS:
            pass  # it is gone already, which is what we want
        self.discard()


class Dialer:
    """Opens links to the first broker of several that takes us.

    It begins at a random one, so that a fleet spreads over them; after a failure it goes on with the next.
    The caller owns the waits between rounds.
    """

    def __init__(self, urls: str | Sequence[str], options: BusOptions) -> None:
        """Raises ConfigError when a URL or the password file can't be used."""
        self.endpoints = endpoints(urls, options)
        self.options = options
        self._next = random.randrange(len(self.endpoints))  # noqa: S311 - no secret
        self._warned = False
        try:
            password(options.password_file, None)
        except BusDenied as error:
            raise ConfigError(str(error)) from error

    def dial(self, waker: Waker, told: Callable[[str], TelemetryEvent] | None = BusConnected) -> BrokerLink:
        """A link to some broker, reported as `told`. Raises BusUnavailable; BusDenied when all refuse us."""
        failures: list[BusUnavailable | BusDenied] = []
        for _ in self.endpoints:
            try:
                link = BrokerLink(self.endpoints[self._next], self.options, waker)
            except (BusUnavailable, BusDenied) as error:
                failures.append(error)
                self.skip()
                continue
            if not link.is_private and not self._warned:
                self._warned = True
                emit(InsecureTransport(link.name))
            if told is not None:
                emit(told(link.name))
            return link
        raise next((error for error in failures if error.retryable), failures[-1])

    @contextmanager
    def setting_up(
        self, link: BrokerLink, doing: str, told: Callable[[str, Exception], TelemetryEvent] = BusLost
    ) -> Iterator[None]:
        """Translate what fails in the block; then the link is thrown away, and the next broker is tried."""
        try:
            with errors.translating(faults(link.name, doing=doing)):
                yield
        except (BusUnavailable, BusDenied) as error:
            lost(link, error, told)
            self.skip()
            raise

    def skip(self) -> None:
        """Begin the next round at another broker."""
        self._next = (self._next + 1) % len(self.endpoints)


def lost(
    link: BrokerLink, error: Exception, told: Callable[[str, Exception], TelemetryEvent] = BusLost
) -> None:
    """Throw `link` away and report it as `told`."""
    link.discard()
    emit(told(link.name, error))


def _tls(endpoint: Endpoint, options: BusOptions) -> dict[str, Any]:
    """py-amqp's TLS arguments: peer and host name are verified, always."""

    def text(path: os.PathLike[str] | None) -> str | None:
        return None if path is None else os.fspath(path)

    return {
        # Named here: kombu turns "localhost" into 127.0.0.1, which no certificate carries.
        "server_hostname": options.tls_server_name or endpoint.host,
        "cert_reqs": ssl.CERT_REQUIRED,
        "ca_certs": text(options.tls_ca_file),
        "certfile": text(options.tls_cert_file),
        "keyfile": text(options.tls_key_file),
    }


def _socket_settings(options: BusOptions) -> dict[int, int]:
    """TCP options. Heartbeats find a dead peer; TCP's own timer must not find a broker that only pauses.

    A broker under an alarm stops reading; with unsent bytes TCP_USER_TIMEOUT (py-amqp: one second) would
    drop it. It is on only where heartbeats are off.
    """
    return {
        socket.TCP_NODELAY: 1,
        socket.TCP_USER_TIMEOUT: 0 if options.heartbeat else 25_000,
        socket.TCP_KEEPIDLE: 10,
        socket.TCP_KEEPINTVL: 5,
        socket.TCP_KEEPCNT: 3,
    }


# ------------------------------------------------------------------------------------- errors


def translated(error: BaseException, name: str, *, doing: str) -> BusUnavailable | BusDenied:
    """Our error for one of LINK_FAULTS: what failed, on which broker, what to do. Never holds a secret."""
    told = errors.translated(error, faults(name, doing=doing))
    assert isinstance(told, BusUnavailable | BusDenied)
    return told


def faults(name: str, *, doing: str) -> errors.Translations:
    """What LINK_FAULTS mean, the narrower first, for `errors.translating`."""
    where = f"{name}: {doing}"

    def away(why: str) -> Callable[[BaseException], BusUnavailable]:
        return lambda error: BusUnavailable(f"{where}: {why}")

    def tls(error: ssl.SSLError) -> BusUnavailable | BusDenied:
        reason = error.reason or "TLS failed"
        if "ALERT" in reason:
            return BusDenied(f"{where}: the broker refuses our TLS ({reason}): check bus.tls.cert_file")
        return BusUnavailable(f"{where}: {reason}: is this the broker's TLS port?")

    def unreadable(error: OSError) -> BusUnavailable:
        why = error.strerror or error
        return BusUnavailable(
            f"{where}: can't read {error.filename}: {why}" if error.filename else f"{where}: {why}"
        )

    return {
        ssl.SSLCertVerificationError: lambda error: BusDenied(
            f"{where}: the broker's certificate is not trusted ({error.verify_message}): "
            "check bus.tls.ca_file, and that the URL's host is a name in the certificate"
        ),
        ssl.SSLError: tls,
        AMQPError: lambda error: _of_broker(error, where),
        TimeoutError: away("no answer in time: check the address, the network and the broker"),
        socket.gaierror: away("the host name can't be resolved: check bus.url and DNS"),
        ConnectionRefusedError: away("connection refused: is the broker up, is the port right?"),
        OSError: unreadable,
        struct.error: lambda error: BusUnavailable(
            f"{where}: the peer does not speak AMQP 0-9-1 ({type(error).__name__})"
        ),
    }


def _of_broker(error: AMQPError, where: str) -> BusUnavailable | BusDenied:
    code = getattr(error, "reply_code", 0) or 0
    text = str(getattr(error, "reply_text", "") or "").strip()
    if code == 403 and "in exclusive use" in text:
        return BusUnavailable(f"{where}: {text}: end the client that has it")
    if code == 403:
        return BusDenied(f"{where}: access refused ({text}): check user, password and permissions")
    # Of connections or channels; of a user, a virtual host or the node.
    if code in (506, 530) and re.search(r"\blimit (of )?\(\d", text):
        return BusUnavailable(f"{where}: {text}: raise the limit, or close what uses it up")
    if code == 530 and "channel_max" in f"{text} {error}":
        return BusUnavailable(f"{where}: {text or error}: raise channel_max")
    if code == 530:
        return BusDenied(f"{where}: not allowed ({text}): check the virtual host and the user's access to it")
    if code == 404:
        return BusDenied(
            f"{where}: not found ({text}): it is declared again at the next connection where "
            "bus.declare allows it; else create it"
        )
    if code == 540 and "basic.get" in text:
        return BusDenied(
            f"{where}: the queue is a stream, from which nothing can be taken: replace it by a quorum queue"
        )
    if code == 406 and "user_id property" in text:
        return BusDenied(f"{where}: {text}: set bus.username to the name the broker gives this certificate")
    if "auth mechanism" in f"{text} {error}":
        return BusDenied(f"{where}: the broker does not offer the authentication of bus.auth")
    if isinstance(error, amqp.ConnectionForced) and "heartbeat" in text:
        return BusUnavailable(f"{where}: heartbeats missed: the broker or the network is gone")
    return BusUnavailable(f"{where}: {text or type(error).__name__} ({code})")
