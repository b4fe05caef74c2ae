"""From the spool against raw pipelined kombu, in one run: python -m tests.faults.throughput [rounds] [events]

Same messages of 1,000 domains, window and confirms; see tests/bench/publish.py for the ways, and
docs/benchmarks.md for what else is measured.
"""

from __future__ import annotations

import statistics
import sys

from tests.bench import publish
from tests.bench.drain import drained
from virtbus.testing import records


def main() -> None:
    """Print the line; at least 0.7 of raw kombu and 5 times kombu's confirm_publish=True."""
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 3
    events = int(sys.argv[2]) if len(sys.argv) > 2 else 20_000
    to_raw, to_each = [], []
    with publish.broker() as node:
        url = node.url(node.vhost())
        queue = publish.Queue(url)
        items = records(events, keys=1000)
        publish.raw_pipelined(url, items[: events // 4], publish.WINDOW)  # to warm the broker up
        queue.purge()
        for _ in range(rounds):
            raw = publish.raw_pipelined(url, items, publish.WINDOW)
            queue.purge()
            ours = drained(url, events, window=publish.WINDOW).rate
            queue.purge()
            each = publish.confirm_each(url, items[: events // 10])
            queue.purge()
            to_raw.append(ours / raw)
            to_each.append(ours / each)
    raw_ratio, each_ratio = statistics.median(to_raw), statistics.median(to_each)
    print(
        f"throughput runs={rounds} events={events} last_per_second={ours:.0f} "
        f"ratio_to_raw_kombu={raw_ratio:.2f} ({min(to_raw):.2f}-{max(to_raw):.2f}) "
        f"ratio_to_confirm_publish={each_ratio:.1f} ({min(to_each):.1f}-{max(to_each):.1f})"
    )
    sys.exit(0 if raw_ratio >= 0.7 and each_ratio >= 5.0 else 1)


if __name__ == "__main__":
    main()
