"""What Kafka's clients share: errors and what they mean, topics, records as messages.

Error codes are those of Apache Kafka's protocol guide; negative ones are librdkafka's own.
"""

from __future__ import annotations

import logging
import operator
import re
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any, TypeVar

from confluent_kafka import KafkaError, KafkaException, TopicCollection
from confluent_kafka.admin import AdminClient
from confluent_kafka.cimpl import NewTopic

from virtbus.errors import BusDenied, BusUnavailable, ConfigError, RecordRefused, VirtbusError
from virtbus.model import Binding, Message

if TYPE_CHECKING:
    from virtbus.bus.kafka.settings import KafkaSettings

T = TypeVar("T")
Headers = list[tuple[str, bytes | None]]

# Once one broker has refused us, how long another one may still accept, in seconds.
_DENIAL_GRACE = 0.3

# The broker will never take it. It says so of the whole batch: true of a record only when it is sent alone.
_REFUSED = frozenset(
    {
        KafkaError.MSG_SIZE_TOO_LARGE,
        KafkaError.RECORD_LIST_TOO_LARGE,
        KafkaError.INVALID_RECORD,
        KafkaError.INVALID_TIMESTAMP,
    }
)
_DENIED = frozenset(
    {
        KafkaError.FENCED_INSTANCE_ID,  # a newer exclusive member of the group took over
        KafkaError._AUTHENTICATION,
        KafkaError._SSL,
        KafkaError.SASL_AUTHENTICATION_FAILED,
        KafkaError.UNSUPPORTED_SASL_MECHANISM,
        KafkaError.ILLEGAL_SASL_STATE,
        KafkaError.TOPIC_AUTHORIZATION_FAILED,
        KafkaError.GROUP_AUTHORIZATION_FAILED,
        KafkaError.CLUSTER_AUTHORIZATION_FAILED,
        KafkaError.TRANSACTIONAL_ID_AUTHORIZATION_FAILED,
        KafkaError.POLICY_VIOLATION,
        KafkaError.SECURITY_DISABLED,
    }
)
_MISSING = frozenset({KafkaError.UNKNOWN_TOPIC_OR_PART, KafkaError._UNKNOWN_TOPIC})
_PURGED = frozenset({KafkaError._PURGE_QUEUE, KafkaError._PURGE_INFLIGHT, KafkaError._FATAL})


def oneline(text: object) -> str:
    """Anything as one line."""
    return " ".join(str(text).split())


def translate(error: Any, doing: str) -> VirtbusError:
    """A KafkaError as ours, with what was being done: the one place where they are translated.

    By its code: its own `retriable()` says no to a time-out whose record may be stored.
    """
    code = error.code()
    kind = RecordRefused if code in _REFUSED else BusDenied if code in _DENIED else BusUnavailable
    return kind(f"{doing}: {oneline(error.str())} ({error.name()})")


def is_missing(error: Any) -> bool:
    """Whether the error says that the topic is not there."""
    return error.code() in _MISSING


def is_purged(error: Any) -> bool:
    """Whether the record was only given up because the whole producer was."""
    return error.code() in _PURGED


def make(factory: Callable[[dict[str, Any]], T], config: dict[str, Any]) -> T:
    """A librdkafka client; ConfigError when it refuses the configuration as a whole."""
    try:
        return factory(config)
    except KafkaException as error:
        reason = oneline(error.args[0].str())
        raise ConfigError(f"bus.kafka: librdkafka refuses the settings: {reason}") from error


