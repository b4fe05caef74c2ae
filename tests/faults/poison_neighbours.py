"""One poison before 50 good events, and everything that keeps it from being put aside.

python -m tests.faults.poison_neighbours [runs]
"""

from __future__ import annotations

import sys

from tests.faults.amqp_kit import private_broker
from tests.faults.consumer_kit import POISONS, beside_poison, say


def main() -> None:
    """Every way, `runs` times."""
    runs = int(sys.argv[1]) if len(sys.argv) > 1 else 3
    with private_broker() as broker:
        found = [beside_poison(broker, name) for _ in range(runs) for name in POISONS]
    handed, sent = sum(one.handed_out for one in found), sum(one.sent for one in found)
    in_dead = sum(one.in_dead for one in found)
    good = handed == sent and in_dead == 0
    say(
        "poison_neighbours", good, ways=len(POISONS), runs=runs, good=sent, handed_out=handed, in_dead=in_dead
    )


if __name__ == "__main__":
    main()
