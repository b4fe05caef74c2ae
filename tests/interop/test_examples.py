"""The consumers of docs/examples on a real RabbitMQ: every event is acted on, what is none is put aside."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pika
import pytest

from tests.brokers.rabbitmq import wait_until
from tests.conftest import need
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
    with out.open("ab") as file:
        process = subprocess.Popen([*command, url, "example"], stdout=file, stderr=subprocess.STDOUT)
    try:
        yield
    finally:
        process.kill()
        process.wait()


@pytest.mark.timeout(600)
@pytest.mark.parametrize("language", LANGUAGES)
def test_an_examples_consumer_acts_on_every_event_and_puts_aside_what_is_none(
    amqp_url: str, tmp_path: Path, language: str
) -> None:
    tool, build = LANGUAGES[language]
    need([f"{tool} (for the {language} example)"] if shutil.which(tool) is None else [])
    with locked(CACHE / f"example-{language}.lock"):
        folder = CACHE / f"example-{language}"
        shutil.copytree(EXAMPLES / language, folder, dirs_exist_ok=True)
        command = build(folder)
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

    with consuming(command, amqp_url, out):
        # A queue that is there need not be bound yet; who consumes from it has bound it.
        wait_until(lambda: count("virtbus.example", "consumer_count") == 1, "the example consumes", 60)
        channel.basic_publish("virtbus.events", "io_error.x.y", b"no event")
        wait_until(lambda: count("virtbus.example.dead") == 1, "it puts aside what is no event", 60)
    # While it is away its queue keeps what comes, in either mode.
    made = events.records()
    for structured in (False, True):
        bus = open_bus(amqp_url, BusOptions(structured=structured))
        try:
            events.publish(bus, made)
        finally:
            bus.close()
    told = [
        record.attributes["id"]
        for record in made
        if ".heartbeat." not in record.attributes["type"]
        and json.loads(record.body).get("origin") != "replay"
    ]
    with consuming(command, amqp_url, out):
        wait_until(
            lambda: all(out.read_text().count(each) >= 2 for each in told), "it acts on every event", 60
        )
    kinds = {line.split()[0] for line in out.read_text().splitlines()}
    assert {"error", "resolved", "gap"} <= kinds
    assert "other" not in kinds
    assert count("virtbus.example.dead") == 1
    connection.close()
