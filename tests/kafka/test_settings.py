"""URL, options and errors: everything that is decided without a broker."""

from __future__ import annotations

import base64
import json
import subprocess
import sys
from pathlib import Path

import pytest
from confluent_kafka import KafkaError

from virtbus.bus import BusOptions, open_bus
from virtbus.bus.kafka.client import Watch, translate
from virtbus.bus.kafka.settings import KafkaSettings, _token_and_expiry, check
from virtbus.errors import BusDenied, BusUnavailable, ConfigError, RecordRefused


def problems(url: str, **options: object) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        open_bus(url, BusOptions(**options))  # type: ignore[arg-type]
    assert caught.value.exit_code == 78
    return str(caught.value).splitlines()


def settings(url: str = "kafka://localhost", **options: object) -> KafkaSettings:
    return check(url, BusOptions(**options))  # type: ignore[arg-type]


# ---------------------------------------------------------------------------------------- bad input


def test_every_problem_is_told_at_once_each_in_one_line() -> None:
    told = problems(
        "kafka://user:hush@:9092,good:0",
        topic="no spaces!",
        sasl_mechanism="SCRAM-MD5",
        tls_ca_file=Path("/nowhere/ca.pem"),
        extra={"linger.mss": "5", "acks": "1", "compression.type": "zip"},
    )
    assert told == [
        'bus.url: host missing before port "9092"',
        'bus.url: host good has port "0": use 1 to 65535, or leave it out',
        'bus.topic: Kafka refuses "no spaces!": take ASCII letters, digits, ".", "_" and "-"',
        'bus.kafka.sasl_mechanism: "SCRAM-MD5" is not one of '
        "PLAIN, SCRAM-SHA-256, SCRAM-SHA-512, OAUTHBEARER",
        "bus.tls.ca_file: set, but kafka:// is plaintext: write kafkas://",
        "bus.tls.ca_file: /nowhere/ca.pem can't be read: No such file or directory",
        "bus.kafka.options: linger.mss = '5': No such configuration property: \"linger.mss\"",
        "bus.kafka.options: acks can't be set: delivery and order rest on it",
        "bus.kafka.options: compression.type = 'zip': Invalid value \"zip\" for configuration property "
        '"compression.codec"',
    ]


@pytest.mark.parametrize("url", ["kafka://", "kafkas://", "kafka:///", "kafka://user@", "kafka://,,"])
def test_a_url_without_a_host_says_how_to_write_one(url: str) -> None:
    assert any("no host: write kafka" in line for line in problems(url))


def test_options_that_librdkafka_refuses_together_are_told_at_once() -> None:
    (line,) = problems("kafka://host", extra={"max.in.flight.requests.per.connection": "100"})
    assert line.startswith("bus.kafka: librdkafka refuses the settings: ")
    assert "`max.in.flight` must be set <= 5" in line
    (line,) = problems("kafka://host", extra={"max.poll.interval.ms": "6000"})  # a consumer's
    assert "must be >= `session.timeout.ms`" in line


@pytest.mark.parametrize(
    "option", [{"auto.offset.reset": "latest"}, {"partition.assignment.strategy": "range"}]
)
def test_an_option_that_a_group_rests_on_can_not_be_set(option: dict[str, str]) -> None:
    (line,) = problems("kafka://host", extra=option)
    (name,) = option
    assert line.startswith(f"bus.kafka.options: {name} can't be set: ")


@pytest.mark.parametrize(
    "url", ["kafka://a b", "kafka://host:", "kafka://host:port", "kafka://host:70000", "kafka://[::1"]
)
def test_a_host_or_port_that_cannot_be_read_is_named(url: str) -> None:
    assert len(problems(url)) == 1


def test_a_path_after_the_hosts_is_refused_because_the_topic_has_its_own_setting() -> None:
    assert problems("kafka://host/topic") == [
        'bus.url: "/topic" after the hosts means nothing to Kafka: the topic is bus.topic'
    ]


@pytest.mark.parametrize("topic", [".", "..", "ä", "a/b", "x" * 245])
def test_a_topic_name_that_kafka_refuses_is_refused_here(topic: str) -> None:
    (line,) = problems("kafka://host", topic=topic)
    assert line.startswith("bus.topic: ")


