"""`virtbus fleet` on a real bus: the table, JSON, and the file for a scheduler."""

from __future__ import annotations

import json
import subprocess
import sys
import time

import pytest

from tests.integrations.parts import eventually, heartbeat, publish
from virtbus.commands.fleet import table
from virtbus.fleet import Fleet
from virtbus.model import Clock
from virtbus.testing import a_heartbeat, a_host

COMMAND = [sys.executable, "-m", "virtbus", "fleet"]


@pytest.fixture
def url(tmp_path):
    made = f"embedded://{tmp_path}/bus.db"
    publish(made, heartbeat("warm-up"))  # the file is there
    return made


def feed(url: str, process: subprocess.Popen, done) -> None:
    """Send heartbeats until `done()`: who listens without a group sees only what comes after it began."""
    deadline = time.monotonic() + 60
    while not done() and process.poll() is None:
        assert time.monotonic() < deadline
        publish(url, heartbeat("compute-1", guests=2))
        time.sleep(0.3)


def test_once_prints_what_was_heard(url):
    process = subprocess.Popen(
        [*COMMAND, "--bus", url, "--once", "--json", "--listen", "8"], stdout=subprocess.PIPE, text=True
    )
    feed(url, process, lambda: False)
    out, _ = process.communicate(timeout=30)
    assert process.returncode == 0
    found = json.loads(out)
    assert found["hosts"]["compute-1"]["guests"] == 2
    assert found["hosts"]["compute-1"]["blame"] == "undetermined"


def test_the_file_is_replaced_in_one_step_and_kept_up_to_date(url, tmp_path):
    file = tmp_path / "fleet.json"
    process = subprocess.Popen([*COMMAND, "--bus", url, "--write", str(file)])
    try:
        feed(url, process, lambda: file.exists() and json.loads(file.read_text())["hosts"])
        first = json.loads(file.read_text())
        eventually(lambda: json.loads(file.read_text())["written_at"] > first["written_at"], "written again")
    finally:
        process.terminate()
        process.wait(20)
    assert first["hosts"]["compute-1"]["incidents"] == 2


def test_a_table_fits_the_terminal_and_lets_no_name_move_the_cursor():
    fleet, clock = Fleet(), Clock()
    for number in range(100):
        words = {"source": f"/virtbus/agents/{number}", "epoch": "1"}
        name = f"evil\x1b[2J-{number}"
        beat = a_heartbeat(
            host=a_host(name=name, uuid=None),
            source=type(a_heartbeat().source)("starting", a_heartbeat().sent_at),
        )
        fleet.saw(beat, words, clock())
    lines = table(fleet.view(clock()), rows=20, columns=80)
    assert len(lines) == 20
    assert lines[-1] == "… 85 more lines"  # the summary takes two lines
    assert all(len(line) <= 80 and "\x1b" not in line for line in lines)
