"""What an operator does to a running agent: reload it, drill it, watch it under systemd."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import click.testing
import msgspec
import pytest

from tests.agent.process import AgentProcess, virtbus
from tests.commandline import cli, commands_of
from tests.faults.disks import read_only_files
from tests.waiting import wait_until
from virtbus.agent.agent import AgentOptions
from virtbus.cli import COMMANDS as TABLE
from virtbus.commands import run
from virtbus.commands.run import Systemd
from virtbus.config import Config
from virtbus.loading import Loaded

SILENCE = "replay:/dev/null"  # a source that observes, and has nothing to tell


@pytest.fixture
def agent(tmp_path):
    with AgentProcess(tmp_path, libvirt=SILENCE, bus=f"embedded://{tmp_path}/bus.db").ready() as agent:
        yield agent


def lines(agent, event):
    """The log lines with this message, as objects."""
    found = [json.loads(line) for line in agent.log.splitlines() if line.startswith("{")]
    return [line for line in found if event in line["event"]]


# ------------------------------------------------------------------------------------------ reload


def reload(agent, settings):
    before = len(lines(agent, "settings"))
    (agent.folder / "virtbus.toml").write_text(settings)
    agent.process.send_signal(signal.SIGHUP)
    agent.until(lambda: len(lines(agent, "settings")) > before, "reloaded")
    return lines(agent, "settings")[-1]


def test_a_reload_applies_what_it_can_and_says_what_waits_for_a_restart(agent):
    said = reload(agent, '[log]\nlevel = "debug"\n[bus]\nwindow = 7\n[heartbeat]\ninterval_seconds = 0.2\n')
    assert said["applied"] == ["heartbeat.interval_seconds", "log.level"]
    assert said["needs_restart"] == ["bus.window"]
    again = reload(agent, '[log]\nlevel = "debug"\n[bus]\nwindow = 7\n[heartbeat]\ninterval_seconds = 0.2\n')
    assert again["applied"] == []
    assert again["needs_restart"] == ["bus.window"]
    assert agent.stop() == 0


def test_what_counts_as_reloaded_is_what_a_reload_applies_and_what_the_document_says(monkeypatch):
    configured = {}
    monkeypatch.setattr(run.telemetry, "configure", lambda **given: configured.update(given))

    def after(**changed):
        configured.clear()
        agent = SimpleNamespace(options=AgentOptions())
        new = msgspec.convert(changed, Config)
        run._reload(agent, Config(), Config(), lambda: Loaded(new, {}, None))
        return agent.options, dict(configured)

    other = {"level": "debug", "format": "json", "interval_seconds": 7.0, "drain_seconds": 7.0}
    for key in run.RELOADED:
        section, _, name = key.rpartition(".")
        changed = {name: other[name]}
        assert after(**({section: changed} if section else changed)) != after(), key
    document = Path(__file__).parents[2] / "docs" / "operations.md"
    said = document.read_text().partition("On SIGHUP ")[2].partition(", and logs ")[0]
    assert sorted(re.findall("`([a-z_.]+)`", said)) == sorted(run.RELOADED)


def test_a_reload_with_bad_settings_changes_nothing(agent):
    said = reload(agent, "[bus]\nwindwo = 7\n")
    assert "refused" in said["event"]
    assert "did you mean window?" in said["error"]
    assert agent.get("/readyz")[0] == 200


def test_a_reload_that_is_asked_for_while_the_agent_starts_is_done_then_and_not_its_end(tmp_path):
    """systemd takes death by SIGHUP for a clean end, and starts nothing again."""

    def holds_back():
        status = Path(f"/proc/{agent.process.pid}/status").read_text()
        (blocked,) = (line.split()[1] for line in status.splitlines() if line.startswith("SigBlk"))
        return int(blocked, 16) & 1 << signal.SIGHUP - 1

    with AgentProcess(tmp_path, libvirt=SILENCE, bus=f"embedded://{tmp_path}/bus.db") as agent:
        wait_until(holds_back, what="the interpreter is up")
        agent.process.send_signal(signal.SIGHUP)
        agent.until(lambda: lines(agent, "settings"), "reloaded")
        assert agent.ready().stop() == 0


# -------------------------------------------------------------------------------------------- disk


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to mount a disk")
def test_an_idle_agent_whose_disk_turns_read_only_is_not_ready_until_it_is_writable(tmp_path):
    bus = f"embedded://{tmp_path}/bus.db"
    with (
        read_only_files(tmp_path) as disk,
        AgentProcess(disk.at, libvirt=SILENCE, bus=bus).ready() as agent,
    ):
        # In a transaction SQLite writes to mapped pages; a disk that turned read-only answers with SIGBUS.
        agent.until(lambda: agent.metric("virtbus_spool_events") == 0, "idle", 60)
        time.sleep(1)
        agent.process.send_signal(signal.SIGSTOP)  # a kernel turns a whole disk at once, this file by file
        disk.harm()
        agent.process.send_signal(signal.SIGCONT)
        agent.until(lambda: agent.get("/readyz")[0] == 503, "not ready", 60)
        status, told = agent.get("/readyz")
        assert (status, "spool: " in told) == (503, True), told
        assert agent.metric("virtbus_spool_writable") == 0
        disk.mend()
        agent.until(lambda: agent.get("/readyz")[0] == 200, "ready again", 60)
        assert agent.metric("virtbus_spool_writable") == 1
        assert agent.stop() == 0
        assert lines(agent, "unexpected error") == []  # that would be the alert for a bug of ours


# ----------------------------------------------------------------------------------------- systemd


@pytest.fixture
def manager(tmp_path):
    """A service manager's socket."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(tmp_path / "notify"))
        manager.settimeout(20)
        yield manager


