"""Fifteen things are broken, one after the other; `virtbus doctor` names each one and what to do."""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import pty
import re
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import kombu
import pytest
import trustme

from tests.agent.process import COMMAND, AgentProcess, virtbus
from tests.brokers.rabbitmq import RabbitMQ
from tests.faults.spool_kit import io_error
from tests.kafka.cluster import Cluster
from tests.lab.lab import Lab
from virtbus.model import Clock
from virtbus.spool import Spool, SpoolLimits, prepare_state_dir

SILENCE = "replay:/dev/null"
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to mount a disk or be another user")


class Doctor:
    """`virtbus doctor --json`, with parts that work but for those that are named."""

    def __init__(self, folder: Path) -> None:
        self.state = folder / "state"
        self._words = {"--libvirt": SILENCE, "--bus": f"embedded://{folder}/bus.db"}

    def words(self, **parts: object) -> list[str]:
        """The command's words; `state`, `libvirt`, `bus`, `timeout`, `config` replace what works."""
        given = {f"--{name}": str(value) for name, value in parts.items() if name != "state"}
        state = {"--state-dir": str(parts.get("state", self.state))}
        return [
            "doctor",
            "--json",
            *(word for item in {**self._words, **state, **given}.items() for word in item),
        ]

    def __call__(self, *, environment: dict[str, str] | None = None, **parts: object) -> Report:
        return Report(virtbus(*self.words(**parts), **(environment or {})))


class Report:
    """What doctor said."""

    def __init__(self, done: subprocess.CompletedProcess[str]) -> None:
        self.code = done.returncode
        self.stderr = done.stderr
        self.checks: list[dict[str, Any]] = json.loads(done.stdout)["checks"] if done.stdout else []

    def check(self, name: str) -> dict[str, Any]:
        """The check of that name."""
        found = [check for check in self.checks if check["name"] == name]
        assert found, f"no {name} in {[check['name'] for check in self.checks]}; {self.stderr}"
        return found[0]

    def names(self, name: str, fault: str, remedy: str, *, code: int, status: str = "failed") -> None:
        """The check `name` tells of the fault and the remedy, and decides the exit code."""
        check = self.check(name)
        assert check["status"] == status, check
        assert re.search(fault, check["summary"]), check
        assert check["remedy"], check
        assert re.search(remedy, check["remedy"]), check
        assert self.code == code
        failed = [other["name"] for other in self.checks if other["status"] == "failed"]
        assert not failed or failed[0] == name, f"{failed} were found before"


@pytest.fixture
def doctor(tmp_path: Path) -> Doctor:
    return Doctor(tmp_path)


def test_a_host_where_all_is_well_has_no_failure(doctor: Doctor) -> None:
    report = doctor()
    assert report.code == 0, report.checks
    assert {check["status"] for check in report.checks} <= {"ok", "warning"}


# ---------------------------------------------------------------------------------------- libvirt


def test_1_the_socket_is_missing(doctor: Doctor, tmp_path: Path) -> None:
    report = doctor(libvirt=f"qemu:///system?socket={tmp_path}/none")
    report.names("libvirt", f"{tmp_path}/none.*No such file", "start libvirtd or virtqemud", code=69)


@needs_root
def test_2_the_rights_are_wrong(lab: Lab, doctor: Doctor) -> None:
    socket = str(lab.uri_ro).partition("socket=")[2]
    os.chown(socket, 65534, 65534)
    Path(socket).chmod(0o700)
    # Root without the right to pass over file modes: like any user who is not the socket's.
    command = ["setpriv", "--bounding-set", "-dac_override,-dac_read_search", *COMMAND]
    done = subprocess.run(
        [*command, *doctor.words(libvirt=lab.uri_ro)], capture_output=True, text=True, timeout=60, check=False
    )
    Report(done).names("libvirt", "Permission denied", "read-only socket", code=77)


def test_12_libvirt_is_frozen(lab: Lab, doctor: Doctor) -> None:
    lab.freeze()
    try:
        report = doctor(libvirt=lab.uri_ro, timeout=3)
    finally:
        lab.thaw()
    report.names("libvirt", "no answer within 3 s", "state T in ps", code=69)