class Watch(logging.Handler):
    """Hears a client's errors (librdkafka's error_cb, from inside poll) and remembers what they mean."""

    def __init__(self, *, listening: bool = False) -> None:
        """`listening` reads librdkafka's log lines too: some failures to connect appear nowhere else."""
        super().__init__()
        self.listening = listening
        self.logger = logging.Logger("librdkafka")
        self.logger.addHandler(self if listening else logging.NullHandler())
        self.denied: Any = None  # the KafkaError by which a broker refused us, until forgotten
        self.denied_at = 0.0
        self.all_down = False
        self.fatal: Any = None
        self.last: str | None = None

    def __call__(self, error: Any) -> None:
        """Remember one error."""
        code = error.code()
        if code == KafkaError._ALL_BROKERS_DOWN:
            self.all_down = True
            return
        self.last = _with_hint(oneline(error.str()))
        if error.fatal():
            self.fatal = error
        if code in _DENIED and self.denied is None:
            self.denied = error
            self.denied_at = time.monotonic()

    def emit(self, record: logging.LogRecord) -> None:
        """`FAIL [client] [thread]: broker: what happened (after N ms in state S)`."""
        kind, _, text = record.getMessage().partition(" ")
        if kind == "FAIL":
            told = self.last = _with_hint(oneline(text.partition("]: ")[2] or text))
            if "SSL alert" in told:  # with TLS 1.3 the broker's refusal comes after our side's handshake
                self(KafkaError(KafkaError._SSL, told))

    def forget(self) -> None:
        """The brokers answered: what was heard before is over."""
        self.denied = None
        self.all_down = False

    def denial(self, now: float) -> Any:
        """The refusal, once no other broker has accepted us for a moment; else None."""
        return self.denied if self.denied is not None and now - self.denied_at > _DENIAL_GRACE else None


def _with_hint(told: str) -> str:
    """A failure to connect, with what it most often means where librdkafka does not say it.

    A listener that reads our first bytes as something else hangs up. More may follow the state:
    "(after 1ms in state APIVERSION_QUERY, 4 identical error(s) suppressed)".
    """
    if re.search(r"Disconnected.*\bin state (APIVERSION_QUERY|SSL_HANDSHAKE)\b", told):
        return f"{told}; is it a TLS listener, and the URL kafka://, or the other way round?"
    return told


class _TopicMissing(BusUnavailable):
    """The topic is not there; inside this module only."""


class Admin:
    """One admin client for the time of a connect or a probe: who can be reached, and with which topics."""

    def __init__(self, settings: KafkaSettings) -> None:
        """Raises ConfigError when librdkafka refuses the options as a whole."""
        self.settings = settings
        self.watch = Watch(listening=True)
        self._deadline = time.monotonic() + settings.options.connect_timeout
        self._client = make(AdminClient, settings.client(self.watch))

    def describe(self, topic: str, *, operations: bool = False) -> Any:
        """confluent_kafka's TopicDescription, or None when the topic is missing; never creates it."""
        futures = self._client.describe_topics(
            TopicCollection([topic]), include_authorized_operations=operations, request_timeout=self._left()
        )
        try:
            return self._result(futures[topic], f'asking {self.settings.display} about topic "{topic}"')
        except _TopicMissing:
            return None

    def ensure(self, topic: str, *, declare: bool) -> Any:
        """The topic's TopicDescription; it is created when it is missing and we may.

        Raises BusDenied when it is missing and may not be created, BusUnavailable when it can't be now.
        """
        found = self.describe(topic)
        if found is not None:
            return found
        options = self.settings.options
        remedy = f'create it (kafka-topics.sh --create --topic "{topic}" --partitions …)'
        if not declare:
            raise BusDenied(f'topic "{topic}" does not exist and bus.declare is false: {remedy}')
        new = NewTopic(
            topic,
            num_partitions=options.topic_partitions,
            replication_factor=-1 if options.topic_replication is None else options.topic_replication,
            config=dict(options.topic_config),
        )
        future = self._client.create_topics([new], request_timeout=self._left())[topic]
        try:
            self._result(future, f'creating topic "{topic}"')
        except BusDenied as error:
            raise BusDenied(f"{error}: permit it, or {remedy}") from error
        while (found := self.describe(topic)) is None:  # every broker learns of it a moment later
            if time.monotonic() > self._deadline:
                raise BusUnavailable(f'topic "{topic}" was created, but is not to be seen yet')
            time.sleep(0.05)
        return found

    def call(self, doing: str, start: Callable[[AdminClient], Future[T]]) -> T:
        """The result of any other admin request."""
        return self._result(start(self._client), doing)

    def _left(self) -> float:
        return max(0.1, self._deadline - time.monotonic())

    def _result(self, future: Future[T], doing: str) -> T:
        """Wait, serving callbacks; a refusal ends the wait before the deadline."""
        while not future.done():
            self._client.poll(0.02)
            now = time.monotonic()
            denied = self.watch.denial(now)
            if denied is not None:
                raise translate(denied, doing)
            if now > self._deadline:
                last = self.watch.last or "nobody answers"
                seconds = self.settings.options.connect_timeout
                raise BusUnavailable(f"{doing}: no answer within {seconds:g} s: {last}")
        try:
            return future.result()
        except KafkaException as error:
            cause = error.args[0]
            if is_missing(cause):
                raise _TopicMissing(doing) from error
            if cause.code() == KafkaError.TOPIC_ALREADY_EXISTS:
                return None  # type: ignore[return-value]  # somebody else created it just now
            if self.watch.denied is not None:
                raise translate(self.watch.denied, doing) from error
            translated = translate(cause, doing)
            if self.watch.last and isinstance(translated, BusUnavailable):
                raise BusUnavailable(f"{translated}; last heard: {self.watch.last}") from error
            raise translated from error


