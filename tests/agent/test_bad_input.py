"""Bad input gets one clear line that says what failed, on what, and what to do, and the right exit code."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.agent.process import COMMAND, AgentProcess, virtbus
from tests.ports import free_ports

REPLAY = "replay:" + str(Path(__file__).parents[2] / "virtbus" / "recordings" / "demo.jsonl")


def complaint(*words: str, code: int, **environment: str) -> str:
    """Run a command that must fail with `code` and exactly one line, which is returned."""
    answer = virtbus(*words, **environment)
    lines = [line for line in answer.stderr.splitlines() if not line.startswith("{")]  # log lines are JSON
    assert answer.returncode == code, answer.stderr
    assert len(lines) == 1, answer.stderr
    assert "Traceback" not in answer.stderr
    assert lines[0].startswith("virtbus: ")
    return lines[0]


@pytest.fixture
def run(tmp_path):
    """The words of a `run` that would work, but for what is added or replaced."""

    def words(bus="embedded:", libvirt=REPLAY, state_dir=tmp_path / "state", *more):
        return ("run", "--libvirt", libvirt, "--bus", bus, "--state-dir", str(state_dir),
                "--http-listen", "", "--control-socket", "", *more)  # fmt: skip

    return words


def test_a_forgotten_bus_url_does_not_look_healthy(tmp_path):
    line = complaint("run", "--libvirt", REPLAY, "--state-dir", str(tmp_path), code=78)
    assert "--bus amqp://" in line


def test_an_unknown_bus_scheme_is_named_with_those_that_are_known(run):
    line = complaint(*run("amqq://host"), code=78)
    assert '"amqq:"' in line
    assert "amqps" in line


@pytest.mark.parametrize("url", ["amqp://", "amqp://host:99999", "kafka://", "embedded://relative"])
def test_a_bus_url_without_a_usable_place_is_refused(run, url):
    assert complaint(*run(url), code=78)


def test_an_unknown_flag_is_named():
    assert "--bogus" in complaint("run", "--bogus", code=78)


def test_an_unknown_command_is_named():
    assert "bogus" in complaint("bogus", code=78)


def test_an_unknown_setting_is_named_with_its_place_and_what_was_meant(tmp_path):
    (tmp_path / "v.toml").write_text("[bus]\nwindwo = 3\n")
    line = complaint("run", "--config", str(tmp_path / "v.toml"), code=78)
    assert "v.toml:2: unknown setting bus.windwo; did you mean window?" in line


def test_a_configuration_file_that_is_missing_is_named(tmp_path):
    assert "does not exist" in complaint("run", "--config", str(tmp_path / "none"), code=66)


def test_a_state_folder_that_cant_be_written_is_named(run, tmp_path):
    (tmp_path / "file").write_text("")
    assert str(tmp_path / "file") in complaint(*run(state_dir=tmp_path / "file" / "below"), code=78)


def test_an_unreachable_libvirt_is_named_by_watch(tmp_path):
    uri = f"qemu:///system?socket={tmp_path}/none"
    line = complaint("watch", "--libvirt", uri, "--timeout", "5", code=69)
    assert f"{tmp_path}/none" in line


def test_an_unreachable_broker_is_named_by_consume():
    port = free_ports(1)[0]
    line = complaint("consume", "--bus", f"amqp://u:secret@127.0.0.1:{port}//", "--timeout", "5", code=69)
    assert f"127.0.0.1:{port}" in line
    assert "secret" not in line


def test_a_wrong_password_is_a_matter_of_rights(rabbitmq, vhost):
    wrong = re.sub(r"://.*@", "://nobody:secret@", rabbitmq.url(vhost))
    line = complaint("consume", "--bus", wrong, "--timeout", "5", code=77)
    assert "secret" not in line


def test_a_second_agent_on_the_same_spool_is_told_who_holds_it(run, tmp_path):
    with AgentProcess(tmp_path, libvirt=REPLAY, bus="embedded:").ready() as first:
        line = complaint(*run(), code=74)
        assert str(first.process.pid) in line
        assert first.process.poll() is None


def test_a_traceback_comes_only_with_debug(run):
    answer = virtbus(*run("amqq://host"), "--debug")
    assert "Traceback" in answer.stderr


def test_a_count_that_is_not_reached_in_time_is_no_success(tmp_path):
    answer = virtbus("consume", "--bus", f"embedded://{tmp_path}/bus.db", "--count", "1", "--timeout", "0.5")
    assert answer.returncode == 1
    assert "0 of 1 events came" in answer.stderr


def test_output_that_nobody_reads_any_more_is_no_failure():
    answer = subprocess.run(
        ["sh", "-c", f"{sys.executable} -m virtbus config schema | head -c 10; exit ${{PIPESTATUS:-0}}"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert "Error" not in answer.stderr


def test_the_sdk_works_where_libvirt_cant_be_imported(tmp_path):
    code = (
        "import sys; sys.modules['libvirt'] = None; sys.modules['confluent_kafka'] = None\n"
        "import virtbus; from virtbus import Consumer, IoError\n"
        f"consumer = Consumer('embedded://{tmp_path}/bus.db', group='g')\n"
        "assert consumer.receive(0.1) is None; consumer.close()\n"
        "ours = ('virtbus.agent.agent', 'virtbus.spool', 'virtbus.sources')\n"
        "assert not [name for name in sys.modules if name.startswith(ours)]\n"
    )
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_without_libvirt_the_agent_says_what_to_install(run):
    code = "import sys; sys.modules['libvirt'] = None; from virtbus.cli import main; main(sys.argv[1:])"
    words = run(libvirt="qemu:///system")
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, check=False)
    assert done.returncode == 78, done.stderr
    assert "pip install 'virtbus[agent]'" in done.stderr


def test_a_second_signal_ends_a_drain_at_once(tmp_path):
    port = free_ports(1)[0]
    with AgentProcess(tmp_path, libvirt=REPLAY, bus=f"amqp://127.0.0.1:{port}//",
                      settings="drain_seconds = 60.0\n").ready() as agent:  # fmt: skip
        agent.process.terminate()
        with pytest.raises(subprocess.TimeoutExpired):
            agent.process.wait(2)
        assert agent.stop(seconds=10) == 0


def test_the_two_entry_points_are_one():
    assert COMMAND[1:] == ["-m", "virtbus"]
    script = Path(sys.executable).parent / "virtbus"
    assert os.access(script, os.X_OK)
    done = subprocess.run([script, "--version"], capture_output=True, text=True, check=False)
    assert done.stdout == virtbus("--version").stdout


@pytest.mark.parametrize("name", ["lock", "agent-id", "spool.db", "spool.db-wal", "spool.db-shm"])
def test_a_fifo_where_a_state_file_belongs_is_refused_at_once(run, tmp_path, name):
    (tmp_path / "state").mkdir(0o700)
    os.mkfifo(tmp_path / "state" / name)
    assert f"{name} is a FIFO, not a regular file" in complaint(*run(), code=74)
