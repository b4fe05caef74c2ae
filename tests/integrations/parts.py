"""What the tests of integrations share: publishing to any bus, and a reactor that runs in a thread."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from tests.waiting import wait_until as eventually
from virtbus.bus import BusOptions, open_bus
from virtbus.config import React
from virtbus.consumer import Consumer
from virtbus.fleet import Fleet, FleetRules
from virtbus.integrations.base import Action, Integration, open_integration
from virtbus.integrations.policy import HoldPolicy, HoldRules
from virtbus.integrations.reactor import Reactor
from virtbus.integrations.store import ActionStore
from virtbus.model import Action as Kind
from virtbus.model import Domain, OpenIncident, OpenIncidents, Record, SourceHealth
from virtbus.testing import (
    AGENT_ID,
    ListFeed,
    a_device,
    a_heartbeat,
    a_host,
    a_record,
    an_io_error,
)

LIVE_RULES = FleetRules(round_seconds=0.0)


def publish(url: str, *records: Record) -> None:
    """Publish and wait for every confirmation."""
    bus = open_bus(url, BusOptions())
    ListFeed(records).drain(bus)
    bus.close()


def errors(count: int, *, host: str = "compute-1", first: int = 1) -> list[Record]:
    """`count` errors, each of a guest of its own."""
    return [
        a_record(
            an_io_error(
                host=a_host(name=host),
                domain=Domain(f"00000000-0000-4000-8000-{number:012d}", f"guest-{number}", 1, "paused"),
                error=dataclasses.replace(an_io_error().error, reason="message", disk_error=None),
                incident=dataclasses.replace(an_io_error().incident, id=f"incident-{host}-{number}"),
            ),
            sequence=number,
        )
        for number in range(first, first + count)
    ]


def heartbeat(
    host: str = "compute-1", *, guests: int = 0, sequence: int = 0, agent: str = AGENT_ID
) -> Record:
    """A heartbeat that is sent now, with `guests` in trouble."""
    moment = datetime.now(UTC)
    items = tuple(
        OpenIncident(
            f"incident-{host}-{number}",
            f"00000000-0000-4000-8000-{number:012d}",
            "guest",
            a_device(),
            Kind.PAUSE,
            "message",
            moment,
            moment,
            1,
            1,
            True,
            False,
        )
        for number in range(1, guests + 1)
    )
    event = a_heartbeat(
        host=a_host(name=host),
        agent_id=agent,
        sent_at=moment,
        started_at=moment,
        interval_seconds=60.0,
        source=SourceHealth("connected", moment),
        committed_sequence=sequence,
        confirmed_sequence=sequence,
        incidents=OpenIncidents(guests, items),
    )
    return a_record(event, sequence=None, agent_id=agent)


class Recording(Integration):
    """An integration that writes down what it is told, and fails when `fails` says so."""

    name = "recording"
    holds = True

    def __init__(self, settings: React | None = None) -> None:
        self.done: list[tuple[str, str]] = []
        self.fails: Callable[[Action], None] = lambda action: None

    def execute(self, action: Action) -> str:
        self.fails(action)
        self.done.append((action.verb, action.target))
        return "written down"


@contextmanager
def running(
    integration: Integration,
    url: str,
    folder: Path,
    *,
    rules: HoldRules | None = None,
    fleet: FleetRules = LIVE_RULES,
    told: list[Any] | None = None,
    **more: Any,
) -> Iterator[Reactor]:
    """A reactor in a thread, with real parts around it."""
    lines: list[Any] = [] if told is None else told
    store = ActionStore(folder / f"{integration.name}.db")
    consumer = Consumer(url, group=f"react-{integration.name}", exclusive=True)
    policy = HoldPolicy(rules or HoldRules(when="any", min_guests=1, raise_seconds=0.0, clear_seconds=0.0))
    reactor = Reactor(
        integration,
        consumer=consumer,
        store=store,
        fleet=Fleet(fleet),
        policy=policy,
        tell=lines.append,
        **more,
    )
    failure: list[BaseException] = []

    def run() -> None:
        try:
            reactor.run()
        except BaseException as error:
            failure.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield reactor
    finally:
        reactor.stop()
        thread.join(30)
        consumer.close()
        store.close()
        integration.close()
    if failure:
        raise failure[0]


__all__ = ["Recording", "errors", "eventually", "heartbeat", "open_integration", "publish", "running"]
