"""What the processes of the embedded bus's tests do: `python -m tests.bus.embedded_child ROLE URL ...`."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

from tests.bus.embedded_parts import ListFeed, event_id, make_record
from virtbus import telemetry
from virtbus.bus import BusOptions, open_bus
from virtbus.errors import VirtbusError
from virtbus.model import Confirmed


def say(text: str) -> None:
    print(text, flush=True)


def publish(url: str, first: str, count: str, keys: str) -> None:
    """Publish `count` events; one line for each confirmation; then wait to be killed."""
    bus = open_bus(url, BusOptions())
    numbers = range(int(first), int(first) + int(count))
    records = [make_record(number, f"key-{number % int(keys)}") for number in numbers]
    for record, outcome in bus.publish(ListFeed(records)):
        assert isinstance(outcome, Confirmed), outcome
        say(f"{record.id} {record.key} {record.seq}")
    say("done")
    time.sleep(60)


def hold(url: str, group: str, count: str) -> None:
    """Receive `count` messages, print their ids, acknowledge none, wait to be killed."""
    subscription = open_bus(url, BusOptions()).consume(None if group == "-" else group)
    say("ready")
    for _ in range(int(count)):
        message = subscription.receive(20)
        assert message is not None
        say(event_id(message))
    time.sleep(60)


def work(url: str, group: str, output: str) -> None:
    """Append `key number` for each message to a file, then acknowledge it; for ever."""
    subscription = open_bus(url, BusOptions()).consume(group, prefetch=8)
    out = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    say("ready")
    while True:
        message = subscription.receive(1)
        if message is not None:
            number = json.loads(message.body)["n"]
            os.write(out, f"{message.key} {number} {os.getpid()}\n".encode())
            time.sleep(0.002)
            subscription.ack(message)


def fill(folder: str) -> None:
    """Publish until the disk is full, make room, publish what was deferred, and read all of it."""
    ballast = Path(folder) / "ballast"
    ballast.write_bytes(bytes(512 * 1024))
    bus = open_bus(f"embedded://{folder}/events.db", BusOptions())
    confirmed: list[str] = []
    while True:
        record = make_record(len(confirmed), size=20_000)
        [(_, outcome)] = bus.publish(ListFeed([record]))
        if not isinstance(outcome, Confirmed):
            break
        confirmed.append(record.id)
    say(f"{len(confirmed)} {type(outcome).__name__} {getattr(outcome, 'error', '')}")
    ballast.unlink()
    [(_, outcome)] = bus.publish(ListFeed([record]))
    say(type(outcome).__name__)
    subscription = bus.consume("g")
    received: list[str] = []
    while (message := subscription.receive(0.3)) is not None:
        subscription.ack(message)
        received.append(event_id(message))
    say("all" if received == [*confirmed, record.id] else f"{len(received)} of {len(confirmed) + 1}")


def open_as(uid: str, url: str) -> None:
    """Open the bus as another user and print the error."""
    bus = open_bus(url, BusOptions())
    os.setuid(int(uid))
    say(" ".join(check.status for check in bus.probe()))
    try:
        bus.consume("g").receive(5)
    except VirtbusError as error:
        say(f"{type(error).__name__} {error}")
    try:
        list(bus.publish(ListFeed([make_record(1)])))
    except VirtbusError as error:
        say(f"{type(error).__name__} {error}")


if __name__ == "__main__":
    telemetry.configure(stream=sys.stderr)
    globals()[sys.argv[1]](*sys.argv[2:])