def until_told(manager, wanted):
    """Read states until one begins with `wanted`; all of them."""
    told, limit = [], time.monotonic() + 20
    while not any(state.startswith(wanted) for state in told):
        assert time.monotonic() < limit, f"{wanted} was not told, but {told}"
        told += manager.recv(4096).decode().split("\n")
    return told


def test_systemd_hears_ready_status_watchdog_reload_and_stopping(tmp_path, manager):
    with AgentProcess(
        tmp_path,
        libvirt=SILENCE,
        bus=f"embedded://{tmp_path}/bus.db",
        NOTIFY_SOCKET=str(tmp_path / "notify"),
        WATCHDOG_USEC="400000",
    ) as agent:
        assert until_told(manager, "READY=1")[0] == "READY=1"
        until_told(manager, "WATCHDOG=1")
        agent.process.send_signal(signal.SIGHUP)
        until_told(manager, "RELOADING=1")
        until_told(manager, "READY=1")
        status = [state for state in until_told(manager, "STATUS=connected") if state.startswith("STATUS")]
        assert "0 incidents open" in status[-1]
        agent.process.terminate()
        until_told(manager, "STOPPING=1")
        assert agent.process.wait(20) == 0


class Ill:
    """What `_supervise` asks of an agent, one of whose threads is dead or not; it ends by itself."""

    def __init__(self, *dead):
        self.dead, self.turns = dead, 0

    def wait(self, timeout):
        self.turns += 1
        return self.turns > 4  # fewer states than an unread socket holds

    def beat(self, waited):
        pass

    def dead_threads(self):
        return self.dead

    def summary(self):
        return "ill"

    def join(self):
        pass


class NoSignals:
    def wait(self, timeout):
        time.sleep(min(timeout, 0.01))
        return b""


@pytest.mark.parametrize(("dead", "fed"), [((), True), (("intake",), False)])
def test_the_watchdog_is_fed_only_while_every_thread_lives(manager, tmp_path, monkeypatch, dead, fed):
    monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
    monkeypatch.setenv("WATCHDOG_USEC", "4000")
    run._supervise(Ill(*dead), None, None, NoSignals())
    assert ("WATCHDOG=1" in until_told(manager, "STOPPING=1")) is fed


def test_without_systemd_nothing_is_told():
    silent = Systemd({})
    assert silent.watchdog_seconds is None
    assert not silent.tell(READY=1)


def test_a_state_is_one_line_whatever_is_in_it(tmp_path, manager):
    told = Systemd({"NOTIFY_SOCKET": str(tmp_path / "notify")}).tell(STATUS="first\nREADY=1")
    assert told
    assert manager.recv(4096) == b"STATUS=first"


def test_an_empty_state_and_a_path_with_an_at_sign_are_told(tmp_path):
    (tmp_path / "user@1000").mkdir()
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(tmp_path / "user@1000" / "notify"))
        assert Systemd({"NOTIFY_SOCKET": str(tmp_path / "user@1000" / "notify")}).tell(STATUS="")
        assert manager.recv(4096) == b"STATUS="


def test_a_watchdog_that_is_meant_for_another_process_is_left_alone():
    assert Systemd({"WATCHDOG_USEC": "2000000", "WATCHDOG_PID": "1"}).watchdog_seconds is None
    assert Systemd({"WATCHDOG_USEC": "2000000"}).watchdog_seconds == 1.0


