"""The consumers of docs/examples on a real RabbitMQ: what can't be read is dead-lettered, the rest done."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pika
import pytest

from tests.brokers.rabbitmq import RabbitMQ, wait_until
from tests.conftest import need
from tests.consumer.test_rabbitmq_limits import documented_rights
from tests.interop import events
from tests.interop.receivers import CACHE, locked, run
from virtbus.bus import BusOptions, open_bus

EXAMPLES = Path(__file__).parents[2] / "docs" / "examples"


def go(folder: Path) -> list[str]:
    run(["go", "build", "-mod=readonly", "-o", "consumer", "."], folder, timeout=280)
    return [str(folder / "consumer")]


def javascript(folder: Path) -> list[str]:
    run(["npm", "ci", "--ignore-scripts", "--no-audit", "--no-fund"], folder, timeout=280)
    return ["node", str(folder / "consumer.mjs")]


LANGUAGES: dict[str, tuple[str, Callable[[Path], list[str]]]] = {
    "go": ("go", go),
    "javascript": ("npm", javascript),
}


@contextmanager
def consuming(command: list[str], url: str, out: Path) -> Iterator[None]:
    """An example's consumer, ended without a farewell."""
    secret = out.with_name("bus-url")
    secret.write_text(f"{url}\n")
    with out.open("ab") as file:
        process = subprocess.Popen([*command, str(secret), "example"], stdout=file, stderr=subprocess.STDOUT)
    try:
        yield
    finally:
        process.kill()
        process.wait()


ERROR, HEARTBEAT = "io.virtbus.domain.io_error.v1", "io.virtbus.agent.heartbeat.v1"
# Events by their attributes, whose data nobody can act on: (type, body).
UNREADABLE = [
    (ERROR, b""),
    (ERROR, b"{"),
    (ERROR, b"null"),
    (ERROR, b"[1]"),
    (ERROR, b'"text"'),
    (ERROR, b"{}"),
    (ERROR, b'{"domain": {"name": "vm"}}'),
    (ERROR, b'{"domain": null, "error": {"action": "pause"}}'),
    (HEARTBEAT, b"null"),
    (HEARTBEAT, b"7"),
]
# Another type's data is its own affair: (content type, body).
FOREIGN = [("application/json", b"[1]"), ("text/plain", b"no JSON"), ("application/json", b"null")]


def message(type_: str, content_type: str, number: int) -> pika.BasicProperties:
    """The properties of an event in binary mode."""
    attributes = {"specversion": "1.0", "id": f"made-{number}", "source": "/made", "type": type_}
    headers = {f"ce-{name}": value for name, value in attributes.items()}
    return pika.BasicProperties(content_type=content_type, headers={**headers, "content-type": content_type})


@pytest.mark.timeout(600)
@pytest.mark.parametrize("language", LANGUAGES)
def test_an_examples_consumer_acts_on_every_event_and_dead_letters_what_cannot_be_read(
    rabbitmq: RabbitMQ, vhost: str, amqp_url: str, tmp_path: Path, language: str
) -> None:
    tool, build = LANGUAGES[language]
    need([f"{tool} (for the {language} example)"] if shutil.which(tool) is None else [])
    with locked(CACHE / f"example-{language}.lock"):
        folder = CACHE / f"example-{language}"
        shutil.copytree(EXAMPLES / language, folder, dirs_exist_ok=True)
        command = build(folder)
    # With the rights of docs/security.md and no more.
    rights = {right: each.replace("scheduler", "example") for right, each in documented_rights().items()}
    limited = rabbitmq.user(f"example-{vhost}", vhost, **rights)
    out = tmp_path / "out"
    out.touch()
    connection = pika.BlockingConnection(pika.URLParameters(amqp_url))
    channel = connection.channel()

    def count(queue: str, of: str = "message_count") -> int | None:
        nonlocal channel
        try:
            return int(getattr(channel.queue_declare(queue, passive=True).method, of))
        except pika.exceptions.ChannelClosedByBroker:
            channel = connection.channel()
            return None

    with consuming(command, limited, out):
        # A queue that is there need not be bound yet; who consumes from it has bound it.
        wait_until(lambda: count("virtbus.example", "consumer_count") == 1, "the example consumes", 60)
        channel.basic_publish("virtbus.events", "io_error.x.y", b"no event")
        for number, (type_, body) in enumerate(UNREADABLE):
            made = message(type_, "application/json", number)
            channel.basic_publish("virtbus.events", "io_error.x.y", body, made)
        for number, (content_type, body) in enumerate(FOREIGN, len(UNREADABLE)):
            made = message("example.foreign", content_type, number)
            channel.basic_publish("virtbus.events", "foreign.x.y", body, made)
        wait_until(
            lambda: out.read_text().count("other made-") == len(FOREIGN), "it skips what it does not know", 60
        )
        wait_until(
            lambda: count("virtbus.example.dead") == 1 + len(UNREADABLE), "the rest is dead-lettered", 60
        )
        assert "reconnecting" not in out.read_text()
    # While it is away its queue keeps what comes, in either mode.
    records = events.records()
    for structured in (False, True):
        bus = open_bus(amqp_url, BusOptions(structured=structured))
        try:
            events.publish(bus, records)
        finally:
            bus.close()
    told = [
        record.attributes["id"]
        for record in records
        if ".heartbeat." not in record.attributes["type"]
        and json.loads(record.body).get("origin") != "replay"
    ]
    with consuming(command, limited, out):
        wait_until(
            lambda: all(out.read_text().count(each) >= 2 for each in told), "it acts on every event", 60
        )
    kinds = {line.split()[0] for line in out.read_text().splitlines()}
    assert {"error", "resolved", "gap"} <= kinds
    assert out.read_text().count("other ") == len(FOREIGN)
    assert count("virtbus.example.dead") == 1 + len(UNREADABLE)
    connection.close()
