"""A Kafka client's settings: URL, credentials, librdkafka's options; every problem is named at once.

Facts about options are librdkafka's (its CONFIGURATION reference).
"""

from __future__ import annotations

import base64
import binascii
import json
import re
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from confluent_kafka import Consumer, KafkaException, Producer

from virtbus import redaction
from virtbus.bus import BusOptions, is_loopback
from virtbus.bus.kafka.client import Watch, oneline
from virtbus.bus.url import DEFAULT_PORTS, password, read_url
from virtbus.errors import BusUnavailable, ConfigError

DEAD_LETTER_SUFFIX = ".dead"
MECHANISMS = ("PLAIN", "SCRAM-SHA-256", "SCRAM-SHA-512", "OAUTHBEARER")

# A token without an expiry of its own is fetched again after this long, in seconds.
_OPAQUE_TOKEN_SECONDS = 300.0
_TOKEN_COMMAND_SECONDS = 10.0
# Kafka's rule for a topic: these characters, at most 249 (and neither "." nor ".."); room for ".dead".
_TOPIC = re.compile(r"[A-Za-z0-9._-]+\Z")
_TOPIC_LENGTH = 249 - len(DEAD_LETTER_SUFFIX)

# What virtbus's promises rest on, or what has a setting of its own: not to be set as a further option.
_OWNED: Mapping[str, str] = {
    "bootstrap.servers": "it comes from bus.url",
    "metadata.broker.list": "it comes from bus.url",
    "security.protocol": "it follows from kafka:// or kafkas:// and the mechanism",
    "sasl.mechanism": "set bus.kafka.sasl_mechanism",
    "sasl.mechanisms": "set bus.kafka.sasl_mechanism",
    "sasl.username": "set bus.username",
    "sasl.password": "set bus.password_file",
    "ssl.ca.location": "set bus.tls.ca_file",
    "ssl.certificate.location": "set bus.tls.cert_file",
    "ssl.key.location": "set bus.tls.key_file",
    "message.timeout.ms": "set bus.confirm_timeout_seconds",
    "delivery.timeout.ms": "set bus.confirm_timeout_seconds",
    **dict.fromkeys(
        ("enable.idempotence", "acks", "request.required.acks", "transactional.id", "partitioner"),
        "delivery and order rest on it",
    ),
    **dict.fromkeys(
        ("enable.auto.commit", "auto.commit.enable", "enable.auto.offset.store", "group.id"),
        "at-least-once consuming rests on it",
    ),
    "auto.offset.reset": "a group that skips what is left of a topic would not hear of it",
    "partition.assignment.strategy": "retries and what has no verdict rest on cooperative-sticky",
}


