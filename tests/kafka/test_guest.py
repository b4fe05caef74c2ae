"""A real guest's I/O error arrives in a real Kafka, for every kind of reader; bad settings never start."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from cloudevents.core.bindings import kafka as kafka_binding
from cloudevents.core.formats.json import JSONFormat

from tests.agent.process import AgentProcess, virtbus
from tests.kafka.cluster import Cluster
from tests.kafka.help import read
from tests.kafka.test_java import java_reads
from tests.lab.lab import PAUSED_IOERROR, Lab
from virtbus.model import IoError


def test_a_real_guests_error_is_read_by_consume_by_a_bare_client_and_by_java(
    lab: Lab, kafka_cluster: Cluster, kafka_url: str, kafka_topic: str, tmp_path: Path
) -> None:
    guest = lab.guest("victim", error="EIO").start()
    settings = f'[bus]\ntopic = "{kafka_topic}"\n[bus.kafka.topic]\npartitions = 2\n'
    with AgentProcess(tmp_path, libvirt=lab.uri_ro, bus=kafka_url, settings=settings).ready() as agent:
        guest.fail()
        guest.wait_state(PAUSED_IOERROR)
        agent.until(lambda: agent.metric("virtbus_callbacks_total") == 1, "one callback")
        agent.until(lambda: agent.metric("virtbus_spool_events") == 0, "the spool empty")
        assert agent.stop() == 0

    words = ["consume", "--bus", kafka_url, "--config", str(tmp_path / "virtbus.toml"), "--group", "readers"]
    answer = virtbus(*words, "--type", IoError.TYPE, "--count", "1", "--timeout", "30")
    assert answer.returncode == 0, answer.stderr
    (event,) = [json.loads(line) for line in answer.stdout.splitlines()]
    assert event["subject"] == f"{guest.uuid}/virtio-disk0"
    assert event["data"]["error"]["action"] == "pause"

    bare = {each.get_id(): each for each in map(sdk_reads, read(kafka_url, kafka_topic, 2))}
    assert bare[event["id"]].get_data() == event["data"]
    assert bare[event["id"]].get_subject() == event["subject"]

    java = {each["id"]: each for each in java_reads(kafka_cluster, kafka_topic, len(bare))}
    assert set(java) == set(bare)
    assert json.loads(java[event["id"]]["data"]) == event["data"]


def sdk_reads(raw: Any) -> Any:
    """A bare client's message through the CloudEvents SDK's decoder, without a line of ours."""
    return kafka_binding.from_kafka(
        kafka_binding.KafkaMessage(dict(raw.headers()), raw.key(), raw.value()), JSONFormat()
    )


@pytest.mark.parametrize(
    ("url", "settings", "told"),
    [
        ("kafka://", "", ["no host"]),
        ("kafka://host", '[bus]\ntopic = "a b"', ['Kafka refuses "a b"']),
        ("kafka://host", '[bus.kafka]\nsasl_mechanism = "SCRAM-MD5"', ["sasl_mechanism"]),
        (
            "kafka://host",
            '[bus.kafka.options]\n"linger.mss" = "5"',
            ['No such configuration property: "linger.mss"'],
        ),
        (
            "kafka://host",
            '[bus.kafka.options]\n"max.in.flight.requests.per.connection" = "100"',
            ["`max.in.flight` must be set <= 5"],
        ),
        ("kafka://", f'[bus]\ntopic = "{"x" * 300}"', ["no host", "300 characters: at most 244"]),
        (
            "kafka://:1",
            '[bus]\ntopic = "a b"\n[bus.kafka]\nsasl_mechanism = "PLAIN"\n'
            '[bus.kafka.options]\n"linger.mss" = "5"\n"acks" = "0"',
            [
                "host missing",
                'Kafka refuses "a b"',
                "PLAIN needs a user name",
                "needs a password",
                "linger.mss",
                "acks",
            ],
        ),
    ],
)
def test_bad_settings_end_with_78_and_a_line_for_every_problem(
    tmp_path: Path, url: str, settings: str, told: list[str]
) -> None:
    (tmp_path / "virtbus.toml").write_text(settings)
    words = ["--config", str(tmp_path / "virtbus.toml"), "--bus", url, "--state-dir", str(tmp_path / "state")]
    answer = virtbus("run", "--libvirt", "test:///default", *words)
    assert answer.returncode == 78, answer.stderr
    lines = [line for line in answer.stderr.splitlines() if not line.startswith("{")]
    assert len(lines) == len(told)
    for line, words_of_it in zip(lines, told, strict=True):
        assert words_of_it in line
