"""One event kills its consumer each time, before 60 good ones: python -m tests.faults.crash_neighbours [runs]

With RabbitMQ's delivery limit of 20 (a policy here, the default of RabbitMQ 4), and without any.
"""

from __future__ import annotations

import sys

from tests.faults.amqp_kit import private_broker
from tests.faults.consumer_kit import beside_killer, say


def main() -> None:
    """Until the event is put aside and the others had their turn."""
    runs = int(sys.argv[1]) if len(sys.argv) > 1 else 3
    with private_broker() as broker:
        found = [beside_killer(broker, limit=limit) for _ in range(runs) for limit in (20, None)]
    handed, sent = sum(one.handed_out for one in found), sum(one.sent for one in found)
    in_dead = sum(one.in_dead for one in found)
    good = handed == sent and in_dead == 0
    say(
        "crash_neighbours",
        good,
        runs=2 * runs,
        good=sent,
        handed_out=handed,
        in_dead=in_dead,
        killers_put_aside=len(found),
    )


if __name__ == "__main__":
    main()
