"""Publishing from the spool: the agent's own publisher against raw pipelined kombu, in one run.

    python -m tests.bench.bench_spool [amqp-url] [events] [window]

Events of 1,000 domains are committed to a real spool first; then the agent's publisher drains it while the
same messages go out raw, in turn, three times. Prints each rate and the ratios' median and range.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import threading
import time
from pathlib import Path

import kombu

from tests.bench.bench_amqp import EXCHANGE, confirm_each, raw_pipelined
from tests.brokers.rabbitmq import RabbitMQ
from virtbus import telemetry
from virtbus.agent import Agent, AgentOptions
from virtbus.bus import BusOptions, open_bus
from virtbus.envelope import uuid7
from virtbus.incidents import IncidentLimits, Incidents
from virtbus.spool import Spool, SpoolLimits
from virtbus.testing import FakeSource, a_domain, an_io_error, records

AGENT = "11111111-2222-4333-8444-555555555555"


def fill(spool: Spool, events: int, domains: int = 1000) -> None:
    """Commit `events` io_error events, round robin over `domains`."""
    made = [an_io_error(domain=a_domain(uuid=uuid7(number), name=f"guest-{number}")) for number in range(domains)]
    for start in range(0, events, 500):
        spool.commit([made[n % domains] for n in range(start, min(start + 500, events))])


def drain(url: str, events: int, window: int, *, domains: int = 1000) -> tuple[float, float]:
    """(events a second, peak RSS growth in MiB) of draining a spool of `events`."""
    with tempfile.TemporaryDirectory(dir="/var/tmp") as folder:
        spool = Spool.open(Path(folder) / "state", limits=SpoolLimits(max_bytes=4 << 30), agent_id=AGENT)
        fill(spool, events, domains)
        agent = Agent(
            source=FakeSource(),
            bus=open_bus(url, BusOptions(exchange=EXCHANGE, window=window)),
            spool=spool,
            incidents=Incidents(IncidentLimits(), new_id=lambda: uuid7(time.time_ns())),
            agent_id=AGENT,
            options=AgentOptions(heartbeat_seconds=0),
        )
        before = rss()
        peak, stop = [before], threading.Event()
        watcher = threading.Thread(target=lambda: [peak.append(rss()) for _ in iter(lambda: stop.wait(0.1), True)])
        watcher.start()
        begun = time.perf_counter()
        agent.start()
        while spool.stats().committed_sequence == events or spool.stats().pending:
            time.sleep(0.005)
        seconds = time.perf_counter() - begun
        stop.set()
        watcher.join()
        agent.stop()
        agent.join()
    return events / seconds, max(peak) / before


def rss() -> float:
    """This process's resident memory in MiB."""
    with open("/proc/self/statm") as statm:
        return int(statm.read().split()[1]) * 4096 / 2**20


def main() -> None:
    """Print one line a round and the medians."""
    telemetry.configure(level="error", fmt="json")
    url, events, window = (*sys.argv[1:], *["", "20000", "256"][len(sys.argv) - 1 :])
    broker = None
    if not url:
        broker = RabbitMQ.shared(Path(tempfile.mkdtemp(prefix="vbbench-", dir="/tmp")) / "rabbitmq")
        url = broker.url(broker.vhost())
    ratios, confirms = [], []
    try:
        with kombu.Connection(url) as connection:
            channel = connection.channel()
            channel.exchange_declare(EXCHANGE, type="topic", durable=True, auto_delete=False)
            channel.queue_declare("bench", durable=True, auto_delete=False)
            channel.queue_bind("bench", EXCHANGE, "#")
            items = records(int(events), keys=1000)
            for turn in range(3):
                raw = raw_pipelined(url, items, int(window))
                channel.queue_purge("bench")
                each = confirm_each(url, items, int(window))
                channel.queue_purge("bench")
                ours, growth = drain(url, int(events), int(window))
                channel.queue_purge("bench")
                ratios.append(ours / raw)
                confirms.append(ours / each)
                print(f"turn={turn} raw={raw:.0f}/s confirm_publish={each:.0f}/s from_spool={ours:.0f}/s "
                      f"rss_ratio={growth:.2f}")  # fmt: skip
    finally:
        if broker is not None:
            broker.close()
    print(f"from_spool window={window} ratio_to_raw={statistics.median(ratios):.2f} "
          f"({min(ratios):.2f}-{max(ratios):.2f}) ratio_to_confirm_publish={statistics.median(confirms):.1f}")  # fmt: skip


if __name__ == "__main__":
    main()
