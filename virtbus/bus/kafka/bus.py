"""The Kafka bus: what is in flight, what its delivery reports mean, and when the producer is replaced.

A Producer of librdkafka must not be used across a fork; virtbus does not fork.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from functools import partial
from typing import Any

import kombu
from confluent_kafka import KafkaError, KafkaException, Producer
from confluent_kafka import admin as kafka_admin
from kombu.transport import TRANSPORT_ALIASES, virtual

from virtbus.bus import BusOptions, DeadLetters, Feed, Memory, Subscription, checked_group
from virtbus.bus.kafka.client import Admin, Watch, is_purged, make, oneline, translate
from virtbus.bus.kafka.settings import KafkaSettings, check
from virtbus.envelope import to_kafka
from virtbus.errors import BusDenied, BusUnavailable, ConfigError, RecordRefused, VirtbusError
from virtbus.model import Check, Confirmed, Deferred, Outcome, Record, Refused
from virtbus.telemetry import METRICS, BusConnected, BusLost, InsecureTransport, emit

TRANSPORT = "virtbus-kafka"
TRANSPORT_ALIASES.setdefault(TRANSPORT, f"{__name__}:Transport")

# Their classes carry no types.
_Connection: Any = kombu.Connection
_VirtualChannel: Any = virtual.Channel
_VirtualTransport: Any = virtual.Transport
_ConfigResource: Any = kafka_admin.ConfigResource  # type: ignore[attr-defined]

# How long a closing bus waits for what is in flight, in seconds.
CLOSE_SECONDS = 5.0
_POLL_SECONDS = 0.1
_REPORTS_SECONDS = 1.0  # how long a closing channel waits for the reports of what it purged
_CONFIRMED = Confirmed()


class Channel(_VirtualChannel):
    """kombu's channel over one producer: `exchange` is the topic, `routing_key` the key.

    kombu's own Kafka transport wraps the body in base64 JSON and reports success for what failed;
    tests/kafka documents both. This one hands over value, key and headers as they are, each with its delivery
    report. It publishes only: a tag a message and requeue have no place for offsets and rebalances.
    """

    do_restore = False

    def __init__(self, connection: Any, **kwargs: Any) -> None:
        """Make the producer; the connection's transport options hold `settings`, `watch` and `batching`."""
        super().__init__(connection, **kwargs)
        options = connection.client.transport_options
        config = options["settings"].producer(options["watch"], batching=options.get("batching", True))
        self.producer: Any = make(Producer, config)

    def exchange_declare(
        self, exchange: str = "", type: str = "topic", passive: bool = False, **_: Any
    ) -> None:
        """Make sure that the topic is there; create it unless `passive`."""
        Admin(self.connection.client.transport_options["settings"]).ensure(exchange, declare=not passive)

    def prepare_message(
        self,
        body: bytes,
        priority: int | None = None,
        content_type: str | None = None,
        content_encoding: str | None = None,
        headers: Any = None,
        properties: dict[str, Any] | None = None,
    ) -> dict[str, Any]:
        """The message as `basic_publish` takes it: no wrapping, no encoding."""
        return {"body": body, "headers": headers, "on_delivery": (properties or {}).get("on_delivery")}

    def basic_publish(
        self, message: dict[str, Any], exchange: str = "", routing_key: bytes | str | None = None, **_: Any
    ) -> None:
        """Hand one record to the producer. `on_delivery(error, message)` is called from `drain_events`.

        Raises BufferError when the local queue is full (drain, then again), KafkaException when refused.
        """
        self.producer.produce(
            exchange,
            message["body"],
            routing_key,
            headers=message["headers"],
            on_delivery=message["on_delivery"],
        )

    def drain_events(self, timeout: float | None = None, callback: Any = None) -> int:
        """Serve delivery reports and errors for up to `timeout` seconds; the number of events served."""
        return int(self.producer.poll(timeout or 0.0)) if self.producer is not None else 0

    def close(self) -> None:
        """Let the producer go; what it still held is purged, never sent later behind our back."""
        producer, self.producer = self.producer, None
        if producer is not None:
            producer.purge()
            # A report that is not served keeps its callback, and with it whatever that refers to.
            limit = time.monotonic() + _REPORTS_SECONDS
            with suppress(KafkaException):  # a fatal error: it goes anyway
                while len(producer) and time.monotonic() < limit:
                    producer.poll(0.05)
        super().close()