@pytest.mark.parametrize(
    ("options", "line"),
    [
        (
            {"sasl_mechanism": "PLAIN", "password_file": Path(__file__)},
            "bus.username: PLAIN needs a user name",
        ),
        ({"username": "me"}, "bus.password_file: PLAIN needs a password"),
        ({"password_file": Path(__file__)}, "bus.username: a password is set without a user name"),
        (
            {"tls_server_name": "x"},
            "bus.tls.server_name: Kafka's brokers are verified by the names they advertise",
        ),
        ({"sasl_mechanism": "OAUTHBEARER"}, "bus.kafka: OAUTHBEARER needs either oauth_token_file or"),
        ({"username": "me", "password_file": Path("/nowhere")}, "bus.password_file: /nowhere can't be read"),
    ],
)
def test_credentials_that_do_not_fit_together_are_named(options: dict[str, object], line: str) -> None:
    told = problems("kafka://host", **options)
    assert len(told) == 1
    assert told[0].startswith(line)


def test_no_message_and_no_repr_holds_the_password() -> None:
    assert "hush" not in "".join(problems("kafka://user:hush@host", topic="?"))
    bus = open_bus("kafka://user:hush@host")
    assert "hush" not in repr(bus)
    assert "hush" not in repr(settings("kafka://user:hush@host"))


# ----------------------------------------------------------------------------------------- settings


def test_all_bootstrap_hosts_are_used_with_the_default_port_where_none_is_given() -> None:
    made = settings("kafka://one,two:9093;[::1]:9094,[fe80::1]")
    assert made.servers == ("one:9092", "two:9093", "[::1]:9094", "[fe80::1]:9092")
    assert made.client(Watch())["bootstrap.servers"] == "one:9092,two:9093,[::1]:9094,[fe80::1]:9092"


def test_tls_verifies_the_brokers_and_their_names_unless_an_option_says_otherwise() -> None:
    config = settings("kafkas://host").client(Watch())
    assert config["security.protocol"] == "SSL"
    assert config["ssl.endpoint.identification.algorithm"] == "https"
    assert config["enable.ssl.certificate.verification"] is True
    assert not settings("kafkas://host").insecure
    for no in ("false", "F", "0"):
        assert settings("kafkas://host", extra={"enable.ssl.certificate.verification": no}).insecure
    careless = settings("kafkas://host", extra={"ssl.endpoint.identification.algorithm": "none"})
    assert careless.client(Watch())["ssl.endpoint.identification.algorithm"] == "none"
    assert careless.insecure


@pytest.mark.parametrize("off", ["false", "False", "f", "F", "0"])
def test_verification_that_is_off_in_any_spelling_of_librdkafka_is_insecure(off: str) -> None:
    assert settings("kafkas://host", extra={"enable.ssl.certificate.verification": off}).insecure


def test_a_host_name_that_is_not_verified_is_insecure() -> None:
    assert settings("kafkas://host", extra={"ssl.endpoint.identification.algorithm": "NONE"}).insecure


def test_a_misspelt_secret_option_is_named_without_its_value() -> None:
    (told,) = problems("kafka://host", extra={"sasl.passwrod": "s3cret"})
    assert told == 'bus.kafka.options: sasl.passwrod = ***: No such configuration property: "sasl.passwrod"'


@pytest.mark.parametrize(
    ("url", "insecure"),
    [
        ("kafka://localhost,127.0.0.1:1,[::1]:2", False),
        ("kafka://localhost,far", True),
        ("kafkas://far", False),
    ],
)
def test_plaintext_is_insecure_when_any_broker_is_beyond_loopback(url: str, insecure: bool) -> None:
    assert settings(url).insecure is insecure


def test_the_password_file_wins_and_is_read_each_time(tmp_path: Path) -> None:
    file = tmp_path / "password"
    file.write_text("first\n")
    made = settings("kafka://me:old@host", password_file=file)
    assert made.client(Watch())["sasl.password"] == "first"
    file.write_text("second")
    assert made.client(Watch())["sasl.password"] == "second"
    file.unlink()
    with pytest.raises(BusDenied, match="password can't be read"):
        made.client(Watch())