@dataclass(frozen=True, slots=True)
class KafkaSettings:
    """A checked URL with its options; `check` makes it."""

    servers: tuple[str, ...]  # host:port, all bootstrap brokers
    tls: bool
    mechanism: str | None  # SASL; None: no SASL
    username: str | None
    options: BusOptions
    url_password: str | None = None

    def __repr__(self) -> str:
        """Without secrets."""
        return f"KafkaSettings({self.display})"

    @property
    def display(self) -> str:
        """The URL for logs, without credentials."""
        return f"{'kafkas' if self.tls else 'kafka'}://{','.join(self.servers)}"

    @property
    def dead_topic(self) -> str:
        """Where messages go that a consumer dead-letters."""
        return self.options.topic + DEAD_LETTER_SUFFIX

    @property
    def insecure(self) -> bool:
        """Whether somebody on the path could read or forge events."""
        extra = self.options.extra
        if self.tls:
            verified = extra.get("enable.ssl.certificate.verification", "true").lower() in ("true", "t", "1")
            return not verified or extra.get("ssl.endpoint.identification.algorithm", "https") != "https"
        return not all(is_loopback(server.rpartition(":")[0].strip("[]")) for server in self.servers)

    @property
    def next_protocol(self) -> bool:
        """Whether groups use the protocol of KIP-848."""
        return self.options.extra.get("group.protocol", "").lower() == "consumer"

    def password(self) -> str:
        """The password as it stands now. Raises BusDenied when its file can't be read."""
        return password(self.options.password_file, self.url_password) or ""

    def client(self, watch: Watch) -> dict[str, Any]:
        """The librdkafka options that producers, consumers and admin clients share."""
        options = self.options
        sasl = self.mechanism is not None
        config: dict[str, Any] = {
            "bootstrap.servers": ",".join(self.servers),
            "client.id": options.client_name,
            "security.protocol": ("SASL_" if sasl else "") + ("SSL" if self.tls else "PLAINTEXT"),
            "socket.keepalive.enable": True,
            "socket.connection.setup.timeout.ms": max(1000, int(options.connect_timeout * 1000)),
            # A broker that is back is found within a second, not within librdkafka's ten.
            "reconnect.backoff.ms": 50,
            "reconnect.backoff.max.ms": 1000,
            "enable.metrics.push": False,  # the compute host reports to nobody behind its operator's back
            "topic.metadata.refresh.fast.interval.ms": 100,
            # Errors reach us by error_cb and outcomes; librdkafka's own lines would be a second log.
            "log_level": 6 if watch.listening else 0,
            "logger": watch.logger,
            "error_cb": watch,
        }
        if self.tls:
            config["ssl.endpoint.identification.algorithm"] = "https"
            config["enable.ssl.certificate.verification"] = True
            if options.tls_ca_file is not None:
                config["ssl.ca.location"] = str(options.tls_ca_file)
            if options.tls_cert_file is not None:
                config["ssl.certificate.location"] = str(options.tls_cert_file)
                config["ssl.key.location"] = str(options.tls_key_file or options.tls_cert_file)
        if self.mechanism == "OAUTHBEARER":
            config["sasl.mechanism"] = self.mechanism
            # The first one here: a client without a token would only wait, and hide why there is none.
            ready = [self._token(watch)]
            config["oauth_cb"] = lambda _config: ready.pop() if ready else self._token(watch)
        elif sasl:
            config["sasl.mechanism"] = self.mechanism
            config["sasl.username"] = self.username
            config["sasl.password"] = self.password()
        config |= options.extra
        if "debug" in options.extra or "log_level" in options.extra:
            del config["logger"]  # an operator is looking: to stderr, as librdkafka does by itself
        return config

    def producer(self, watch: Watch, *, batching: bool = True) -> dict[str, Any]:
        """The options of our producer; `batching` False sends every record in a request of its own."""
        options = self.options
        timeout_ms = max(1, int(options.confirm_timeout * 1000))
        max_bytes = min(max(options.max_record_bytes + 65536, 1000), 1_000_000_000)
        config = {
            "enable.idempotence": True,
            "acks": "all",
            # As Java's default partitioner, so that producers in any language agree on a key's partition.
            "partitioner": "murmur2_random",
            # A topic that goes away is ours to make again, or the operator's: not the broker's, as it likes.
            "allow.auto.create.topics": False,
            # The spool is the buffer; here only the window is in flight.
            "queue.buffering.max.messages": options.window + 16,
            "queue.buffering.max.kbytes": max(1024, min(2097151, options.window * 64), max_bytes // 1024 + 1),
            "message.max.bytes": max_bytes,
            # The window is handed over in one go: waiting long for more only adds latency.
            "linger.ms": 5 if timeout_ms >= 5 else 0,
            "retry.backoff.ms": 50,
            "retry.backoff.max.ms": 500,
            "message.timeout.ms": timeout_ms,
            "request.timeout.ms": max(1000, min(10_000, timeout_ms // 2)),
            **self.client(watch),
        }
        return config if batching else config | {"batch.num.messages": 1}

    def consumer(self, watch: Watch, group_id: str, prefetch: int) -> dict[str, Any]:
        """The options of a consumer whose stored offsets are committed in the background."""
        classic = {
            "partition.assignment.strategy": "cooperative-sticky",
            "session.timeout.ms": 10_000,
            "heartbeat.interval.ms": 1_000,
        }
        return {
            "auto.offset.reset": "earliest",
            **({} if self.next_protocol else classic),  # there the broker decides about these
            "queued.min.messages": max(1, min(prefetch, 10_000_000)),
            "queued.max.messages.kbytes": 8192,
            "fetch.wait.max.ms": 100,
            "auto.commit.interval.ms": 200,
            "fetch.error.backoff.ms": 100,
            "topic.metadata.refresh.interval.ms": 30_000,
            **self.client(watch),
            "group.id": group_id,
            # Only what `store_offsets` was given is committed: librdkafka does it in the background, at a
            # rebalance and at close.
            "enable.auto.commit": True,
            "enable.auto.offset.store": False,
        }

    def _token(self, watch: Watch) -> tuple[str, float]:
        """What librdkafka takes: (token, expiry in Unix seconds). Raises BusUnavailable with the reason."""
        options = self.options
        try:
            if options.oauth_token_command:
                text = _told_by(options.oauth_token_command)
            else:
                assert options.oauth_token_file is not None
                text = options.oauth_token_file.read_text(encoding="utf-8")
            return _token_and_expiry(text, time.time())
        except subprocess.TimeoutExpired as error:  # its text holds the whole command, secrets and all
            watch.last = f"{error.cmd[0]} ran longer than {_TOKEN_COMMAND_SECONDS:g} s"
            raise BusUnavailable(f"no OAuth token: {watch.last}") from None
        except (OSError, subprocess.SubprocessError, ValueError) as error:
            watch.last = oneline(error)
            raise BusUnavailable(f"no OAuth token: {watch.last}") from error


def _told_by(command: Sequence[str]) -> str:
    """A token command's output. Raises ValueError with the last line of its errors."""
    done = subprocess.run(
        list(command),
        capture_output=True,
        text=True,
        timeout=_TOKEN_COMMAND_SECONDS,
        check=False,
        stdin=subprocess.DEVNULL,
    )
    if done.returncode != 0:
        said = done.stderr.strip().splitlines() or ["nothing on stderr"]
        raise ValueError(
            f"bus.kafka.oauth_token_command {command[0]} ended with {done.returncode}: {said[-1]}"
        )
    return done.stdout


def _token_and_expiry(text: str, now: float) -> tuple[str, float]:
    """A token and when it expires, from a bare token or an OAuth token response (RFC 6749 section 5.1)."""
    text = text.strip()
    expires_in: float | None = None
    if text.startswith("{"):
        response = json.loads(text)
        text = str(response.get("access_token") or "")
        expires_in = float(response["expires_in"]) if "expires_in" in response else None
    if not text:
        raise ValueError("the OAuth token's source gave no token")
    if expires_in is not None:
        return text, now + expires_in
    try:  # A JWT says its expiry itself (RFC 7519 section 4.1.4); the broker checks it, not we.
        payload = text.split(".")[1]
        claims = json.loads(base64.urlsafe_b64decode(payload + "=" * (-len(payload) % 4)))
        return text, float(claims["exp"])
    except (IndexError, KeyError, TypeError, ValueError, binascii.Error):
        return text, now + _OPAQUE_TOKEN_SECONDS


def check(url: str, options: BusOptions) -> KafkaSettings:
    """The settings of a kafka:// or kafkas:// URL; ConfigError names every problem at once, one per line."""
    problems: list[str] = []
    parts = read_url(url)
    tls = parts.scheme == "kafkas"
    if parts.path not in ("", "/") or parts.query:
        what = f'"{parts.path}"' if parts.path else "a query"
        problems.append(f"bus.url: {what} after the hosts means nothing to Kafka: the topic is bus.topic")
    problems += [f"bus.url: {problem}" for problem in parts.problems]
    if not parts.hosts and not parts.problems:
        problems.append(f"bus.url: no host: write {parts.scheme}://host[:port][,host[:port]…]")
    problems += _topic_problems(options.topic)
    username = options.username or parts.username or None
    mechanism, mechanism_problems = _mechanism(options, username, has_password=parts.password is not None)
    problems += [*mechanism_problems, *_file_problems(options, tls), *_option_problems(options)]
    settings = KafkaSettings(
        servers=tuple(
            f"[{name}]:{port}" if ":" in name else f"{name}:{port}"
            for name, port in ((name, port or DEFAULT_PORTS[parts.scheme]) for name, port in parts.hosts)
        ),
        tls=tls,
        mechanism=mechanism,
        username=username,
        options=options,
        url_password=parts.password,
    )
    if not problems:
        problems += _combination_problems(settings)
    if problems:
        raise ConfigError("\n".join(problems))
    return settings


def _combination_problems(settings: KafkaSettings) -> Iterator[str]:
    """What librdkafka says of our options and the operator's together; without secrets, and to no broker."""
    plain = replace(settings, mechanism=None)
    producer, consumer = plain.producer(Watch()), plain.consumer(Watch(), "check", 1)
    del producer["bootstrap.servers"], consumer["bootstrap.servers"]
    try:
        Producer(producer)
        Consumer(consumer).close()
    except KafkaException as error:
        yield f"bus.kafka: librdkafka refuses the settings: {oneline(error.args[0].str())}"


def _topic_problems(topic: str) -> Iterator[str]:
    if topic in (".", ".."):
        yield f'bus.topic: Kafka refuses "{topic}" as a name'
    elif not _TOPIC.match(topic):
        yield f'bus.topic: Kafka refuses "{topic}": take ASCII letters, digits, ".", "_" and "-"'
    if len(topic) > _TOPIC_LENGTH:
        yield f'bus.topic: {len(topic)} characters: at most {_TOPIC_LENGTH} (Kafka\'s 249 less ".dead")'


def _mechanism(
    options: BusOptions, username: str | None, *, has_password: bool
) -> tuple[str | None, list[str]]:
    problems = []
    wanted = options.sasl_mechanism
    oauth = bool(options.oauth_token_command) or options.oauth_token_file is not None
    if wanted is not None and wanted not in MECHANISMS:
        return None, [f'bus.kafka.sasl_mechanism: "{wanted}" is not one of {", ".join(MECHANISMS)}']
    mechanism = wanted or ("OAUTHBEARER" if oauth else "PLAIN" if username else None)
    if mechanism == "OAUTHBEARER":
        if bool(options.oauth_token_command) == (options.oauth_token_file is not None):
            problems.append(
                "bus.kafka: OAUTHBEARER needs either oauth_token_file or oauth_token_command, and not both"
            )
        return mechanism, problems
    if oauth:
        problems.append(f"bus.kafka: an OAuth token is set, but the mechanism is {mechanism}")
    if mechanism is not None and not username:
        problems.append(f"bus.username: {mechanism} needs a user name")
    if mechanism is not None and not has_password and options.password_file is None:
        problems.append(f"bus.password_file: {mechanism} needs a password")
    if mechanism is None and (has_password or options.password_file is not None):
        problems.append("bus.username: a password is set without a user name")
    return mechanism, problems


def _file_problems(options: BusOptions, tls: bool) -> Iterator[str]:
    files: dict[str, Path | None] = {
        "bus.password_file": options.password_file,
        "bus.kafka.oauth_token_file": options.oauth_token_file,
        "bus.tls.ca_file": options.tls_ca_file,
        "bus.tls.cert_file": options.tls_cert_file,
        "bus.tls.key_file": options.tls_key_file,
    }
    for name, path in files.items():
        if path is None:
            continue
        if name.startswith("bus.tls.") and not tls:
            yield f"{name}: set, but kafka:// is plaintext: write kafkas://"
        try:
            path.open("rb").close()
        except OSError as error:
            yield f"{name}: {path} can't be read: {error.strerror}"
    if options.auth == "external" and not tls:
        yield 'bus.auth: "external" needs kafkas:// (the client certificate is the identity)'
    if options.tls_server_name is not None:
        yield "bus.tls.server_name: Kafka's brokers are verified by the names they advertise; leave it out"


def _option_problems(options: BusOptions) -> Iterator[str]:
    """Each option by itself, so that all problems are found and not only librdkafka's first."""
    for name, value in options.extra.items():
        if name in _OWNED:
            yield f"bus.kafka.options: {name} can't be set: {_OWNED[name]}"
            continue
        shown = redaction.HIDDEN if redaction.is_secret(name) else repr(value)  # a misspelt secret's, too
        try:
            Producer({"log_level": 0, name: value})
        except KafkaException as error:
            yield f"bus.kafka.options: {name} = {shown}: {oneline(error.args[0].str())}"
        except (AttributeError, TypeError, ValueError) as error:
            yield f"bus.kafka.options: {name} = {shown}: {oneline(error)}"
    if options.topic_replication is not None and options.topic_replication < -1:
        yield f"bus.kafka.topic.replication: {options.topic_replication}: at least 1, or -1 for the default"
