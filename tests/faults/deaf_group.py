"""What a group stands on is deleted under load: python -m tests.faults.deaf_group [runs]

Exchange, queue, binding, virtual host. Events that came after the repair and were not handed out: none. What
was lost before it is named by the gap check.
"""

from __future__ import annotations

import sys

from tests.faults.amqp_kit import private_broker
from tests.faults.consumer_kit import DEAFENING, deafened, say


def main() -> None:
    """Each of them, `runs` times."""
    runs = int(sys.argv[1]) if len(sys.argv) > 1 else 3
    with private_broker() as broker:
        found = [deafened(broker, what) for _ in range(runs) for what in DEAFENING]
    slowest = max(one.noticed_seconds for one in found)
    lost_after = sum(one.after_lost for one in found)
    lost, named = sum(one.before_lost for one in found), sum(one.named for one in found)
    say(
        "deaf_group",
        lost_after == 0 and lost == named and slowest <= 30,
        runs=len(found),
        after=sum(one.after for one in found),
        lost_after=lost_after,
        lost_before=lost,
        named=named,
        noticed_max_seconds=round(slowest, 1),
    )


if __name__ == "__main__":
    main()
