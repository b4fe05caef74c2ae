"""`virtbus bench`: how many events a second a bus confirms, and how long a confirm takes, from this host.

It publishes made-up events to an exchange or topic of its own, `virtbus.bench`, and reads them away again,
so no consumer of real events ever sees one. On AMQP the exchange stays behind, empty.
"""

from __future__ import annotations

import json
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from collections.abc import Set as AbstractSet
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TextIO

import click

from virtbus import redaction
from virtbus.bus import Bus, BusOptions, open_bus
from virtbus.commands import wiring
from virtbus.commands.options import (
    bus,
    common,
    load,
    state_dir,
)
from virtbus.commands.terminal import progress
from virtbus.config import Config, bus_url
from virtbus.errors import BusUnavailable, ConfigError
from virtbus.model import Confirmed, Record
from virtbus.testing import ListFeed, records

NAME = "virtbus.bench"
ALONE = 200  # events that are published one at a time, for the latency of a quiet host
GIVE_UP_SECONDS = 30.0  # without any confirmation


@dataclass(frozen=True, slots=True)
class Latency:
    """Milliseconds from handing an event to the bus to its confirmation."""

    p50: float
    p95: float
    p99: float

    @classmethod
    def of(cls, seconds: Sequence[float]) -> Latency:
        """From measured seconds, at least one."""
        ordered = sorted(seconds)

        def at(share: float) -> float:
            return round(ordered[min(len(ordered) - 1, int(share * len(ordered)))] * 1000, 3)

        return cls(at(0.5), at(0.95), at(0.99))


class _Timed:
    """A feed that notes when each record was taken, and tells of each that is confirmed."""

    def __init__(self, items: Sequence[Record], told: Callable[[int], object]) -> None:
        self._feed = ListFeed(items)
        self._taken: dict[int, float] = {}
        self._told = told
        self.seconds: list[float] = []

    def take(self, limit: int, busy: AbstractSet[str]) -> Sequence[Record]:
        """See virtbus.bus.Feed."""
        taken = self._feed.take(limit, busy)
        now = time.perf_counter()
        for record in taken:
            self._taken[record.row] = now
        return taken

    def publish(self, bus: Bus) -> None:
        """Until all are confirmed. Raises BusUnavailable when nothing was for a while, and why."""
        last = time.monotonic()
        why: object = "no answer"
        while len(self._feed):
            for record, outcome in bus.publish(self):
                self._feed.settle(record, outcome)
                if isinstance(outcome, Confirmed):
                    self.seconds.append(time.perf_counter() - self._taken[record.row])
                    self._told(1)
                    last = time.monotonic()
                else:
                    why = getattr(outcome, "error", None) or outcome
            if time.monotonic() - last > GIVE_UP_SECONDS:
                raise BusUnavailable(f"nothing was confirmed for {GIVE_UP_SECONDS:g} s: {why}")


def run(
    config: Config,
    *,
    events: int,
    domains: int,
    group: str | None,
    as_json: bool,
    out: TextIO,
    notices: TextIO,
) -> None:
    """Measure and print. Raises ConfigError, BusUnavailable or BusDenied."""
    alone = min(ALONE, events)
    options = replace(wiring.bus_options(config), exchange=NAME, topic=NAME)
    with _bench_url(config) as url, _reader(url, options, group):
        bus = open_bus(url, options)
        try:
            with progress(alone + events, "publishing", notices) as bar:
                quiet = []
                for record in records(alone, keys=domains):
                    one = _Timed([record], bar.update)
                    one.publish(bus)
                    quiet += one.seconds
                busy = _Timed(records(events, keys=domains), bar.update)
                begun = time.perf_counter()
                busy.publish(bus)
                seconds = time.perf_counter() - begun
        finally:
            bus.close()
    report = {
        "bus": redaction.uri(bus_url(config)),
        "events": events,
        "domains": domains,
        "window": options.window,
        "seconds": round(seconds, 3),
        "events_per_second": round(events / seconds, 1),
        "confirm_ms_alone": _as_dict(Latency.of(quiet)),
        "confirm_ms_busy": _as_dict(Latency.of(busy.seconds)),
    }
    if as_json:
        out.write(json.dumps(report) + "\n")
        return
    out.write(f"{report['bus']}: {events:,} events of {domains:,} domains, window {options.window}\n")
    out.write(f"{events / seconds:,.0f} events a second, confirmed\n\n")
    out.write(f"{'confirm, ms':<28}{'p50':>10}{'p95':>10}{'p99':>10}\n")
    for name, taken in (("one at a time", quiet), ("as fast as it goes", busy.seconds)):
        each = Latency.of(taken)
        out.write(f"{name:<28}{each.p50:>10.2f}{each.p95:>10.2f}{each.p99:>10.2f}\n")


def _as_dict(latency: Latency) -> dict[str, float]:
    return {"p50": latency.p50, "p95": latency.p95, "p99": latency.p99}


@contextmanager
def _bench_url(config: Config) -> Iterator[str]:
    """The settings' bus; an embedded one in a file of its own, beside the real one and on the same disk."""
    url = bus_url(config)
    if not url.startswith("embedded:"):
        yield url
        return
    path = url.removeprefix("embedded:").removeprefix("//")
    folder = Path(path).parent if path else Path(config.state_dir)
    try:
        made = tempfile.TemporaryDirectory(prefix="virtbus-bench-", dir=folder)
    except OSError as error:
        raise ConfigError(
            f"no file can be made in {folder}: {error.strerror}; make the folder, or name another bus"
        ) from error
    with made as name:
        yield f"embedded://{name}/bus.db"


@contextmanager
def _reader(url: str, options: BusOptions, group: str | None) -> Iterator[None]:
    """Somebody who takes the events away: on AMQP what no queue takes is not confirmed as delivered."""
    bus = open_bus(url, options)
    stream = bus.consume(group)
    stream.receive(0.5)  # subscribed from here on
    over = threading.Event()

    def read() -> None:
        while not over.is_set():
            try:
                message = stream.receive(0.2)
                if message is not None:
                    stream.ack(message)
            except BusUnavailable:
                over.wait(0.2)

    thread = threading.Thread(target=read, name="virtbus-bench-reader", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join(5.0)
        stream.close()
        bus.close()


# ------------------------------------------------------------------------------- the command line


@click.command("bench")
@common
@bus
@state_dir
@click.option(
    "--events",
    type=click.IntRange(1),
    default=10_000,
    show_default=True,
    metavar="N",
    help="How many are published as fast as it goes.",
)
@click.option(
    "--domains",
    type=click.IntRange(1),
    default=1000,
    show_default=True,
    metavar="N",
    help="Of how many domains: one event of each is under way at a time.",
)
@click.option(
    "--group", metavar="NAME", help="Into this durable group, whose queue stays [default: a transient one]."
)
@click.option("--json", "as_json", is_flag=True, help="As JSON.")
def command(events: int, domains: int, group: str | None, as_json: bool, **options: Any) -> None:
    """Measure a bus from this host: events confirmed a second, and how long a confirm takes.

    The events are made up and go to an exchange or topic of their own, virtbus.bench: no consumer of real
    events sees them.

    \b
    Example: virtbus bench --bus amqp://guest:guest@127.0.0.1//
    """
    run(
        load(options).config,
        events=events,
        domains=domains,
        group=group,
        as_json=as_json,
        out=sys.stdout,
        notices=sys.stderr,
    )
