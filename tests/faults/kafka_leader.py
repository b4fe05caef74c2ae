"""Three Kafka brokers, replication 3, min.insync.replicas 2: leaders are killed with SIGKILL under load.

    python -m tests.faults.kafka_leader [--runs N]

Prints `kafka_leader runs=… sent=… lost=… duplicates=… disordered=… rebuilt_max_seconds=…`, where the last
is the longest time from Kafka's election of new leaders until every key was confirmed again; ends with 1
when something was lost or disordered, or when that took longer than 5 s.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path

from confluent_kafka.admin import AdminClient

from tests.kafka.cluster import Broker, Cluster
from tests.kafka.outage import Account, run
from virtbus.bus import BusOptions, open_bus

TOPIC = "leader"


def leader(cluster: Cluster) -> Broker:
    """The broker that leads most partitions of the topic."""
    client = AdminClient({"bootstrap.servers": cluster.hosts(), "log_level": 0})
    partitions = client.list_topics(TOPIC, timeout=10).topics[TOPIC].partitions.values()
    leaders = [partition.leader for partition in partitions]
    most = max(set(leaders), key=leaders.count)
    return cluster.brokers[most - 1]


def in_sync(cluster: Cluster, seconds: float = 30.0) -> None:
    """Wait until every replica has caught up, so that the next kill leaves two."""
    client = AdminClient({"bootstrap.servers": cluster.hosts(), "log_level": 0})
    limit = time.monotonic() + seconds
    while time.monotonic() < limit:
        partitions = client.list_topics(TOPIC, timeout=10).topics[TOPIC].partitions.values()
        if all(len(partition.isrs) == len(cluster.brokers) for partition in partitions):
            return
        time.sleep(0.2)
    raise TimeoutError(f"replicas did not catch up within {seconds:g} s")


def elected(cluster: Cluster, victim: Broker, seconds: float = 30.0) -> None:
    """Wait until the partitions that the killed broker led have other leaders."""
    client = AdminClient({"bootstrap.servers": cluster.hosts(), "log_level": 0})
    limit = time.monotonic() + seconds
    while time.monotonic() < limit:
        partitions = client.list_topics(TOPIC, timeout=10).topics[TOPIC].partitions.values()
        if all(partition.leader not in (-1, victim.node) for partition in partitions):
            return
        time.sleep(0.05)
    raise TimeoutError(f"no new leaders within {seconds:g} s")


def leaders_killed(cluster: Cluster, runs: int) -> Account:
    """Kill the leader of most partitions `runs` times; each comes back before the next."""
    dead: list[Broker] = []

    def outage(_number: int) -> None:
        if dead:
            cluster.restart(dead.pop())
            in_sync(cluster)
        victim = leader(cluster)
        cluster.kill(victim)
        dead.append(victim)
        elected(cluster, victim)

    options = BusOptions(
        topic=TOPIC, topic_partitions=6, topic_replication=3, topic_config={"min.insync.replicas": "2"}
    )
    bus = open_bus(cluster.url, options)
    try:
        return run(bus, lambda: cluster.url, TOPIC, runs, outage)
    finally:
        bus.close()


def main() -> int:
    """Run it and print the line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=5)
    runs = parser.parse_args().runs
    with tempfile.TemporaryDirectory(prefix="virtbus-faults-") as folder:
        cluster = Cluster(Path(folder) / "kafka", brokers=3).start()
        try:
            account = leaders_killed(cluster, runs)
        finally:
            cluster.stop()
    print(account.line("kafka_leader"))
    return int(bool(account.lost or account.disordered or account.rebuilt_max_seconds > 5.0))


if __name__ == "__main__":
    sys.exit(main())
