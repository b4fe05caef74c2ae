"""A closed or full output, another encoding, a missing right, an agent that is gone: one clear line each."""

from __future__ import annotations

import json
import os
import select
import shutil
import signal
import socket
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.agent.process import COMMAND, AgentProcess, virtbus
from tests.agent.test_bad_input import complaint
from tests.conftest import need
from virtbus.agent.control import ask


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[AgentProcess]:
    folder = tmp_path_factory.mktemp("running")
    with AgentProcess(folder, libvirt="replay:/dev/null", bus=f"embedded://{folder}/bus.db").ready() as agent:
        yield agent


def through_a_shell(words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a line of bash in which `virtbus` is ours."""
    script = f'set -o pipefail; virtbus() {{ {" ".join(COMMAND)} "$@"; }}; {words}'
    return subprocess.run(
        ["bash", "-c", script], capture_output=True, text=True, timeout=60, env={**os.environ, **environment},
        check=False,
    )  # fmt: skip


# ----------------------------------------------------------------------------------------- output


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_reader_that_has_had_enough_is_no_failure(running: AgentProcess, unbuffered: str) -> None:
    for command in (
        "config schema",
        "schema show io.virtbus.domain.io_error.v1",
        f"status --watch --control-socket {running.socket}",
    ):
        done = through_a_shell(f"virtbus {command} | head -c 10", PYTHONUNBUFFERED=unbuffered)
        assert (done.returncode, done.stderr) == (0, "")
        assert len(done.stdout) == 10


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("command", ["config schema", "config show", "config sample", "--help"])
def test_output_that_finds_no_room_is_one_clear_line(command: str, unbuffered: str) -> None:
    done = through_a_shell(f"virtbus {command} > /dev/full", PYTHONUNBUFFERED=unbuffered)
    assert done.returncode == 74
    assert done.stderr == (
        "virtbus: standard output can't be written: No space left on device; make room, or write elsewhere\n"
    )


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_a_closed_standard_stream_changes_nothing(running: AgentProcess, closed: str) -> None:
    done = through_a_shell(f"virtbus status --control-socket {running.socket} {closed}")
    assert (done.returncode, done.stderr) == (0, "")
    assert ("ready      yes" in done.stdout) == (">&-" not in closed.split())


def test_a_failure_keeps_its_exit_code_when_nobody_can_read_it() -> None:
    assert through_a_shell("virtbus status --control-socket /none 2>&-").returncode == 69


def test_a_log_with_a_closed_standard_error_does_not_end_the_agent(tmp_path: Path) -> None:
    words = f"run --libvirt replay:/dev/null --bus embedded: --state-dir {tmp_path} --http-listen ''"
    done = through_a_shell(f"timeout 15 {' '.join(COMMAND)} {words} --control-socket '' <&- >&- 2>&-")
    assert done.returncode == 124  # timeout's: it ran on
    assert (tmp_path / "spool.db").stat().st_size > 0


def test_an_encoding_without_our_signs_changes_no_exit_code_and_no_json(tmp_path: Path) -> None:
    words = ("doctor", "--bus", "embedded:", "--state-dir", str(tmp_path), "--libvirt", "replay:/dev/null")
    assert virtbus(*words, PYTHONIOENCODING="ascii").returncode == 0
    event = '{"a": "\N{SNOWMAN}\N{PILE OF POO}"}\n'
    (tmp_path / "events").write_text(event)
    told = virtbus("validate", "--format", "json", str(tmp_path / "events"), PYTHONIOENCODING="latin-1")
    assert told.returncode == 65
    assert [json.loads(line) for line in told.stdout.splitlines()]


# ------------------------------------------------------------------------------------------ files


def test_a_configuration_file_that_is_a_folder_is_named(tmp_path: Path) -> None:
    line = complaint("config", "check", "--config", str(tmp_path), code=66)
    assert f"configuration file {tmp_path} can't be read: Is a directory" in line


def test_a_configuration_file_that_is_no_text_is_named(tmp_path: Path) -> None:
    (tmp_path / "v.toml").write_bytes(b"a = '\xff'\n")
    assert "v.toml can't be read: it is not UTF-8 text" in complaint(
        "config", "check", "--config", str(tmp_path / "v.toml"), code=66
    )


def test_a_configuration_file_of_a_hundred_thousand_brackets_is_named(tmp_path: Path) -> None:
    (tmp_path / "v.toml").write_text("a = " + "[" * 100_000)
    line = complaint("config", "check", "--config", str(tmp_path / "v.toml"), code=78)
    assert "v.toml: not valid TOML" in line


def test_a_configuration_file_of_ten_megabytes_is_read(tmp_path: Path) -> None:
    (tmp_path / "v.toml").write_text('bus.url = "embedded:"\n' + "#" * 10_000_000)
    told = virtbus("config", "check", "--config", str(tmp_path / "v.toml"))
    assert (told.returncode, told.stderr) == (0, "")


def test_every_problem_of_a_configuration_file_is_a_line_with_its_place(tmp_path: Path) -> None:
    (tmp_path / "v.toml").write_text('[bus]\nwindow = "x"\nurl = 3\n[log]\nlevel = "loud"\n[nosuch]\na = 1\n')
    told = virtbus("config", "check", "--config", str(tmp_path / "v.toml"))
    assert told.returncode == 78
    assert [line.split(": ")[1] for line in told.stderr.splitlines()] == [
        f"{tmp_path}/v.toml:{number}" for number in (2, 3, 5, 7)
    ]


def test_a_recording_that_is_none_is_named_by_demo(tmp_path: Path) -> None:
    (tmp_path / "r.jsonl").write_text("\n[1]\n")
    line = complaint("demo", "--recording", str(tmp_path / "r.jsonl"), code=65)
    assert "r.jsonl:2: a list, expected a JSON object" in line
    assert "can't be read" in complaint("demo", "--recording", str(tmp_path), code=66)


def test_watch_says_who_plays_a_recording() -> None:
    assert "virtbus demo --recording" in complaint("watch", "--libvirt", "replay:/x", code=78)


def test_a_missing_word_is_one_line() -> None:
    assert "Missing argument" in complaint("schema", "show", code=78)


@pytest.mark.parametrize("command", ["consume", "emit", "doctor", "watch"])
@pytest.mark.parametrize("number", ["nan", "inf", "1e+20"])
def test_a_time_that_never_ends_is_no_timeout(command: str, number: str) -> None:
    assert f"{number} is not a number of seconds up to a year" in complaint(
        command, "--timeout", number, code=78
    )


@pytest.mark.parametrize(
    "words",
    [("--user", "x\nExecStart=/bin/sh"), ("--user", ""), ("--user", "a b"), ("--command", "/a\nUser=root")],
    ids=repr,
)
def test_a_word_that_would_be_another_line_of_the_unit_is_refused(words: tuple[str, str]) -> None:
    assert virtbus("print", "unit", *words).returncode == 78


def test_doctor_leaves_the_identity_of_a_cloned_disk_to_the_agent(tmp_path: Path) -> None:
    copied = "537730fa-d340-459c-a413-639d7785c850\n" + "0" * 32 + "\n"
    (tmp_path / "agent-id").write_text(copied)
    virtbus("doctor", "--bus", "embedded:", "--state-dir", str(tmp_path), "--libvirt", "replay:/dev/null")
    assert (tmp_path / "agent-id").read_text() == copied


# ----------------------------------------------------------------------------------------- rights


@pytest.fixture
def powerless(tmp_path: Path) -> list[str]:
    """What to write before a command so that what belongs to others is closed to it."""
    need([] if os.geteuid() == 0 else ["root, who may give files away"])
    need([] if shutil.which("setpriv") else ["setpriv"])
    return ["setpriv", "--bounding-set=-all", "--inh-caps=-all"]


def refused(powerless: list[str], *words: str) -> tuple[int, str]:
    """A command without rights → its exit code and its one line."""
    done = subprocess.run(
        [*powerless, *COMMAND, *words], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.stderr.count("\n") == 1, done.stderr
    return done.returncode, done.stderr


def test_a_configuration_file_of_somebody_else_is_named(powerless: list[str], tmp_path: Path) -> None:
    file = tmp_path / "v.toml"
    file.touch(0o600)
    os.chown(file, 1, 1)
    code, line = refused(powerless, "config", "check", "--config", str(file))
    assert code == 66
    assert "v.toml can't be read: Permission denied" in line


def test_a_spool_of_somebody_else_is_named(powerless: list[str], tmp_path: Path) -> None:
    folder = tmp_path / "state"
    folder.mkdir(0o700)
    os.chown(folder, 1, 1)
    for words in (("status",), ("list",), ("retry",), ("drop", "--yes")):
        code, line = refused(powerless, "spool", *words, "--state-dir", str(folder))
        assert code == 66
        assert "run as the agent's user" in line


def test_doctor_goes_on_when_the_folder_is_somebody_elses(powerless: list[str], tmp_path: Path) -> None:
    folder = tmp_path / "state"
    folder.mkdir(0o700)
    (folder / "agent-id").touch()
    os.chown(folder, 1, 1)
    done = subprocess.run(
        [*powerless, *COMMAND, "doctor", "--state-dir", str(folder), "--libvirt", "replay:/dev/null"],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 78
    assert f"FAIL spool: state_dir {folder} can't be written" in done.stdout
    assert "ok   replay: " in done.stdout


@pytest.mark.parametrize("command", ["status", "tap", "emit"])
def test_a_control_socket_of_somebody_else_is_a_matter_of_rights(
    powerless: list[str], tmp_path: Path, command: str
) -> None:
    path = tmp_path / "c.sock"
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(path))
        server.listen()
        path.chmod(0o600)
        os.chown(path, 1, 1)
        code, line = refused(powerless, command, "--control-socket", str(path))
    assert code == 77
    assert f"{path}: Permission denied; ask as the agent's own user" in line


# ---------------------------------------------------------------------------------- agents that go


@pytest.mark.parametrize("command", ["status", "tap", "emit"])
def test_where_no_agent_runs_it_is_away(tmp_path: Path, command: str) -> None:
    path = tmp_path / "none.sock"
    assert f"no agent answers at {path}" in complaint(command, "--control-socket", str(path), code=69)


@contextmanager
def peer(path: Path, answer: bytes) -> Iterator[None]:
    """Something that answers every request with `answer` and hangs up."""
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(path))
        server.listen()

        def serve() -> None:
            while True:
                try:
                    one, _ = server.accept()
                except OSError:
                    return
                with one:
                    one.recv(4096)
                    one.sendall(answer)

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield
        finally:
            server.shutdown(socket.SHUT_RDWR)
            thread.join()


@pytest.mark.parametrize("command", ["status", "tap", "emit"])
@pytest.mark.parametrize(
    ("answer", "why"), [(b"", "ended"), (b'{"stage', "cut off"), (b"hello\n", "cut off")]
)
def test_an_answer_that_is_none_is_one_clear_line(
    tmp_path: Path, command: str, answer: bytes, why: str
) -> None:
    path = tmp_path / "c.sock"
    with peer(path, answer):
        assert why in complaint(command, "--control-socket", str(path), code=69)


def tapping(agent: AgentProcess) -> subprocess.Popen[str]:
    """A tap that has shown something."""
    tap = subprocess.Popen(
        [*COMMAND, "tap", "--control-socket", str(agent.socket)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, bufsize=1,
    )  # fmt: skip
    assert tap.stdout is not None
    while not select.select([tap.stdout], [], [], 0.2)[0]:
        assert tap.poll() is None
        ask(agent.socket, {"command": "drill"}).close()
    assert tap.stdout.readline().startswith("{")
    return tap


def test_a_tap_of_an_agent_that_ends_says_so(tmp_path: Path) -> None:
    with AgentProcess(tmp_path, libvirt="replay:/dev/null", bus="embedded:").ready() as agent:
        tap = tapping(agent)
        agent.stop()
        _, told = tap.communicate(timeout=20)
    assert tap.returncode == 69
    assert "the agent ended" in told


def test_an_interrupt_of_a_tap_is_no_traceback(running: AgentProcess) -> None:
    tap = tapping(running)
    tap.send_signal(signal.SIGINT)
    _, told = tap.communicate(timeout=20)
    assert (tap.returncode, told.strip()) == (130, "")


def test_the_end_of_a_drill_that_was_not_begun_says_so(running: AgentProcess) -> None:
    line = complaint("emit", "--resolve", "--domain-name", "never", "--timeout", "1",
                     "--control-socket", str(running.socket), code=69)  # fmt: skip
    assert "no drill of never is open" in line
