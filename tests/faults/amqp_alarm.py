"""The broker's memory alarm stops publishers: python -m tests.faults.amqp_alarm [runs] [seconds]"""

from __future__ import annotations

import sys

from tests.faults.amqp_kit import alarm, private_broker, report


def main() -> None:
    """The gauge shows it within 2 s; at most one new connection in all the time it lasts."""
    runs = int(sys.argv[1]) if len(sys.argv) > 1 else 3
    seconds = float(sys.argv[2]) if len(sys.argv) > 2 else 30.0
    with private_broker() as broker:
        accounts = [alarm(broker, seconds=seconds) for _ in range(runs)]
    blocked = max(account.blocked_seconds for account in accounts)
    reconnects = max(account.reconnects for account in accounts)
    report(
        "amqp_alarm",
        runs,
        accounts,
        good=blocked <= 2.0 and reconnects <= 1,
        alarm_seconds=f"{seconds:g}",
        blocked_gauge_max_seconds=round(blocked, 2),
        reconnects_max=reconnects,
    )


if __name__ == "__main__":
    main()
