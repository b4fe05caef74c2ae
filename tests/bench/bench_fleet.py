"""Ten thousand hosts through RabbitMQ: the SDK against a bare kombu consumer, memory, and the fleet's view.

    python -m tests.bench.bench_fleet [amqp-url] [seconds of load]

The load is what 10,000 hosts send: 167 heartbeats and 1,000 errors a second. Both consumers get the same
messages in quorum queues of their own and acknowledge each one; the SDK decodes, validates, remembers ids on
disk, makes typed events and folds them into the fleet. Best of three, in turns. Then a whole round of
heartbeats, and how long `virtbus fleet` takes to judge and draw.
"""

from __future__ import annotations

import resource
import sys
import tempfile
import time
import uuid
from pathlib import Path

from tests.bench.consume import bare
from tests.brokers.rabbitmq import RabbitMQ
from virtbus.bus import BusOptions, open_bus
from virtbus.commands.fleet import table
from virtbus.consumer import Consumer
from virtbus.fleet import Fleet
from virtbus.model import Clock, Domain, Record
from virtbus.testing import ListFeed, a_heartbeat, a_host, a_record, an_io_error

HOSTS = 10_000
ERRORS_A_SECOND = 1_000
HEARTBEATS_A_SECOND = HOSTS // 60
AGENTS = [str(uuid.uuid4()) for _ in range(HOSTS)]


def host(number: int):
    """One of the ten thousand."""
    return a_host(name=f"compute-{number:05d}", uuid=None)


def load(seconds: int, turn: int) -> list[Record]:
    """What all hosts send in so many seconds; every id is new."""
    made = []
    for second in range(seconds):
        for index in range(HEARTBEATS_A_SECOND):
            number = (second * HEARTBEATS_A_SECOND + index) % HOSTS
            beat = a_heartbeat(host=host(number), agent_id=AGENTS[number])
            made.append(a_record(beat, sequence=None, agent_id=AGENTS[number]))
        for index in range(ERRORS_A_SECOND):
            number = (second * 997 + index * 7) % HOSTS
            error = an_io_error(
                host=host(number), domain=Domain(str(uuid.UUID(int=number)), "guest", 1, "paused")
            )
            made.append(a_record(error, sequence=10 + turn * seconds + second, agent_id=AGENTS[number]))
    return made


def sdk(url: str, group: str, count: int, dedupe: Path, fleet: Fleet | None) -> float:
    """Events a second through the SDK."""
    clock = Clock()
    with Consumer(url, group=group, dedupe=dedupe, prefetch=100) as consumer:
        begun = time.perf_counter()
        for _ in range(count):
            delivery = consumer.receive(30)
            assert delivery is not None
            if fleet is not None and delivery.event is not None:
                fleet.saw(delivery.event, delivery.attributes, clock())
            delivery.ack()
        return count / (time.perf_counter() - begun)


def rss_mib() -> float:
    """Resident memory now."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 2**20


def main() -> None:
    """Print one line a way, the ratio, memory and the view's time."""
    url, seconds = (*sys.argv[1:], *["", "8"][len(sys.argv) - 1 :])
    folder = Path(tempfile.mkdtemp(prefix="vbbench-", dir="/tmp"))
    broker = None
    if not url:
        broker = RabbitMQ.shared(folder / "rabbitmq")
        url = broker.url(broker.vhost())
    best = {"bare_kombu_consumer": 0.0, "sdk": 0.0, "sdk_and_fleet": 0.0}
    fleet = Fleet()
    try:
        for group in ("bare", "sdk", "fleet"):
            with Consumer(url, group=group) as consumer:
                consumer.receive(0.3)
        bus = open_bus(url, BusOptions(window=1024))
        memory = []
        for turn in range(3):
            records = load(int(seconds), turn)
            ListFeed(records).drain(bus, timeout=120)
            count = len(records)
            del records
            rate = bare(url, count, "virtbus.bare")
            best["bare_kombu_consumer"] = max(best["bare_kombu_consumer"], rate)
            best["sdk"] = max(best["sdk"], sdk(url, "sdk", count, folder / "a.db", None))
            best["sdk_and_fleet"] = max(
                best["sdk_and_fleet"], sdk(url, "fleet", count, folder / "b.db", fleet)
            )
            memory.append(rss_mib())
        bus.close()
    finally:
        if broker is not None:
            broker.close()
    for name, rate in best.items():
        print(f"{name} events_per_second={rate:.0f}")
    print(f"ratio_sdk={best['sdk'] / best['bare_kombu_consumer']:.2f}")
    print(f"ratio_sdk_and_fleet={best['sdk_and_fleet'] / best['bare_kombu_consumer']:.2f}")
    print("rss_mib " + " ".join(f"{value:.0f}" for value in memory))
    clock = Clock()
    for number in range(HOSTS):
        words = {"source": f"/virtbus/agents/{AGENTS[number]}", "epoch": "z"}
        fleet.saw(a_heartbeat(host=host(number), agent_id=AGENTS[number], epoch="0"), words, clock())
    took = []
    for _ in range(5):
        begun = time.perf_counter()
        view = fleet.view(clock())
        table(view, rows=50, columns=160)
        took.append(time.perf_counter() - begun)
    print(f"view_and_draw hosts={len(view.hosts)} incidents={view.incidents} best_ms={min(took) * 1000:.0f}")
    print(f"rss_mib={rss_mib():.0f}")


if __name__ == "__main__":
    main()