class Transport(_VirtualTransport):
    """kombu's transport `virtbus-kafka`; publishing only."""

    Channel = Channel
    driver_type = "kafka"
    driver_name = "confluent-kafka"
    connection_errors = (KafkaException, VirtbusError, OSError)
    channel_errors = (BufferError,)
    recoverable_connection_errors = ()
    recoverable_channel_errors = (BufferError,)


class _Publisher:
    """One producer's life: what is in flight, what was reported. Thrown away after anything unclear."""

    def __init__(self, settings: KafkaSettings, *, batching: bool) -> None:
        """Prove that the brokers answer, accept us and have the topic. Raises BusUnavailable, BusDenied."""
        self.watch, self.batching, self._options = Watch(), batching, settings.options
        Admin(settings).ensure(self._options.topic, declare=self._options.declare)
        self._connection = _Connection(
            transport=TRANSPORT,
            transport_options={"settings": settings, "watch": self.watch, "batching": batching},
        )
        self._channel = self._connection.channel()
        exchange = kombu.Exchange(self._options.topic)
        self._producer: Any = kombu.Producer(self._channel, exchange, auto_declare=False)
        self.flying: dict[str, tuple[Record, float]] = {}  # by key: at most one unconfirmed record per key
        self._reports: list[tuple[Record, Any]] = []
        self._progress = time.monotonic()

    def send(self, record: Record, stopped: Callable[[], VirtbusError | None]) -> Outcome | None:
        """Hand a record to the client; an outcome when there is one at once, or `stopped` has one."""
        size, limit = len(record.body), self._options.max_record_bytes
        if size > limit:
            return Refused(RecordRefused(f"{size} bytes: the largest record allowed is {limit} bytes"))
        wire = to_kafka(record.attributes, record.body, structured=self._options.structured)
        while True:
            try:
                self._producer.publish(
                    wire.value,
                    routing_key=wire.key,
                    headers=wire.headers,
                    content_type="application/octet-stream",  # a header of the record says what it is
                    on_delivery=partial(self._reported, record),
                )
                break
            except BufferError:
                # The local queue is full: back-pressure, not an error. It can't last: its records time out.
                if not self.flying and not self._reports:
                    told = f"{size} bytes are more than the client may hold"
                    return Deferred(BusDenied(f"{told}: raise bus.kafka.options queue.buffering.max.kbytes"))
                self.serve(_POLL_SECONDS)
                fault = stopped()
                if fault is not None:
                    return Deferred(fault)
            except KafkaException as error:
                translated = translate(error.args[0], f"handing over event {record.id}")
                return Refused(translated) if isinstance(translated, RecordRefused) else Deferred(translated)
        now = time.monotonic()
        if not self.flying:
            self._progress = now
        self.flying[record.key] = record, now
        return None

    def _reported(self, record: Record, error: Any, _message: Any) -> None:
        self._reports.append((record, error))

    def serve(self, timeout: float) -> None:
        """Let librdkafka call back for up to `timeout` seconds."""
        try:
            self._channel.drain_events(timeout)
        except KafkaException as error:  # a fatal error is raised by poll instead of given to error_cb
            self.watch(error.args[0])

    def take_reports(self) -> list[tuple[Record, Any]]:
        """The records whose delivery report came, each with None or its KafkaError; in flight no more."""
        reports, self._reports = self._reports, []
        if reports:
            self._progress = now = time.monotonic()
        for record, error in reports:
            _, since = self.flying.pop(record.key)
            if error is None:
                METRICS.confirm_seconds.observe(now - since)
        if any(error is None for _, error in reports):
            self.watch.forget()
        return reports

    def fault(self, patience: float = 0.0, grace: float = 0.0) -> VirtbusError | None:
        """Why this can't go on, if so: fatal, refused for `grace` seconds, or silent for `patience`."""
        watch = self.watch
        if watch.fatal is not None:
            return translate(watch.fatal, "publishing")
        silent = time.monotonic() - self._progress
        if self.flying and watch.denied is not None and silent > grace:
            return translate(watch.denied, "publishing")
        if self.flying and silent > patience:
            last = watch.last or "no broker answers"
            return BusUnavailable(f"nothing confirmed for {silent:.0f} s: {last}")
        return None

    def discard(self) -> None:
        """Throw the producer away; late reports go nowhere."""
        self.flying.clear()
        self._connection.release()


