"""What librdkafka says about a failed connection, in words that help."""

import logging

import pytest
from confluent_kafka import KafkaError

from virtbus.bus.kafka.client import Watch


def heard(line):
    watch = Watch(listening=True)
    watch.logger.handle(logging.LogRecord("librdkafka", logging.ERROR, "", 0, line, None, None))
    return watch.last


@pytest.mark.parametrize("state", ["APIVERSION_QUERY", "SSL_HANDSHAKE"])
@pytest.mark.parametrize("more", ["", ", 4 identical error(s) suppressed", ", 1 request(s) timed out"])
def test_the_hint_at_tls_is_there_whatever_librdkafka_appends(state, more):
    told = heard(
        "FAIL [virtbus#producer-1] [thrd:localhost:9093/bootstrap]: localhost:9093/bootstrap: "
        f"Disconnected: connection closed by peer (after 1ms in state {state}{more})"
    )
    assert told.startswith("localhost:9093/bootstrap: Disconnected")
    assert told.endswith("is it a TLS listener, and the URL kafka://, or the other way round?")


def test_the_hint_is_there_too_when_librdkafka_reports_the_error_itself():
    watch = Watch(listening=True)
    told = (
        "ssl://h:1/bootstrap: Disconnected: SSL connection closed by peer (after 0ms in state SSL_HANDSHAKE)"
    )
    watch(KafkaError(KafkaError._TRANSPORT, told))
    assert watch.last == f"{told}; is it a TLS listener, and the URL kafka://, or the other way round?"


def test_an_address_in_brackets_is_kept():
    told = heard(
        "FAIL [v#c-1] [thrd:[::1]:9092/bootstrap]: [::1]:9092/bootstrap: Connect to ipv6#[::1]:9092 failed"
    )
    assert told == "[::1]:9092/bootstrap: Connect to ipv6#[::1]:9092 failed"


def test_a_connection_that_ends_later_has_no_such_hint():
    assert "TLS listener" not in heard("FAIL [v] [thrd:a]: a: Disconnected (after 61000ms in state UP)")