def test_percent_encoding_in_user_and_password_is_undone() -> None:
    config = settings("kafka://d%40main:p%2Fw@host", sasl_mechanism="SCRAM-SHA-512").client(Watch())
    assert (config["sasl.username"], config["sasl.password"]) == ("d@main", "p/w")
    assert config["security.protocol"] == "SASL_PLAINTEXT"
    assert config["sasl.mechanism"] == "SCRAM-SHA-512"


def test_any_further_option_reaches_librdkafka() -> None:
    made = settings(extra={"compression.type": "lz4", "client.rack": "r1"})
    assert made.producer(Watch())["compression.type"] == "lz4"
    assert made.consumer(Watch(), "g", 10)["client.rack"] == "r1"
    made = settings(extra={"auto.commit.interval.ms": "1000"})
    assert made.consumer(Watch(), "g", 10)["auto.commit.interval.ms"] == "1000"


def test_the_producer_is_idempotent_with_all_acks_and_javas_partitioner() -> None:
    config = settings().producer(Watch())
    assert config["enable.idempotence"] is True
    assert config["acks"] == "all"
    assert config["partitioner"] == "murmur2_random"


# -------------------------------------------------------------------------------------------- OAuth


def jwt(**claims: object) -> str:
    parts = [{"alg": "none"}, claims]
    return (
        ".".join(base64.urlsafe_b64encode(json.dumps(part).encode()).decode().rstrip("=") for part in parts)
        + "."
    )


def test_a_jwt_expires_when_it_says() -> None:
    token = jwt(sub="me", exp=2_000_000_000)
    assert _token_and_expiry(token + "\n", 1000.0) == (token, 2_000_000_000.0)


def test_a_token_response_expires_when_it_says() -> None:
    assert _token_and_expiry('{"access_token": "abc", "expires_in": 60}', 1000.0) == ("abc", 1060.0)


def test_an_opaque_token_is_fetched_again_after_five_minutes() -> None:
    assert _token_and_expiry("opaque", 1000.0) == ("opaque", 1300.0)


@pytest.mark.parametrize("text", ["", "  \n", "{}", '{"access_token": ""}'])
def test_no_token_is_an_error(text: str) -> None:
    with pytest.raises(ValueError, match="no token"):
        _token_and_expiry(text, 0.0)


# ------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("code", "error"),
    [
        (KafkaError._MSG_TIMED_OUT, BusUnavailable),  # says it is not retriable; may be stored
        (KafkaError.NOT_ENOUGH_REPLICAS, BusUnavailable),
        (KafkaError.NOT_ENOUGH_REPLICAS_AFTER_APPEND, BusUnavailable),
        (KafkaError.OUT_OF_ORDER_SEQUENCE_NUMBER, BusUnavailable),
        (KafkaError._PURGE_INFLIGHT, BusUnavailable),
        (KafkaError._FATAL, BusUnavailable),
        (KafkaError.UNKNOWN_TOPIC_OR_PART, BusUnavailable),
        (KafkaError.TOPIC_AUTHORIZATION_FAILED, BusDenied),
        (KafkaError.CLUSTER_AUTHORIZATION_FAILED, BusDenied),
        (KafkaError._AUTHENTICATION, BusDenied),
        (KafkaError._SSL, BusDenied),
        (KafkaError.MSG_SIZE_TOO_LARGE, RecordRefused),
        (KafkaError.INVALID_RECORD, RecordRefused),
    ],
)
def test_an_error_is_judged_by_its_code(code: int, error: type[Exception]) -> None:
    assert type(translate(KafkaError(code), "testing")) is error


# ------------------------------------------------------------------------------------------ imports


def test_no_kafka_module_is_loaded_unless_a_kafka_url_is_used() -> None:
    code = (
        "import sys\n"
        "from virtbus.bus import open_bus\n"
        "open_bus('amqp://localhost').close()\n"
        "print(sorted(n for n in sys.modules if 'kafka' in n))\n"
        "open_bus('kafka://localhost').close()\n"
        "print('confluent_kafka' in sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\nTrue\n"
