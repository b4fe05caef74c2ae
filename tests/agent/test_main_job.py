"""A real guest's disk fails; a real broker delivers it to consumers, whatever is killed on the way."""

from __future__ import annotations

import json
import time
from pathlib import Path
from urllib.parse import urlsplit

import kombu
import pytest

from tests.agent.process import AgentProcess, virtbus
from tests.faultkit import TcpFaultProxy
from tests.lab.lab import PAUSED_IOERROR, RUNNING, Lab

IO_ERROR = "io.virtbus.domain.io_error.v1"
GAP = "io.virtbus.agent.gap.v1"


class BareConsumer:
    """A kombu consumer that knows nothing of virtbus: exchange, queue, headers, body."""

    def __init__(self, url: str) -> None:
        self._connection = kombu.Connection(url)
        exchange = kombu.Exchange("virtbus.events", type="topic", durable=True)
        self._queue = kombu.Queue("bare", exchange, routing_key="#", exclusive=True)
        self.messages: list[kombu.Message] = []
        self._consumer = self._connection.Consumer(self._queue, callbacks=[self._took])
        self._consumer.consume()

    def _took(self, body: object, message: kombu.Message) -> None:
        self.messages.append(message)
        message.ack()

    def wait(self, type_: str, count: int = 1, seconds: float = 20) -> list[kombu.Message]:
        """Wait for `count` messages of a CloudEvents type."""
        deadline = time.monotonic() + seconds
        while True:
            found = [message for message in self.messages if message.headers.get("ce-type") == type_]
            if len(found) >= count or time.monotonic() > deadline:
                assert len(found) >= count, f"{len(found)} of {count} {type_} came"
                return found
            try:
                self._connection.drain_events(timeout=0.5)
            except TimeoutError:
                continue

    def close(self) -> None:
        self._connection.close()


@pytest.fixture
def bare(amqp_url: str):
    consumer = BareConsumer(amqp_url)
    yield consumer
    consumer.close()


def test_a_bare_consumer_reads_a_real_guests_error_in_rabbitmqs_binary_mode(
    lab: Lab, amqp_url: str, bare: BareConsumer, tmp_path: Path
):
    guest = lab.guest("victim", error="EIO").start()
    with AgentProcess(tmp_path, libvirt=lab.uri_ro, bus=amqp_url).ready() as agent:
        guest.fail()
        guest.wait_state(PAUSED_IOERROR)
        (message,) = bare.wait(IO_ERROR)
        agent.until(lambda: agent.metric("virtbus_spool_events") == 0, "the spool empty")
        assert agent.metric("virtbus_callbacks_total") == guest.injected() == 1
        assert agent.stop() == 0
    assert message.content_type == message.headers["content-type"] == "application/json"
    assert message.headers["ce-specversion"] == "1.0"
    assert message.headers["ce-subject"] == f"{guest.uuid}/virtio-disk0"
    assert message.delivery_info["routing_key"].startswith("io_error.")
    assert message.delivery_info["routing_key"].endswith(f".{guest.uuid}")
    data = json.loads(message.body)
    assert data["error"]["action"] == "pause"
    assert data["domain"]["name"] == "victim"
    assert data["device"]["target"] == "vda"
    assert data["occurrences"]["count"] == 1
    assert data["enriched"] is True


def test_an_event_survives_a_kill_between_commit_and_confirm(
    lab: Lab, amqp_url: str, bare: BareConsumer, tmp_path: Path
):
    guest = lab.guest("victim", error="EIO").start()
    parts = urlsplit(amqp_url)
    with TcpFaultProxy("127.0.0.1", parts.port or 5672) as proxy:
        through_proxy = amqp_url.replace(f":{parts.port}", f":{proxy.port}")
        with AgentProcess(tmp_path, libvirt=lab.uri_ro, bus=through_proxy).ready() as agent:
            bare.wait(GAP)
            agent.until(lambda: agent.metric("virtbus_spool_events") == 0, "the first event confirmed")
            proxy.black_hole()
            guest.fail()
            guest.wait_state(PAUSED_IOERROR)
            agent.until(lambda: agent.metric("virtbus_spool_events") >= 1, "the error committed")
            agent.kill()
    listed = virtbus("spool", "list", "--json", "--state-dir", str(tmp_path / "state"))
    assert listed.returncode == 0, listed.stderr
    committed = [json.loads(line) for line in listed.stdout.splitlines()]
    (event_id,) = [row["id"] for row in committed if row["kind"] == "opened"]
    assert {message.headers["ce-type"] for message in bare.messages} == {GAP}

    with AgentProcess(tmp_path, libvirt=lab.uri_ro, bus=amqp_url).ready() as agent:
        (message,) = bare.wait(IO_ERROR)
        gaps = bare.wait(GAP, 2)
        agent.stop()
    assert message.headers["ce-id"] == event_id
    second = json.loads(gaps[1].body)
    assert second["reason"] == "agent_down"
    assert second["previous"]["epoch"] == message.headers["ce-epoch"]
    assert gaps[1].headers["ce-sequence"] == "000000000001"
    assert gaps[1].headers["ce-epoch"] != message.headers["ce-epoch"]


def test_a_resume_resolves_the_incident_of_a_device_that_was_quiet(
    lab: Lab, amqp_url: str, bare: BareConsumer, tmp_path: Path
):
    guest = lab.guest("victim", error="ENOSPC", policy="enospace").start()
    settings = "[incidents]\nquiet_seconds = 1.0\n"
    with AgentProcess(tmp_path, libvirt=lab.uri_ro, bus=amqp_url, settings=settings).ready() as agent:
        guest.fail()
        guest.wait_state(PAUSED_IOERROR)
        (opened,) = bare.wait(IO_ERROR)
        guest.heal()
        guest.resume()
        guest.wait_state(RUNNING)
        (resolved,) = bare.wait("io.virtbus.domain.io_error_resolved.v1")
        agent.stop()
    data = json.loads(resolved.body)
    assert json.loads(opened.body)["error"]["reason"] == "enospc"
    assert data["resolution"]["cause"] == "resumed"
    assert data["incident"]["id"] == json.loads(opened.body)["incident"]["id"]
    assert data["occurrences"]["total"] == guest.injected()
