"""The RabbitMQ node itself: what every other broker test builds on."""

from __future__ import annotations

import os
import signal
import socket
import ssl
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import unquote, urlsplit

import amqp
import pytest

from tests.brokers.keeper import descendants
from tests.brokers.rabbitmq import RabbitMQ, client_context, wait_until


@contextmanager
def connected(url: str) -> Iterator[amqp.Connection]:
    """A bare AMQP connection, to see what the broker itself does."""
    parts = urlsplit(url)
    connection = amqp.Connection(
        f"{parts.hostname}:{parts.port}",
        userid=unquote(parts.username or ""),
        password=unquote(parts.password or ""),
        virtual_host=unquote(parts.path[1:]),
    )
    connection.connect()
    try:
        yield connection
    finally:
        connection.close()


def publish(connection: amqp.Connection, body: str, queue: str) -> None:
    channel = connection.channel()
    channel.queue_declare(queue, durable=True, auto_delete=False)
    channel.confirm_select()
    channel.basic_publish_confirm(amqp.Message(body, delivery_mode=2), routing_key=queue)


def test_a_message_goes_through_a_virtual_host_of_the_tests_own(rabbitmq: RabbitMQ, amqp_url: str) -> None:
    with connected(amqp_url) as connection:
        publish(connection, "hello", "q")
        assert connection.channel().basic_get("q", no_ack=True).body == "hello"


def test_a_virtual_host_is_not_seen_by_the_next_test(rabbitmq: RabbitMQ) -> None:
    one, other = rabbitmq.vhost(), rabbitmq.vhost()
    with connected(rabbitmq.url(one)) as connection:
        publish(connection, "hello", "q")
    assert rabbitmq.queues(one) == {"q": 1}
    assert rabbitmq.queues(other) == {}


def test_a_user_has_the_permissions_it_was_given_and_no_others(rabbitmq: RabbitMQ, vhost: str) -> None:
    url = rabbitmq.user("writer", vhost, configure="^virtbus[.]events$", write="^virtbus[.]events$")
    rabbitmq.permit_topic("writer", vhost, "virtbus.events", write="^mine[.]")
    with connected(url) as connection:
        channel = connection.channel()
        channel.exchange_declare("virtbus.events", "topic", durable=True, auto_delete=False)
        channel.confirm_select()
        channel.basic_publish_confirm(amqp.Message("x"), exchange="virtbus.events", routing_key="mine.1")
        with pytest.raises(amqp.exceptions.AccessRefused):
            channel.basic_publish_confirm(
                amqp.Message("x"), exchange="virtbus.events", routing_key="theirs.1"
            )
        with pytest.raises(amqp.exceptions.AccessRefused):
            connection.channel().queue_declare("q")


def test_a_confirmed_message_is_there_after_the_node_was_killed(rabbitmq_alone: RabbitMQ) -> None:
    vhost = rabbitmq_alone.vhost()
    connection = amqp.Connection(f"127.0.0.1:{rabbitmq_alone.port}", virtual_host=vhost)
    connection.connect()
    publish(connection, "kept", "q")
    rabbitmq_alone.kill()
    connection.collect()
    assert not rabbitmq_alone.running()
    rabbitmq_alone.restart()
    with connected(rabbitmq_alone.url(vhost)) as again:
        assert again.channel().basic_get("q", no_ack=True).body == "kept"


def test_a_memory_alarm_blocks_publishers_until_it_is_cleared(rabbitmq_alone: RabbitMQ) -> None:
    heard: list[str] = []
    connection = amqp.Connection(
        f"127.0.0.1:{rabbitmq_alone.port}",
        on_blocked=lambda _reason: heard.append("blocked"),
        on_unblocked=lambda: heard.append("unblocked"),
    )
    connection.connect()
    channel = connection.channel()
    with rabbitmq_alone.memory_alarm():
        channel.basic_publish(amqp.Message("x"), routing_key="nowhere")
        connection.drain_events(timeout=10)
        assert heard == ["blocked"]
    connection.drain_events(timeout=10)
    connection.close()
    assert heard == ["blocked", "unblocked"]