# ------------------------------------------------------------------------------------------ drills


def emit(agent, *words):
    return virtbus("emit", "--control-socket", str(agent.socket), *words)


def test_a_drill_goes_through_spool_and_broker_and_is_marked(agent, tmp_path):
    virtbus("consume", "--bus", f"embedded://{tmp_path}/bus.db", "--group", "g", "--timeout", "0.5")
    drilled = emit(agent, "--action", "pause", "--reason", "enospc", "--count", "3")
    assert drilled.returncode == 0, drilled.stderr
    event_id = drilled.stdout.split("confirmed")[1].strip()
    read = virtbus("consume", "--bus", f"embedded://{tmp_path}/bus.db", "--group", "g", "--timeout", "2")
    events = [json.loads(line) for line in read.stdout.splitlines()]
    (event,) = [event for event in events if event["id"] == event_id]
    assert event["data"]["origin"] == "replay"
    assert event["data"]["domain"]["name"] == "virtbus-drill"
    assert event["data"]["error"]["action"] == "pause"
    assert event["data"]["error"]["reason"] == "enospc"
    assert event["data"]["occurrences"]["count"] == 3
    assert agent.metric("virtbus_callbacks_total") == 0
    assert lines(agent, "alert drill")


def test_a_drill_is_ended_by_its_resolution(agent):
    assert emit(agent).returncode == 0
    assert agent.status()["incidents"]["open"] == 1
    resolved = emit(agent, "--resolve")
    assert resolved.returncode == 0, resolved.stderr
    assert agent.status()["incidents"]["open"] == 0


def test_a_drill_without_an_agent_says_so(tmp_path):
    drilled = virtbus("emit", "--control-socket", str(tmp_path / "none"))
    assert drilled.returncode == 69
    assert "no agent answers at" in drilled.stderr


def test_a_drill_whose_broker_is_away_is_in_the_spool(tmp_path):
    with AgentProcess(tmp_path, libvirt=SILENCE, bus="amqp://127.0.0.1:1//").ready() as agent:
        drilled = emit(agent, "--timeout", "2")
        assert drilled.returncode == 69
        assert "in the spool" in drilled.stderr


# -------------------------------------------------------------------------------------------- rest


def test_running_as_root_is_warned_of(agent):
    assert bool(lines(agent, "running as root")) == (os.geteuid() == 0)


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_is_printed_for_each_shell(shell):
    made = virtbus(_VIRTBUS_COMPLETE=f"{shell}_source")
    assert made.returncode == 0
    assert "_VIRTBUS_COMPLETE" in made.stdout


def test_completion_knows_the_commands():
    made = virtbus("x", _VIRTBUS_COMPLETE="bash_complete", COMP_WORDS="virtbus doc", COMP_CWORD="1")
    assert "doctor" in made.stdout


def test_a_completion_script_is_valid_bash(tmp_path):
    (tmp_path / "script").write_text(virtbus(_VIRTBUS_COMPLETE="bash_source").stdout)
    assert subprocess.run(["bash", "-n", str(tmp_path / "script")], check=False).returncode == 0


def test_status_fits_80_columns(tmp_path):
    with AgentProcess(tmp_path, libvirt=SILENCE, bus="amqp://127.0.0.1:1//").ready() as agent:
        agent.until(lambda: agent.status()["bus"]["error"], "refused by the broker")
        said = virtbus("status", "--control-socket", str(agent.socket)).stdout
    assert "refused" in said
    assert max(len(line) for line in said.splitlines()) <= 80


def walk(group, path=()):
    for name, command in commands_of(group).items():
        yield (*path, name), command
        if isinstance(command, click.Group):
            yield from walk(command, (*path, name))


COMMANDS = dict(walk(cli))


def test_the_list_of_commands_says_what_each_says_of_itself():
    for name, (_, told) in TABLE.items():
        assert COMMANDS[(name,)].get_short_help_str(200) == told


def test_the_list_of_commands_imports_none_of_them():
    code = "import sys; from virtbus.cli import main\ntry: main(['--help'])\nexcept SystemExit: pass\n"
    code += "print([name for name in sys.modules if name.startswith('virtbus.commands.')])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


@pytest.mark.parametrize("path", COMMANDS, ids=" ".join)
def test_each_commands_help_fits_80_columns(path):
    said = click.testing.CliRunner().invoke(COMMANDS[path], ["--help"], terminal_width=80).output
    assert max(len(line) for line in said.splitlines()) <= 80, said
