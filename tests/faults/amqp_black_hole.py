"""The network swallows everything: python -m tests.faults.amqp_black_hole [seconds] [backlog]"""

from __future__ import annotations

import sys

from tests.bench import publish
from tests.faults.amqp_kit import black_hole, private_broker, report


def main() -> None:
    """Found within 30 s with the default heartbeat; the backlog drains at half of raw kombu at least."""
    seconds = float(sys.argv[1]) if len(sys.argv) > 1 else 60.0
    backlog = int(sys.argv[2]) if len(sys.argv) > 2 else 60_000
    publish.EXCHANGE = "virtbus.events"  # over the same exchange, queue and proxy
    with private_broker() as broker:
        account = black_hole(
            broker,
            broker.vhost(),
            seconds=seconds,
            heartbeat=10,
            backlog=backlog,
            raw=publish.raw_pipelined,
        )
    ratio = account.drain_rate / account.raw_rate
    report(
        "amqp_black_hole",
        1,
        [account],
        good=account.found_seconds <= 30.0 and ratio >= 0.5,
        black_hole_seconds=f"{seconds:g}",
        found_seconds=round(account.found_seconds, 1),
        drain_per_second=round(account.drain_rate),
        drain_ratio_to_raw_kombu=round(ratio, 2),
    )


if __name__ == "__main__":
    main()