class TopicLook:
    """Asks for a topic's id from time to time, without ever waiting for the answer."""

    def __init__(self, settings: KafkaSettings, topic: str, every: float) -> None:
        self._settings, self._topic, self._every = settings, topic, every
        self._client: Any = None
        self._asked: Future[Any] | None = None
        self._at = time.monotonic() + every

    @property
    def is_asking(self) -> bool:
        """Whether an answer is on its way."""
        return self._asked is not None

    def due(self, now: float) -> bool:
        """Whether `poll` has anything to do."""
        return now >= self._at or self.is_asking

    def soon(self) -> None:
        """Ask at the next `poll`."""
        self._at = 0.0

    def wait(self, seconds: float) -> str | None:
        """The topic's id as of now; None without an answer within `seconds`, or without such a topic."""
        self._asked = None  # what an older question finds was true before
        self.soon()
        until = time.monotonic() + seconds
        while (found := self.poll(time.monotonic())) is None and self.is_asking and time.monotonic() < until:
            time.sleep(0.01)
        return found

    def poll(self, now: float) -> str | None:
        """The topic's id when an answer has come just now, else None, also when there is no such topic."""
        if self._asked is None:
            if now < self._at:
                return None
            if self._client is None:
                self._client = make(AdminClient, self._settings.client(Watch()))
            self._at = now + self._every
            topics = TopicCollection([self._topic])
            self._asked = self._client.describe_topics(topics, request_timeout=self._every)[self._topic]
        self._client.poll(0)
        if not self._asked.done():
            return None
        asked, self._asked = self._asked, None
        try:
            return topic_id(asked.result())
        except KafkaException:
            return None


def topic_id(found: Any) -> str:
    """The id in a TopicDescription; "" where the broker has none (before Kafka 3.1)."""
    told = str(found.topic_id)
    return "" if set(told) <= {"A", "="} else told


# ------------------------------------------------------------------------------------- records

# Not `message.headers()`: for a name that is not UTF-8 confluent-kafka gives a broken list beside its
# exception, and an interpreter that has specialised the call goes on with the list, into a crash.
_give_headers = operator.methodcaller("headers")


def headers_of(polled: Any) -> Headers:
    """A record's headers; none when confluent-kafka can't give them (a name not in UTF-8): no event.

    To be called once a record: after such a name the next call ends the interpreter.
    """
    try:
        return list(_give_headers(polled) or ())
    except (SystemError, UnicodeDecodeError):
        return []


def message_of(polled: Any, headers: Headers, *, redelivered: bool = False, handle: object = None) -> Message:
    """A polled record with its headers as a message; `handle` is the record itself where none is given.

    A header that has two values is there as the list of them, so that whoever reads it has to refuse it.
    """
    values: dict[str, list[bytes | None]] = {}
    for name, value in headers:
        known = values.setdefault(name, [])
        if value not in known:
            known.append(value)
    fields: dict[str, object] = {
        name: found[0] if len(found) == 1 else found for name, found in values.items()
    }

    def said(what: str) -> str | None:
        value = next((value for name, value in fields.items() if name.lower() == what), None)
        return value.decode("utf-8", "replace") if isinstance(value, bytes) else None

    key = polled.key()
    return Message(
        binding=Binding.KAFKA,
        headers=fields,
        content_type=said("content-type"),
        body=polled.value() or b"",
        key=None if key is None else key.decode("utf-8", "replace"),
        redelivered=redelivered,
        user_id=None,
        position=f"{polled.topic()}[{polled.partition()}]@{polled.offset()}",
        handle=polled if handle is None else handle,
        content_encoding=said("content-encoding"),
    )
