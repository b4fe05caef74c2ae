"""What Kafka's errors mean for a record, for a client and for its operator.

Codes are those of Apache Kafka's protocol guide; negative ones are librdkafka's own.
"""

from __future__ import annotations

import logging
import re
import time
from enum import Enum
from typing import Any

from confluent_kafka import KafkaError

from virtbus.errors import BusDenied, BusUnavailable, RecordRefused, VirtbusError

# Once one broker has refused us, how long another one may still accept, in seconds.
_DENIAL_GRACE = 0.3


class Verdict(Enum):
    """What a delivery error means for the record and for the producer."""

    # The broker will never take it. It says so of the whole batch: true of a record only when sent alone.
    REFUSED = "refused"
    DENIED = "denied"  # an operator has to act
    UNCLEAR = "unclear"  # it may or may not be stored: new producer, send again


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


def oneline(text: object) -> str:
    """Anything as one line."""
    return " ".join(str(text).split())


def verdict(error: Any) -> Verdict:
    """Classify a KafkaError by its code: its own `retriable()` says no to a time-out that may be stored."""
    code = error.code()
    if code in _REFUSED:
        return Verdict.REFUSED
    if code in _DENIED:
        return Verdict.DENIED
    return Verdict.UNCLEAR


def translate(error: Any, doing: str) -> VirtbusError:
    """A KafkaError as ours, with what was being done: the one place where they are translated."""
    text = f"{doing}: {oneline(error.str())} ({error.name()})"
    match verdict(error):
        case Verdict.REFUSED:
            return RecordRefused(text)
        case Verdict.DENIED:
            return BusDenied(text)
        case Verdict.UNCLEAR:
            return BusUnavailable(text)


def is_missing(error: Any) -> bool:
    """Whether the error says that the topic is not there."""
    return error.code() in _MISSING


def is_purged(error: Any) -> bool:
    """Whether the record was only given up because the whole producer was."""
    return error.code() in (KafkaError._PURGE_QUEUE, KafkaError._PURGE_INFLIGHT, KafkaError._FATAL)


def with_hint(told: str) -> str:
    """A failure to connect, with what it most often means where librdkafka does not say it.

    A listener that reads our first bytes as something else hangs up. More may follow the state:
    "(after 1ms in state APIVERSION_QUERY, 4 identical error(s) suppressed)".
    """
    if re.search(r"Disconnected.*\bin state (APIVERSION_QUERY|SSL_HANDSHAKE)\b", told):
        return f"{told}; is it a TLS listener, and the URL kafka://, or the other way round?"
    return told


class _Ear(logging.Handler):
    """Keeps the last thing that librdkafka logged about a failed connection."""

    def __init__(self, watch: Watch) -> None:
        super().__init__()
        self._watch = watch

    def emit(self, record: logging.LogRecord) -> None:
        """`FAIL [client] [thread]: broker: what happened (after N ms in state S)`."""
        kind, _, text = record.getMessage().partition(" ")
        if kind == "FAIL":
            told = with_hint(oneline(text.partition("]: ")[2] or text))
            self._watch.last = told
            if "SSL alert" in told:  # with TLS 1.3 the broker's refusal comes after our side's handshake
                self._watch(KafkaError(KafkaError._SSL, told))


class Watch:
    """Hears a client's errors (librdkafka's error_cb, from inside poll) and remembers what they mean."""

    def __init__(self, *, listening: bool = False) -> None:
        """`listening` reads librdkafka's log lines too: some failures to connect are told nowhere else."""
        self.listening = listening
        self.logger = logging.Logger("librdkafka")
        self.logger.addHandler(_Ear(self) if listening else logging.NullHandler())
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
        self.last = with_hint(oneline(error.str()))
        if error.fatal():
            self.fatal = error
        if code in _DENIED and self.denied is None:
            self.denied = error
            self.denied_at = time.monotonic()

    def forget(self) -> None:
        """The brokers answered: what was heard before is over."""
        self.denied = None
        self.all_down = False

    def denial(self, now: float) -> Any:
        """The refusal, once no other broker has accepted us for a moment; else None."""
        return self.denied if self.denied is not None and now - self.denied_at > _DENIAL_GRACE else None