def test_13_qemu_throttles(lab: Lab, doctor: Doctor) -> None:
    # As if this QEMU were one of those that merge errors; all else is real.
    code = (
        "import sys, virtbus.model as model; model.Hypervisor.merges = True; "
        "from virtbus.cli import main; main(sys.argv[1:])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *doctor.words(libvirt=lab.uri_ro)],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    Report(done).names("error counts", "lower bounds", "docs/libvirt.md", code=0, status="warning")


# ----------------------------------------------------------------------------------------- broker


def test_3_the_password_is_wrong(doctor: Doctor, rabbitmq: RabbitMQ, vhost: str) -> None:
    report = doctor(bus=rabbitmq.url(vhost, "guest", "wr0ng"))
    report.names("bus", "access refused", "check user, password", code=77)
    assert "wr0ng" not in json.dumps(report.checks)


def settings(folder: Path, text: str) -> Path:
    path = folder / "virtbus.toml"
    path.write_text(text)
    return path


def test_4_the_authority_is_another(doctor: Doctor, rabbitmq: RabbitMQ, vhost: str, tmp_path: Path) -> None:
    trustme.CA().cert_pem.write_to_path(str(tmp_path / "other.pem"))
    config = settings(tmp_path, f'[bus.tls]\nca_file = "{tmp_path}/other.pem"\n')
    report = doctor(bus=rabbitmq.tls_url(vhost), config=config)
    report.names("tls", "unable to get local issuer|self-signed", r"bus\.tls\.ca_file", code=77)


def test_5_the_certificate_has_expired(doctor: Doctor, rabbitmq_alone: RabbitMQ, tmp_path: Path) -> None:
    config = settings(tmp_path, f'[bus.tls]\nca_file = "{rabbitmq_alone.ca_file}"\n')
    with rabbitmq_alone.server_certificate(expired=True):
        report = doctor(bus=rabbitmq_alone.tls_url(), config=config)
    report.names("tls", "certificate has expired", "renew", code=77)


def test_6_the_host_name_is_another(doctor: Doctor, rabbitmq: RabbitMQ, vhost: str, tmp_path: Path) -> None:
    config = settings(tmp_path, f'[bus.tls]\nca_file = "{rabbitmq.ca_file}"\n')
    report = doctor(bus=rabbitmq.tls_url(vhost, host="127.0.0.1"), config=config)
    report.names("tls", "IP address mismatch|not valid for", r"bus\.tls\.server_name", code=77)


def test_a_good_certificate_shows_its_days(
    doctor: Doctor, rabbitmq: RabbitMQ, vhost: str, tmp_path: Path
) -> None:
    config = settings(tmp_path, f'[bus.tls]\nca_file = "{rabbitmq.ca_file}"\n')
    check = doctor(bus=rabbitmq.tls_url(vhost), config=config).check("tls")
    assert check["status"] == "ok"
    assert check["details"]["days_left"] > 14


@pytest.mark.parametrize(("days", "status", "code"), [(-2, "failed", 77), (5, "warning", 0), (90, "ok", 0)])
def test_our_own_certificate_shows_its_days(
    doctor: Doctor, tmp_path: Path, days: int, status: str, code: int
) -> None:
    end = datetime.datetime.now(datetime.UTC) + datetime.timedelta(days=days, hours=1)
    issued = trustme.CA().issue_cert("compute-7", not_after=end)
    issued.cert_chain_pems[0].write_to_path(str(tmp_path / "own.pem"))
    issued.private_key_pem.write_to_path(str(tmp_path / "own.key"))
    text = f'[bus.tls]\ncert_file = "{tmp_path}/own.pem"\nkey_file = "{tmp_path}/own.key"\n'
    report = doctor(bus="amqps://127.0.0.1:1//", config=settings(tmp_path, text))
    check = report.check("client certificate")
    assert check["status"] == status
    assert check["exit_code"] == code
    assert abs(check["details"]["days_left"] - days) < 0.2
    assert bool(check["remedy"]) == (status != "ok")


def test_7_the_exchange_is_of_another_type(doctor: Doctor, amqp_url: str) -> None:
    with kombu.Connection(amqp_url) as connection:
        kombu.Exchange("virtbus.events", type="direct", durable=True)(connection.channel()).declare()
    report = doctor(bus=amqp_url)
    report.names("bus exchange", "not a durable topic exchange.*'direct'", r"bus\.exchange", code=77)


def test_8_the_topic_is_missing(doctor: Doctor, own_kafka: Cluster, tmp_path: Path) -> None:
    config = settings(tmp_path, '[bus]\ndeclare = false\ntopic = "nobody.made.it"\n')
    report = doctor(bus=own_kafka.url, config=config)
    report.names("bus.topic", "does not exist", 'create topic "nobody.made.it"', code=77)


# ------------------------------------------------------------------------------------------ spool


def opened(state_dir: Path) -> Spool:
    """A spool of the least size."""
    limits, agent_id = SpoolLimits(max_bytes=1 << 20), "11111111-1111-4111-8111-111111111111"
    return Spool.open(state_dir, limits=limits, agent_id=agent_id, clock=Clock())


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 64 KiB."""
    at = tmp_path / "disk"
    at.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "virtbus-test", at], check=True)
    yield at
    subprocess.run(["umount", "-l", at], check=True)


@needs_root
def test_9_the_spools_disk_is_full(doctor: Doctor, small_disk: Path) -> None:
    prepare_state_dir(small_disk / "state")
    with (small_disk / "ballast").open("wb") as ballast:
        ballast.truncate(0)
        while True:
            try:
                os.write(ballast.fileno(), b"x" * 4096)
            except OSError:
                break
    report = doctor(state=small_disk / "state")
    report.names("spool", "No space left on device", "make room", code=74)


def test_9_the_spool_itself_is_full(doctor: Doctor, tmp_path: Path) -> None:
    prepare_state_dir(doctor.state)
    limits = SpoolLimits(max_bytes=1 << 20)
    spool = Spool.open(
        doctor.state, limits=limits, agent_id="11111111-1111-4111-8111-111111111111", clock=Clock()
    )
    for _ in range(20):
        spool.commit([io_error(number, padding=2000) for number in range(20)], {})
    spool.close()
    report = doctor(config=settings(tmp_path, "[spool]\nmax_bytes = 1048576\n"))
    report.names("spool backlog", "the spool is full: [0-9]+ events wait", r"spool\.max_bytes", code=74)


def test_9_a_spool_full_of_what_was_set_aside_loses_no_event_and_is_no_failure(
    doctor: Doctor, tmp_path: Path
) -> None:
    prepare_state_dir(doctor.state)
    spool = opened(doctor.state)
    spool.commit([io_error(number, padding=2000) for number in range(20)], {})
    spool.close()
    with contextlib.closing(sqlite3.connect(doctor.state / "spool.db")) as db, db:
        db.execute("INSERT INTO dead SELECT *, 'refused', 'too large', 0 FROM events")
        db.execute("UPDATE dead SET bytes = 60000")
        db.execute("DELETE FROM events")
    check = doctor(config=settings(tmp_path, "[spool]\nmax_bytes = 1048576\n")).check("spool backlog")
    assert check["status"] == "warning"
    assert "spool list --dead" in check["remedy"]


@needs_root
def test_10_the_spool_is_read_only(doctor: Doctor, small_disk: Path) -> None:
    prepare_state_dir(small_disk / "state")
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    report = doctor(state=small_disk / "state")
    report.names("spool", "[Rr]ead-only", "writable", code=report.check("spool")["exit_code"])
    assert report.code in (74, 78)


def test_11_the_clock_is_wrong(doctor: Doctor) -> None:
    prepare_state_dir(doctor.state)
    database = doctor.state / "spool.db"
    opened(doctor.state).close()
    later = time.time() + datetime.timedelta(days=3).total_seconds()
    os.utime(database, (later, later))
    doctor().names("clock", "written 2[0-9]+ s in the future", "set the clock", code=69)


def test_14_a_second_agent_is_told_of_the_first(doctor: Doctor, tmp_path: Path) -> None:
    bus = f"embedded://{tmp_path}/bus.db"
    with AgentProcess(tmp_path, libvirt=SILENCE, bus=bus).ready() as agent:
        report = doctor()
        assert f"pid {agent.process.pid}" in report.check("agent")["summary"]
        assert "--state-dir of its own" in report.check("agent")["summary"]
        second = virtbus("run", "--libvirt", SILENCE, "--bus", bus, "--state-dir", str(doctor.state))
        assert second.returncode == 74
        assert str(agent.process.pid) in second.stderr


# ------------------------------------------------------------------------------ who looks, and where


def test_doctor_makes_no_folder_that_would_be_roots(doctor: Doctor) -> None:
    check = doctor().check("spool")
    assert check["status"] == "ok"
    assert "the agent's first start makes it" in check["summary"]
    assert not doctor.state.exists()


def test_a_folder_that_cant_be_made_is_named(doctor: Doctor, tmp_path: Path) -> None:
    report = doctor(state="/dev/null/state")
    report.names("spool", "can't make it in /dev/null", "--state-dir", code=78)


def test_doctor_leaves_the_id_of_a_cloned_disk_for_the_agent_to_tell_of(doctor: Doctor) -> None:
    prepare_state_dir(doctor.state)
    text = "11111111-1111-4111-8111-111111111111\nof-another-machine\n"
    (doctor.state / "agent-id").write_text(text)
    assert doctor().code == 0
    assert (doctor.state / "agent-id").read_text() == text


@needs_root
def test_root_is_told_that_the_agent_may_do_less(doctor: Doctor) -> None:
    prepare_state_dir(doctor.state)
    os.chown(doctor.state, 65534, 65534)
    doctor().names("user", "root looks, but .* is nobody's", "sudo -u 'nobody' virtbus doctor", code=0,
                   status="warning")  # fmt: skip


@pytest.mark.parametrize("which", ["folder", "parent"])
def test_a_folder_where_others_can_replace_the_spool_is_named(
    doctor: Doctor, tmp_path: Path, which: str
) -> None:
    prepare_state_dir(doctor.state)
    shared = doctor.state if which == "folder" else tmp_path
    shared.chmod(0o777)
    doctor().names("spool folder", f"other users may write into {shared}:", "chmod go-w", code=0,
                   status="warning")  # fmt: skip
    shared.chmod(0o700)
    assert "spool folder" not in [check["name"] for check in doctor().checks]


def test_a_password_in_a_file_for_everybody_is_named(doctor: Doctor, tmp_path: Path) -> None:
    config = settings(tmp_path, '[bus.kafka.options]\n"sasl.password" = "s3cret"\n')
    config.chmod(0o644)
    report = doctor(config=config)
    report.names(
        "secrets", f"sasl.password: {config}:2 holds a secret", "chmod 0600", code=0, status="warning"
    )
    assert "s3cret" not in json.dumps(report.checks)
    config.chmod(0o600)
    assert doctor(config=config).check("secrets")["status"] == "ok"


# --------------------------------------------------------------------------------------- settings


def test_15_a_key_is_unknown(doctor: Doctor, tmp_path: Path) -> None:
    report = doctor(config=settings(tmp_path, "[bus]\nexchnage = 'x'\n"))
    assert report.code == 78
    assert "virtbus.toml:2: unknown setting bus.exchnage; did you mean exchange?" in report.stderr


def test_what_doctor_prints_for_people_holds_each_remedy_and_no_colours_for_a_pipe(doctor: Doctor) -> None:
    words = [word for word in doctor.words(libvirt="qemu:///system?socket=/none") if word != "--json"]
    said = virtbus(*words).stdout
    assert "FAIL libvirt: " in said
    assert "→ start libvirtd" in said
    assert "\x1b[" not in said


def test_on_a_terminal_of_80_columns_doctor_is_coloured_and_fits(doctor: Doctor) -> None:
    words = [word for word in doctor.words(libvirt="qemu:///system?socket=/none") if word != "--json"]
    leader, follower = pty.openpty()
    process = subprocess.Popen(
        [*COMMAND, *words], stdout=follower, stderr=follower, env={**os.environ, "COLUMNS": "80"}
    )
    os.close(follower)
    said = b""
    with contextlib.suppress(OSError):  # the end of a terminal is an error (EIO)
        while chunk := os.read(leader, 4096):
            said += chunk
    os.close(leader)
    assert process.wait(30) == 69
    assert b"\x1b[31mFAIL\x1b[0m libvirt" in said
    lines = re.sub(r"\x1b\[[0-9;]*m", "", said.decode()).splitlines()
    breakable = [line for line in lines if max(len(word) for word in line.split()) < 60]  # no long path
    assert max(len(line) for line in breakable) <= 80
