"""Credentials, certificates and permissions against the listeners of a real Kafka."""

from __future__ import annotations

import base64
import json
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from confluent_kafka.admin import (
    AclBinding,
    AclBindingFilter,
    AclOperation,
    AclPermissionType,
    ResourcePatternType,
    ResourceType,
)

from tests.kafka.cluster import (
    LIMITED_PASSWORD,
    LIMITED_USER,
    PLAIN_PASSWORD,
    PLAIN_USER,
    SCRAM_PASSWORD,
    SCRAM_USER,
    Cluster,
)
from tests.kafka.fixtures import made
from tests.kafka.help import admin, opened, read
from virtbus.errors import BusDenied, BusUnavailable
from virtbus.model import Confirmed, Deferred
from virtbus.testing import ListFeed, a_record

pytestmark = pytest.mark.kafka


def unsecured_token(seconds: float, subject: str = "agent") -> str:
    """An unsigned JWT, which Kafka's default OAUTHBEARER login takes (for development only)."""
    now = time.time()
    parts = [{"alg": "none"}, {"sub": subject, "iat": now, "exp": now + seconds}]
    return (
        ".".join(base64.urlsafe_b64encode(json.dumps(p).encode()).decode().rstrip("=") for p in parts) + "."
    )


def publishes(url: str, topic: str, **options: Any) -> bool:
    with opened(url, topic, **options) as bus:
        return ListFeed([a_record()]).publish(bus) == [Confirmed()]


def refused(url: str, topic: str, error: type[Exception], **options: Any) -> str:
    # A refusal that waited for this time-out would be ended by the test's own.
    with opened(url, topic, **({"connect_timeout": 3600.0} | options)) as bus, pytest.raises(error) as caught:
        ListFeed([a_record()]).publish(bus)
    return str(caught.value)


# --------------------------------------------------------------------------------------------- SASL


@pytest.mark.parametrize(
    ("mechanism", "user", "password"),
    [
        (None, PLAIN_USER, PLAIN_PASSWORD),
        ("PLAIN", PLAIN_USER, PLAIN_PASSWORD),
        ("SCRAM-SHA-256", SCRAM_USER, SCRAM_PASSWORD),
        ("SCRAM-SHA-512", SCRAM_USER, SCRAM_PASSWORD),
    ],
)
def test_each_password_mechanism_is_accepted(
    kafka_cluster: Cluster, kafka_topic: str, mechanism: str | None, user: str, password: str
) -> None:
    url = f"kafka://{user}:{password}@{kafka_cluster.hosts('sasl')}"
    assert publishes(url, kafka_topic, sasl_mechanism=mechanism)


@pytest.mark.parametrize("mechanism", ["PLAIN", "SCRAM-SHA-256", "SCRAM-SHA-512"])
def test_a_wrong_password_is_denied_at_once(kafka_cluster: Cluster, kafka_topic: str, mechanism: str) -> None:
    user = PLAIN_USER if mechanism == "PLAIN" else SCRAM_USER
    url = f"kafka://{user}:wrong-secret@{kafka_cluster.hosts('sasl')}"
    told = refused(url, kafka_topic, BusDenied, sasl_mechanism=mechanism)
    assert "Authentication failed" in told
    assert "wrong-secret" not in told


def test_a_rotated_password_is_used_at_the_next_connection(
    kafka_cluster: Cluster, kafka_topic: str, tmp_path: Path
) -> None:
    file = tmp_path / "password"
    file.write_text("not yet\n")
    url = f"kafka://{kafka_cluster.hosts('sasl')}"
    with opened(url, kafka_topic, username=PLAIN_USER, password_file=file) as bus:
        with pytest.raises(BusDenied):
            ListFeed([a_record()]).publish(bus)
        file.write_text(f"{PLAIN_PASSWORD}\n")
        assert ListFeed([a_record()]).publish(bus) == [Confirmed()]


def test_an_oauth_token_comes_from_a_file(kafka_cluster: Cluster, kafka_topic: str, tmp_path: Path) -> None:
    file = tmp_path / "token"
    file.write_text(unsecured_token(60))
    url = f"kafka://{kafka_cluster.hosts('sasl')}"
    assert publishes(url, kafka_topic, oauth_token_file=file)


