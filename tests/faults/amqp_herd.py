"""A thousand agents after the broker's return: python -m tests.faults.amqp_herd [agents] [outage seconds]

Each is a thread with an AmqpBus of its own that publishes an event a second and backs off as the agent does.
The broker is killed under them and comes back. Jitter must spread them: `peak_100ms` is the largest number
that came back within any 100 ms. Every event of the outage must arrive.
"""

from __future__ import annotations

import multiprocessing
import random
import resource
import sys
import threading
import time
from typing import Any

from tests.faults.amqp_kit import make_queue, private_broker
from virtbus.bus import BusOptions
from virtbus.bus.amqp.bus import AmqpBus
from virtbus.errors import BusUnavailable
from virtbus.model import Confirmed, Deferred
from virtbus.retry import Backoff
from virtbus.telemetry import configure
from virtbus.testing import ListFeed, records

PROCESSES = 2


def agent(url: str, stop: threading.Event, back: list[float], left: list[int]) -> None:
    """Publish until `stop`; note the first confirm after an error."""
    bus = AmqpBus(url, options=BusOptions(heartbeat=10))
    backoff = Backoff("herd", hook=lambda event: None)
    feed = ListFeed()
    away = False
    stop.wait(random.uniform(0, 1.0))
    while not stop.is_set():
        if not len(feed):
            feed.add(records(1)[0])
        error: Exception | None = None
        try:
            for record, outcome in bus.publish(feed):
                feed.settle(record, outcome)
                if isinstance(outcome, Deferred):
                    error = outcome.error
                elif isinstance(outcome, Confirmed):
                    backoff.reset()
                    if away:
                        away = False
                        back.append(time.monotonic())
        except BusUnavailable as unavailable:
            error = unavailable
        if error is not None:
            away = True
            backoff.wait(stop, error)
        else:
            stop.wait(1.0)
    left.append(len(feed))
    bus.close()


def crowd(url: str, count: int, ready: Any, end: Any, results: Any) -> None:
    """A share of the agents, in a process of its own."""
    configure(level="error")
    threading.stack_size(256 * 1024)
    stop, back, left = threading.Event(), [], []  # type: ignore[var-annotated]
    threads = [
        threading.Thread(target=agent, args=(url, stop, back, left), daemon=True) for _ in range(count)
    ]
    for thread in threads:
        thread.start()
    time.sleep(3.0 + count / 100)
    ready.release()
    end.wait()
    stop.set()
    for thread in threads:
        thread.join(30.0)
    results.put((back, sum(left)))


def main() -> None:
    """Print the line."""
    agents = int(sys.argv[1]) if len(sys.argv) > 1 else 1000
    outage = float(sys.argv[2]) if len(sys.argv) > 2 else 15.0
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    context = multiprocessing.get_context("spawn")
    with private_broker() as broker:
        url = broker.url(broker.vhost())
        make_queue(url)
        ready, end, results = context.Semaphore(0), context.Event(), context.Queue()
        crowds = [
            context.Process(target=crowd, args=(url, agents // PROCESSES, ready, end, results), daemon=True)
            for _ in range(PROCESSES)
        ]
        for process in crowds:
            process.start()
        for _ in crowds:
            ready.acquire()
        broker.kill()
        time.sleep(outage)
        broker.start()
        up = time.monotonic()
        time.sleep(25.0)
        end.set()
        told = [results.get(timeout=60) for _ in crowds]
        for process in crowds:
            process.join(30)
    back = sorted(moment - up for times, _ in told for moment in times)
    unsent = sum(left for _, left in told)
    peak = max((sum(one <= other < one + 0.1 for other in back) for one in back), default=0)
    slowest = back[-1] if back else 99.0
    print(
        f"amqp_herd agents={agents} came_back={len(back)} unsent={unsent} "
        f"reconnect_max_seconds={slowest:.1f} peak_100ms={peak}"
    )
    sys.exit(0 if len(back) >= agents and unsent == 0 and peak <= agents / 10 and slowest <= 20 else 1)


if __name__ == "__main__":
    main()
