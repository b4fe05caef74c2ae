"""The CloudEvents Java SDK reads what we publish, in both content modes."""

from __future__ import annotations

import subprocess
from datetime import datetime
from pathlib import Path

import pytest

from tests.kafka.cluster import Cluster
from tests.kafka.help import opened
from virtbus.model import Confirmed, Record
from virtbus.testing import ListFeed, records

PROGRAM = Path(__file__).parent / "java" / "ReadEvents.java"


def java_reads(cluster: Cluster, topic: str, count: int) -> list[dict[str, str]]:
    quiet = "-Dorg.slf4j.simpleLogger.defaultLogLevel=warn"
    command = ["java", "-Xmx128m", quiet, "-cp", f"{cluster.jars}/*", str(PROGRAM)]
    command += [cluster.hosts(), topic, str(count)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = [line.split("\t")[1:] for line in done.stdout.splitlines() if line.startswith("EVENT\t")]
    return [dict(pair.split("=", 1) for pair in line) for line in lines]  # type: ignore[misc]


@pytest.mark.parametrize("structured", [False, True])
def test_the_java_sdk_reads_every_attribute_and_the_data(
    kafka_cluster: Cluster, kafka_url: str, kafka_topic: str, structured: bool
) -> None:
    items = records(6, keys=3)
    with opened(kafka_url, kafka_topic, structured=structured) as bus:
        assert ListFeed(items).publish(bus) == [Confirmed()] * 6
    found = {event["id"]: event for event in java_reads(kafka_cluster, kafka_topic, 6)}
    assert set(found) == {record.id for record in items}
    for record in items:
        check(found[record.id], record, structured=structured)


def check(event: dict[str, str], record: Record, *, structured: bool) -> None:
    assert event.pop("key") == record.key
    assert event.pop("java_partition_agrees") == "true"
    data = event.pop("data")
    if not structured:  # the Java SDK may write JSON data anew in structured mode
        assert data == record.body.decode()
    expected = dict(record.attributes)
    for name in ("time", "recordedtime"):  # Java drops trailing zeros of the fraction
        said, wanted = event.pop(name), expected.pop(name)
        assert datetime.fromisoformat(said) == datetime.fromisoformat(wanted)
    assert event == expected