def test_an_oauth_token_comes_from_a_command_and_is_fetched_again_before_it_expires(
    kafka_cluster: Cluster, kafka_topic: str, tmp_path: Path
) -> None:
    calls = tmp_path / "calls"
    response = {"access_token": unsecured_token(60), "expires_in": 4}
    script = f"open({str(calls)!r}, 'a').write('x'); print({json.dumps(response)!r})"
    url = f"kafka://{kafka_cluster.hosts('sasl')}"
    with opened(url, kafka_topic, oauth_token_command=(sys.executable, "-c", script)) as bus:
        assert ListFeed([a_record()]).publish(bus) == [Confirmed()]
        first = len(calls.read_text())
        limit = time.monotonic() + 10
        while len(calls.read_text()) == first and time.monotonic() < limit:
            bus.tick()
            time.sleep(0.1)
        assert len(calls.read_text()) > first
        assert ListFeed([a_record(row=2)]).publish(bus) == [Confirmed()]


def test_a_token_command_that_fails_is_named_with_its_last_words(
    kafka_cluster: Cluster, kafka_topic: str
) -> None:
    script = "import sys; sys.exit('the identity provider is away')"
    url = f"kafka://{kafka_cluster.hosts('sasl')}"
    command = (sys.executable, "-c", script)
    with (
        opened(url, kafka_topic, oauth_token_command=command) as bus,
        pytest.raises(BusUnavailable, match=r"no OAuth token: .* the identity provider is away"),
    ):
        ListFeed([a_record()]).publish(bus)


@pytest.mark.slow
def test_publishing_and_consuming_go_on_through_reauthentication(tmp_path: Path, kafka_topic: str) -> None:
    cluster = made(tmp_path / "cluster", {"connections.max.reauth.ms": "2000"})
    try:
        url = f"kafka://{SCRAM_USER}:{SCRAM_PASSWORD}@{cluster.start().hosts('sasl')}"
        with opened(url, kafka_topic, sasl_mechanism="SCRAM-SHA-512") as bus:
            ListFeed([a_record()]).drain(bus)
            subscription = bus.consume("g")
            got = 0
            for number in range(30):  # six seconds: three times re-authenticated
                assert ListFeed([a_record(row=number)]).publish(bus) == [Confirmed()]
                message = subscription.receive(5.0)
                assert message is not None
                subscription.ack(message)
                got += 1
                time.sleep(0.2)
            subscription.close()
    finally:
        cluster.stop()
    assert got == 30


# ---------------------------------------------------------------------------------------------- TLS


def tls(cluster: Cluster, **changes: Any) -> dict[str, Any]:
    folder = cluster.folder
    return {
        "tls_ca_file": cluster.ca,
        "tls_cert_file": folder / "client.pem",
        "tls_key_file": folder / "client-key.pem",
    } | changes


def test_mutual_tls_is_accepted(kafka_cluster: Cluster, kafka_topic: str) -> None:
    assert publishes(f"kafkas://{kafka_cluster.hosts('tls')}", kafka_topic, **tls(kafka_cluster))


def test_a_missing_client_certificate_is_denied(kafka_cluster: Cluster, kafka_topic: str) -> None:
    url = f"kafkas://{kafka_cluster.hosts('tls')}"
    options = tls(kafka_cluster, tls_cert_file=None, tls_key_file=None)
    assert "certificate" in refused(url, kafka_topic, BusDenied, **options)


def test_an_unknown_ca_is_denied(kafka_cluster: Cluster, kafka_topic: str) -> None:
    url = f"kafkas://{kafka_cluster.hosts('tls')}"
    options = tls(kafka_cluster, tls_ca_file=kafka_cluster.folder / "stranger-ca.pem")
    assert "certificate verify failed" in refused(url, kafka_topic, BusDenied, **options)


def test_a_certificate_for_another_name_is_denied(kafka_cluster: Cluster, kafka_topic: str) -> None:
    url = f"kafkas://{kafka_cluster.hosts('tls').replace('localhost', '127.0.0.1')}"
    assert "verify failed" in refused(url, kafka_topic, BusDenied, **tls(kafka_cluster))


def test_scram_over_tls_is_accepted(kafka_cluster: Cluster, kafka_topic: str) -> None:
    url = f"kafkas://{SCRAM_USER}:{SCRAM_PASSWORD}@{kafka_cluster.hosts('sasl_tls')}"
    assert publishes(url, kafka_topic, sasl_mechanism="SCRAM-SHA-512", tls_ca_file=kafka_cluster.ca)


