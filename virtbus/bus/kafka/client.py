"""Kafka's topics, and who can be reached: one admin client for the time of a connect or a probe."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, TypeVar

from confluent_kafka import KafkaError, KafkaException, TopicCollection
from confluent_kafka.admin import AdminClient
from confluent_kafka.cimpl import NewTopic

from virtbus.bus.kafka.errors import Watch, is_missing, oneline, translate
from virtbus.bus.kafka.settings import KafkaSettings
from virtbus.errors import BusDenied, BusUnavailable, ConfigError

T = TypeVar("T")


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


class _TopicMissing(BusUnavailable):
    """The topic is not there; inside this module only."""


def make(factory: Callable[[dict[str, Any]], T], config: dict[str, Any]) -> T:
    """A librdkafka client; ConfigError when it refuses the configuration as a whole."""
    try:
        return factory(config)
    except KafkaException as error:
        reason = oneline(error.args[0].str())
        raise ConfigError(f"bus.kafka: librdkafka refuses the settings: {reason}") from error
