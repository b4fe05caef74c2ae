"""One Kafka broker killed with SIGKILL and restarted under load.

    python -m tests.faults.kafka_restarts [--runs N]

Prints `kafka_restarts runs=… sent=… lost=… duplicates=… disordered=… rebuilt_max_seconds=…`; ends with 1
when something was lost or disordered, or when some key was not confirmed again 5 s after a restart.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path

from tests.kafka.cluster import Cluster
from tests.kafka.outage import Account, run
from virtbus.bus import BusOptions, open_bus


def restarts(cluster: Cluster, runs: int, down_seconds: float = 0.5) -> Account:
    """Kill and restart the only broker `runs` times."""
    broker = cluster.brokers[0]
    topic = "restarts"

    def outage(_number: int) -> None:
        cluster.kill(broker)
        time.sleep(down_seconds)
        cluster.restart(broker)

    bus = open_bus(cluster.url, BusOptions(topic=topic, topic_partitions=6))
    try:
        return run(bus, lambda: cluster.url, topic, runs, outage)
    finally:
        bus.close()


def main() -> int:
    """Run it and print the line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=10)
    runs = parser.parse_args().runs
    with tempfile.TemporaryDirectory(prefix="virtbus-faults-") as folder:
        cluster = Cluster(Path(folder) / "kafka").start()
        try:
            account = restarts(cluster, runs)
        finally:
            cluster.stop()
    print(account.line("kafka_restarts"))
    return int(bool(account.lost or account.disordered or account.rebuilt_max_seconds > 5.0))


if __name__ == "__main__":
    sys.exit(main())