def test_a_tls_url_to_a_plaintext_listener_is_told_from_a_broker_that_is_away(
    kafka_cluster: Cluster, kafka_topic: str
) -> None:
    url, options = (
        f"kafkas://{kafka_cluster.hosts()}",
        {"connect_timeout": 8.0, "tls_ca_file": kafka_cluster.ca},
    )
    told = refused(url, kafka_topic, BusUnavailable, **options)
    # The broker may answer the handshake with an error of its own protocol, or only hang up.
    assert "PLAINTEXT broker listener?" in told or "the other way round?" in told


# --------------------------------------------------------------------------------------- permissions


class Rules:
    """ACLs for the limited user, taken away at the end: a topic with any rule denies everybody else."""

    def __init__(self, cluster: Cluster) -> None:
        self.client = admin(cluster.url)

    def add(
        self, kind: ResourceType, name: str, operation: AclOperation, permission: AclPermissionType
    ) -> None:
        rule = AclBinding(
            kind, name, ResourcePatternType.LITERAL, f"User:{LIMITED_USER}", "*", operation, permission
        )
        for future in self.client.create_acls([rule]).values():
            future.result(10)
        time.sleep(0.3)  # the broker's authorizer learns of it a moment later

    def clear(self) -> None:
        everything = AclBindingFilter(
            ResourceType.ANY,
            None,
            ResourcePatternType.ANY,
            None,
            None,
            AclOperation.ANY,
            AclPermissionType.ANY,
        )
        for future in self.client.delete_acls([everything]).values():
            future.result(10)


@pytest.fixture
def rules(kafka_cluster: Cluster) -> Any:
    made = Rules(kafka_cluster)
    yield made
    made.clear()


def limited(cluster: Cluster) -> str:
    return f"kafka://{LIMITED_USER}:{LIMITED_PASSWORD}@{cluster.hosts('sasl')}"


def test_a_topic_that_may_be_seen_but_not_written_defers_as_denied_and_loses_nothing(
    kafka_cluster: Cluster, kafka_url: str, kafka_topic: str, rules: Rules
) -> None:
    with opened(kafka_url, kafka_topic) as operator:
        ListFeed([a_record()]).publish(operator)
    rules.add(ResourceType.TOPIC, kafka_topic, AclOperation.DESCRIBE, AclPermissionType.ALLOW)
    item = a_record(row=2)
    feed = ListFeed([item])
    with opened(limited(kafka_cluster), kafka_topic) as bus:
        (outcome,) = feed.publish(bus, again=True)
        assert isinstance(outcome, Deferred)
        assert isinstance(outcome.error, BusDenied)
        assert "TOPIC_AUTHORIZATION_FAILED" in str(outcome.error)
        checks = {each.name: each for each in bus.probe()}
        assert checks["bus.topic"].status == "failed"
        assert checks["bus.topic"].exit_code == 77
        rules.add(ResourceType.TOPIC, kafka_topic, AclOperation.WRITE, AclPermissionType.ALLOW)
        feed.publish(bus)
    assert not len(feed)
    assert len(read(kafka_url, kafka_topic, 2)) == 2


def test_a_topic_that_may_not_be_created_is_a_clear_error(
    kafka_cluster: Cluster, kafka_topic: str, rules: Rules
) -> None:
    rules.add(ResourceType.TOPIC, kafka_topic, AclOperation.DESCRIBE, AclPermissionType.ALLOW)
    rules.add(ResourceType.BROKER, "kafka-cluster", AclOperation.CREATE, AclPermissionType.DENY)
    told = refused(limited(kafka_cluster), kafka_topic, BusDenied)
    assert f'creating topic "{kafka_topic}"' in told
    assert "permit it, or create it" in told


def test_a_group_that_may_not_be_joined_is_denied(
    kafka_cluster: Cluster, kafka_url: str, kafka_topic: str, rules: Rules
) -> None:
    with opened(kafka_url, kafka_topic) as operator:
        ListFeed([a_record()]).publish(operator)
    rules.add(ResourceType.GROUP, "virtbus.shut", AclOperation.READ, AclPermissionType.DENY)
    with opened(limited(kafka_cluster), kafka_topic) as bus:
        subscription = bus.consume("shut")
        with pytest.raises(BusDenied, match="GROUP_AUTHORIZATION_FAILED"):
            subscription.receive(10.0)
        subscription.close()