class KafkaBus:
    """A Kafka topic as a bus: see virtbus.bus.Bus for the contract, which this class keeps.

    Idempotent producer, acks=all, one unconfirmed record per key. A record whose report says that it may be
    stored is `Deferred` and the producer is replaced; its second copy carries the same id.
    """

    def __init__(self, url: str, *, options: BusOptions) -> None:
        """Raises ConfigError that names every problem of URL and options at once; connects to nothing."""
        self._settings = check(url, options)
        self._options = options
        self._lock = threading.Lock()
        self._publisher: _Publisher | None = None
        self._publishing: int | None = None  # the thread that runs `publish` now
        self._idle = threading.Event()
        self._idle.set()
        self._closed_at: float | None = None
        # Kafka refuses a batch as a whole: so many records more go alone, to find the one that is meant.
        self._suspects = 0

    def __repr__(self) -> str:
        """Without credentials."""
        return f"KafkaBus({self._settings.display})"

    def publish(self, feed: Feed) -> Iterator[tuple[Record, Outcome]]:
        """See virtbus.bus.Bus."""
        publisher = self._idle_publisher() or self._connect()
        self._publishing = threading.get_ident()
        self._idle.clear()
        try:
            yield from self._publish(publisher, feed)
        finally:
            self._publishing = None
            self._idle.set()
            if publisher.flying:  # the caller let go in the middle
                self._drop(publisher, "publishing was broken off")

    def tick(self) -> None:
        """See virtbus.bus.Bus."""
        if self._publishing is None:
            self._idle_publisher()

    def close(self) -> None:
        """See virtbus.bus.Bus. A running `publish` takes nothing more and has five seconds for what is in
        flight; its last outcomes name, as `Deferred`, what the broker did not confirm by then.
        """
        with self._lock:
            if self._closed_at is not None:
                return
            self._closed_at = time.monotonic()
        if self._publishing is not None and self._publishing != threading.get_ident():
            self._idle.wait(CLOSE_SECONDS + 2.0)
        publisher = self._publisher
        # Called from inside the caller's own loop over `publish`, that loop ends it.
        if publisher is not None and self._publishing is None:
            self._drop(publisher, None)

    def _closing(self) -> VirtbusError | None:
        if self._closed_at is None or time.monotonic() - self._closed_at < CLOSE_SECONDS:
            return None
        return BusUnavailable("the bus was closed before the broker confirmed")

    def _idle_publisher(self) -> _Publisher | None:
        """The publisher that stands, served; None when there is none, or it was just found dead."""
        publisher = self._publisher
        if publisher is not None:
            publisher.serve(0.0)
            fault = publisher.fault()
            if fault is not None:
                self._drop(publisher, fault)
        return self._publisher

    def _connect(self) -> _Publisher:
        display, publisher = self._settings.display, None
        if self._closed_at is None:
            try:
                publisher = _Publisher(self._settings, batching=self._suspects <= 0)
            except (BusUnavailable, BusDenied) as error:
                emit(BusLost(display, error))
                raise
            emit(BusConnected(display))
            if self._settings.insecure:
                emit(InsecureTransport(display))
        with self._lock:
            if publisher is not None and self._closed_at is None:
                self._publisher = publisher
                return publisher
        if publisher is not None:  # closed meanwhile
            publisher.discard()
        raise BusUnavailable("the bus was closed")

    def _drop(self, publisher: _Publisher, why: Exception | str | None) -> None:
        with self._lock:
            if self._publisher is publisher:
                self._publisher = None
        publisher.discard()
        if why is not None:
            emit(BusLost(self._settings.display, why))

    def _publish(self, publisher: _Publisher, feed: Feed) -> Iterator[tuple[Record, Outcome]]:
        options, batching = self._options, publisher.batching
        patience = options.confirm_timeout + 5.0  # librdkafka's own time-out comes first

        def stopped() -> VirtbusError | None:
            return publisher.fault(patience, options.connect_timeout) or self._closing()

        while True:
            room = options.window - len(publisher.flying)
            if self._closed_at is not None or (not batching and self._suspects <= 0):
                room = 0
            records: Sequence[Record] = ()
            # Not for each single place that gets free: a look into the spool costs more than a record.
            if room > 0 and (not publisher.flying or room * 4 >= options.window):
                records = feed.take(room, publisher.flying.keys())
            fault: Exception | None = None
            for record in records:
                outcome = Deferred(fault) if fault is not None else publisher.send(record, stopped)
                if isinstance(outcome, Deferred):
                    fault = fault or outcome.error
                if outcome is not None:
                    yield record, outcome
            if not publisher.flying and fault is None:
                if records:
                    continue
                if not batching:
                    self._suspects = 0
                    self._drop(publisher, None)
                return
            publisher.serve(0.0 if records else _POLL_SECONDS)
            reports = publisher.take_reports()
            if any(error is not None for _, error in reports):
                publisher.serve(0.0)  # a fatal error's cause comes after the reports of what it purged
            fault = stopped() or fault
            for record, error in reports:
                outcome, reason = self._judge(record, error, fault, alone=not batching)
                fault = fault or reason
                yield record, outcome
            if fault is not None:
                publisher.serve(0.0)  # what was confirmed meanwhile is confirmed
                reports = publisher.take_reports()
                left = [record for record, _ in publisher.flying.values()]
                self._drop(publisher, fault)
                for record, error in reports:
                    yield record, self._judge(record, error, fault, alone=not batching)[0]
                for record in left:
                    yield record, Deferred(fault)
                return

    def _judge(
        self, record: Record, error: Any, fault: Exception | None, *, alone: bool
    ) -> tuple[Outcome, Exception | None]:
        """What a delivery report means: the record's outcome, and why the producer must go, if it must."""
        self._suspects -= alone
        if error is None:
            return _CONFIRMED, None
        if fault is not None and is_purged(error):
            return Deferred(fault), fault
        translated = translate(error, f"publishing event {record.id} to {self._options.topic}")
        if not isinstance(translated, RecordRefused):
            if fault is None and error.code() == KafkaError._MSG_TIMED_OUT:
                translated = self._explained(translated)
            return Deferred(translated), translated
        if alone:
            return Refused(translated), None
        unclear = BusUnavailable(f"{translated}: its batch was refused as a whole; each is sent alone now")
        self._suspects = self._options.window  # the bad one is among the first of those that come again
        return Deferred(unclear), unclear

    def _explained(self, error: VirtbusError) -> VirtbusError:
        """A timeout with what librdkafka keeps for itself: that the topic is gone, or short of replicas."""
        topic = self._options.topic
        try:
            admin = Admin(self._settings)
            found = admin.describe(topic)
            check = None if found is None else self._topic_check(admin, found)
        except VirtbusError:
            return error
        if check is None:
            then = "it is created at the next attempt" if self._options.declare else "create it"
            return BusUnavailable(f'{error}: topic "{topic}" does not exist any more; {then}')
        return BusUnavailable(f"{error}: {check.remedy}") if check.status == "failed" else error

    # -- the rest of the contract

    def consume(
        self, group: str | None, *, prefetch: int = 100, exclusive: bool = False, memory: Memory | None = None
    ) -> Subscription:
        """See virtbus.bus.Bus. A group is Kafka's consumer group `virtbus.<group>`; a new one begins with
        the oldest event that the topic still holds. Without a group it connects at once, to
        know what "now" is. Raises ConfigError for `exclusive` with the group protocol that has no takeover.
        """
        if exclusive and self._settings.next_protocol:
            raise ConfigError("an exclusive member needs bus.kafka.options group.protocol = classic")
        from virtbus.bus.kafka.subscription import KafkaSubscription

        return KafkaSubscription(self._settings, checked_group(group), prefetch, exclusive, memory)

    def dead_letters(self, group: str) -> DeadLetters:
        """See virtbus.bus.Bus."""
        from virtbus.bus.kafka.letters import KafkaDeadLetters

        return KafkaDeadLetters(self._settings, checked_group(group) or group)

    def probe(self) -> Sequence[Check]:
        """See virtbus.bus.Bus."""
        settings, topic, may = self._settings, self._options.topic, self._options.declare
        told = f"{settings.display}: {'TLS' if settings.tls else 'plaintext'}, SASL: {settings.mechanism}"
        transport = Check("bus.transport", "ok", told)
        if settings.insecure:
            transport = Check("bus.transport", "warning", told, "use kafkas:// and leave verification on")
        try:
            admin = Admin(settings)
            found = admin.describe(topic, operations=True)
        except VirtbusError as error:
            remedy = "check that the brokers run and that bus.url names their hosts and ports"
            if isinstance(error, BusDenied):
                remedy = "check user, mechanism, certificates and ACLs"
            return [transport, Check("bus.reach", "failed", oneline(error), remedy, error.exit_code)]
        denied = BusDenied.exit_code
        if found is None and may:
            told = f'topic "{topic}" does not exist; it is created at the first event'
            check = Check("bus.topic", "warning", told, f'create topic "{topic}"')
        elif found is None:
            told = f'topic "{topic}" does not exist'
            check = Check("bus.topic", "failed", told, f'create topic "{topic}"', denied)
        elif not {each.name for each in found.authorized_operations or ()} & {"WRITE", "ALL"} and (
            found.authorized_operations
        ):
            remedy = f'permit Write on topic "{topic}" to this user'
            check = Check("bus.topic", "failed", f'no right to write to "{topic}"', remedy, denied)
        else:
            check = self._topic_check(admin, found)
        return [transport, Check("bus.reach", "ok", f"{settings.display} answers and accepts us"), check]

    def _topic_check(self, admin: Admin, found: Any) -> Check:
        topic, insync = self._options.topic, None
        replicas = min((len(partition.replicas) for partition in found.partitions), default=0)
        facts: dict[str, object] = {"partitions": len(found.partitions), "replicas": replicas}
        try:
            resource = _ConfigResource(_ConfigResource.Type.TOPIC, topic)
            entries = admin.call(
                f'reading the settings of topic "{topic}"',
                lambda client: client.describe_configs([resource])[resource],
            )
            facts["min_insync_replicas"] = insync = int(entries["min.insync.replicas"].value)
            facts["max_message_bytes"] = int(entries["max.message.bytes"].value)
        except VirtbusError as error:  # DescribeConfigs is a right of its own that publishing does not need
            facts["settings"] = oneline(error)
        summary = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in facts.items())
        leaderless = [each.id for each in found.partitions if each.leader is None]
        short = [each.id for each in found.partitions if insync is not None and len(each.isr) < insync]
        told, remedy, status = "", None, "ok"
        if leaderless:
            told = f"partitions {leaderless} have no leader"
        elif short:
            told = f"partitions {short} have fewer replicas in sync than min.insync.replicas = {insync}"
        elif replicas < 2 or (insync is not None and insync < 2):
            status = "warning"
            remedy = "one broker's disk can lose confirmed events: replication 3 and min.insync.replicas 2"
        if told:
            status, remedy = "failed", f"{told}: bring their brokers back"
        exit_code = BusUnavailable.exit_code if told else 0
        return Check("bus.topic", status, f'topic "{topic}": {summary}', remedy, exit_code, facts)