def handshake(broker: RabbitMQ, context: ssl.SSLContext, host: str = "localhost") -> None:
    with (
        socket.create_connection(("127.0.0.1", broker.tls_port), timeout=10) as plain,
        context.wrap_socket(plain, server_hostname=host) as secured,
    ):
        secured.send(b"AMQP\0\0\x09\x01")
        assert secured.recv(1) == b"\x01"


def test_the_tls_listener_shows_a_certificate_for_localhost_alone(rabbitmq: RabbitMQ) -> None:
    handshake(rabbitmq, client_context(rabbitmq))
    with pytest.raises(ssl.SSLCertVerificationError, match="IP address mismatch"):
        handshake(rabbitmq, client_context(rabbitmq), host="127.0.0.1")
    with pytest.raises(ssl.SSLCertVerificationError, match=r"self-signed|unable to get local issuer"):
        handshake(rabbitmq, ssl.create_default_context())


def test_the_tls_listener_can_show_an_expired_or_a_foreign_certificate(rabbitmq_alone: RabbitMQ) -> None:
    context = client_context(rabbitmq_alone)
    with (
        rabbitmq_alone.server_certificate(expired=True),
        pytest.raises(ssl.SSLCertVerificationError, match="expired"),
    ):
        handshake(rabbitmq_alone, context)
    with (
        rabbitmq_alone.server_certificate(host="other.example"),
        pytest.raises(ssl.SSLCertVerificationError, match="Hostname mismatch"),
    ):
        handshake(rabbitmq_alone, context)
    handshake(rabbitmq_alone, context)


def test_a_client_logs_in_with_its_certificate_alone(rabbitmq: RabbitMQ, vhost: str) -> None:
    rabbitmq.user("compute7", vhost, configure=".*", write=".*", read=".*")
    certificate = rabbitmq.client_certificate("compute7")
    connection = amqp.Connection(
        f"localhost:{rabbitmq.tls_port}",
        virtual_host=vhost,
        login_method="EXTERNAL",
        ssl={
            "ca_certs": str(rabbitmq.ca_file),
            "certfile": str(certificate.certfile),
            "keyfile": str(certificate.keyfile),
            "cert_reqs": ssl.CERT_REQUIRED,
            "server_hostname": "localhost",
        },
    )
    connection.connect()
    publish(connection, "signed", "q")
    connection.close()


def test_processes_share_a_node_and_the_last_one_to_go_ends_it_also_by_being_killed() -> None:
    # A keeper with a sleeping "server" stands for the node here: a real one takes five seconds.
    folder = Path(os.environ["VIRTBUS_TEST_RUN"]) / "keeper-test"
    script = (
        "import sys, time\n"
        "from pathlib import Path\n"
        "from tests.brokers.keeper import Hold\n"
        "folder = Path(sys.argv[1])\n"
        "hold = Hold(folder) if folder.exists() else Hold.first(folder)\n"
        "if sys.argv[2] == 'first':\n"
        "    command = ['sh', '-c', 'sleep 600 & sleep 600']\n"
        "    print(hold.ask(start=command, env={}, log='/dev/null')['pid'], flush=True)\n"
        "print('holds', flush=True)\n"
        "time.sleep(60)\n"
    )
    root = Path(__file__).parents[2]

    def user(which: str) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            [sys.executable, "-c", script, str(folder), which], cwd=root, stdout=subprocess.PIPE
        )

    with user("first") as first:
        assert first.stdout is not None
        server = int(first.stdout.readline())
        assert first.stdout.readline() == b"holds\n"
        with user("second") as second:
            assert second.stdout is not None
            assert second.stdout.readline() == b"holds\n"
            everything = [server, *descendants(server)]
            first.send_signal(signal.SIGKILL)
            first.wait()
            assert all(Path(f"/proc/{pid}").exists() for pid in everything)
            second.send_signal(signal.SIGKILL)
    wait_until(lambda: not any(Path(f"/proc/{p}").exists() for p in everything), "servers are gone", 10)
    wait_until(lambda: not folder.exists(), f"{folder} is gone", 10)


def test_the_node_is_the_suite_that_was_asked_for(rabbitmq: RabbitMQ) -> None:
    version = tuple(map(int, rabbitmq.version().split(".")[:2]))
    wanted = {"trixie": (4, 0), "forky": (4, 1)}.get(os.environ.get("VIRTBUS_TEST_RABBITMQ", ""), (3, 0))
    assert version >= wanted
