"""The broker is restarted under load: python -m tests.faults.amqp_restart [runs]"""

from __future__ import annotations

import sys

from tests.faults.amqp_kit import private_broker, report, restart


def main() -> None:
    """Every second run is a kill -9 instead of a restart in good order."""
    runs = int(sys.argv[1]) if len(sys.argv) > 1 else 20
    with private_broker() as broker:
        accounts = [
            restart(broker, runs=runs - runs // 2, events=1500 * runs),
            restart(broker, runs=max(1, runs // 2), events=1500 * runs, kill=True),
        ]
    good = max(account.reconnect_max_seconds for account in accounts) <= 10.0
    report("amqp_restart", runs, accounts, good=good)


if __name__ == "__main__":
    main()
