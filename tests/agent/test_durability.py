"""What leaves for the broker is on the disk before: seen in the agent's system calls."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import kombu

from tests.conftest import need
from tests.waiting import wait_until

RECORDING = Path(__file__).parents[2] / "virtbus" / "recordings" / "demo.jsonl"


def test_the_sync_of_the_log_comes_before_the_socket_write_of_each_event(amqp_url: str, tmp_path: Path):
    need([] if shutil.which("strace") else ["strace (apt-get install strace)"])
    trace = tmp_path / "trace"
    with kombu.Connection(amqp_url) as connection:
        exchange = kombu.Exchange("virtbus.events", type="topic", durable=True)
        queue = kombu.Queue("seen", exchange, routing_key="#", exclusive=True)(connection.channel())
        queue.declare()
        agent = subprocess.Popen(
            ["strace", "-f", "-y", "-s", "100000", "-e", "trace=pwrite64,fdatasync,sendto,write",
             "-o", str(trace),
             sys.executable, "-m", "virtbus", "run", "--libvirt", f"replay:{RECORDING}?speed=full",
             "--bus", amqp_url, "--state-dir", str(tmp_path / "state"), "--http-listen", "",
             "--control-socket", ""],
            stderr=subprocess.PIPE,
        )  # fmt: skip
        ids: list[str] = []

        def three_came() -> bool:
            while (message := queue.get(no_ack=True)) is not None:
                if message.headers.get("ce-sequence"):
                    ids.append(message.headers["ce-id"])
            return len(ids) >= 3

        try:
            wait_until(three_came, timeout=60, what="three events")
        finally:
            # strace passes no signal on: the agent is its only child.
            child = int(Path(f"/proc/{agent.pid}/task/{agent.pid}/children").read_text())
            os.kill(child, signal.SIGTERM)
            _, complaint = agent.communicate(timeout=60)
    assert agent.returncode == 0, complaint
    calls = trace.read_text(errors="replace").splitlines()
    for event_id in ids:
        logged = first(calls, rf"pwrite64\(\d+<[^>]*spool\.db-wal>.*{event_id}")
        sent = first(calls, rf"(sendto|write)\(\d+<(socket|TCP)[^>]*>.*{event_id}")
        synced = first(calls, r"fdatasync\(\d+<[^>]*spool\.db-wal>", after=logged)
        done = (
            synced if "unfinished" not in calls[synced] else first(calls, r"fdatasync resumed", after=synced)
        )
        assert logged < done < sent, json.dumps([logged, synced, done, sent])


def first(calls: list[str], pattern: str, after: int = -1) -> int:
    """The number of the first line behind `after` that matches."""
    for number in range(after + 1, len(calls)):
        if re.search(pattern, calls[number]):
            return number
    raise AssertionError(f"no system call matches {pattern}")
