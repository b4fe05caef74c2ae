"""`make packages-test`: the .deb from dpkg -i to purge on two Debian releases with real guests and a real
RabbitMQ, the .rpm as far as Debian's tools go, and the unit.

It takes the packages that `make dist` left in dist/. VIRTBUS_PACKAGE_BEFORE names a .deb to upgrade from
(tests.packages.before builds one of earlier code); without it that is this one under an earlier version.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.brokers.rabbitmq import RabbitMQ, wait_until
from tests.conftest import need
from tests.lab import chroot
from tests.lab.lab import CHECKOUT, PAUSED_IOERROR, RUNNING, Guest, Lab, missing
from tests.packages.machine import SECONDS, Machine
from tests.packages.root import Root, earlier
from tests.ports import free_ports
from virtbus import __version__

pytestmark = [pytest.mark.lab, pytest.mark.rabbitmq, pytest.mark.slow, pytest.mark.timeout(3600)]

DIST = CHECKOUT / "dist"
# What the scripts ask of systemd: a running agent takes the new code, and nothing else is started.
RELOAD = ["daemon-reload"]
START = [*RELOAD, "try-restart virtbus.service"]
BEFORE = "0.0.1"
CONFIG = "etc/virtbus/virtbus.toml"
STATE = "var/lib/virtbus"


def package(kind: str) -> Path:
    """The one package of this kind in dist/."""
    found = sorted(DIST.glob(f"*.{kind}"))
    if len(found) != 1:
        pytest.fail(f"dist/ holds {len(found)} .{kind} files, not one: run make dist")
    return found[0]


class Told:
    """What a consumer of the package prints: events by (source, id)."""

    def __init__(self, root: Root | Machine, url: str) -> None:
        self.events: dict[tuple[str, str], dict[str, Any]] = {}
        self.process = subprocess.Popen(
            root.command("/usr/bin/virtbus", "consume", "--bus", url, "--group", "packages"),
            stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        self.reader = threading.Thread(target=self._read, daemon=True)
        self.reader.start()

    def close(self) -> None:
        self.process.terminate()
        self.process.wait(30)
        self.reader.join(30)
        assert self.process.stdout is not None
        self.process.stdout.close()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            event = json.loads(line)
            self.events[event["source"], event["id"]] = event

    def errors(self) -> int:
        """How many I/O errors the events count."""
        return sum(
            event["data"]["occurrences"]["count"]
            for event in list(self.events.values())
            if event["type"] == "io.virtbus.domain.io_error.v1"
        )

    def of_type(self, kind: str) -> list[dict[str, Any]]:
        return [event for event in list(self.events.values()) if event["type"] == f"io.virtbus.{kind}.v1"]


@contextmanager
def agent(root: Root, http: str) -> Iterator[subprocess.Popen[bytes]]:
    """The unit's ExecStart as its user, with the folders that systemd makes for it; ended by SIGTERM."""
    for folder in (STATE, "run/virtbus"):
        root.run("install", "-d", "-m", "0700", "-o", "virtbus", "-g", "virtbus", f"/{folder}")
    unit = (root.path / "usr/lib/systemd/system/virtbus.service").read_text()
    (start,) = re.findall(r"^ExecStart=(.*)$", unit, re.MULTILINE)
    log = root.path / "var/log/agent"
    with log.open("ab") as out:
        process = subprocess.Popen(root.command(*start.split(), user="virtbus"), stderr=out)

    def ready() -> bool:
        assert process.poll() is None, log.read_text()[-3000:]
        try:
            urllib.request.urlopen(f"http://{http}/readyz", timeout=5).close()
        except (urllib.error.URLError, ConnectionError):
            return False
        return True

    try:
        wait_until(ready, "the agent is ready", SECONDS)
        yield process
        process.terminate()
        assert process.wait(SECONDS) == 0, log.read_text()[-3000:]
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()


def fail(guest: Guest) -> None:
    """One I/O error that pauses the guest; then it runs again."""
    guest.fail()
    guest.wait_state(PAUSED_IOERROR, seconds=SECONDS)
    guest.heal()
    guest.resume()
    guest.wait_state(RUNNING, seconds=SECONDS)


def configure(root: Root, url: str, lab: Lab, http: str) -> None:
    """What the install page tells the operator to edit, in the package's own file."""
    file = root.path / CONFIG
    text = file.read_text()
    text = re.sub(r"^#? ?url = .*$", f'url = "{url}"', text, flags=re.MULTILINE)
    text = re.sub(r"^uri = .*$", f'uri = "{lab.uri_ro}"', text, flags=re.MULTILINE)
    if "[http]" not in text:
        text += f'\n[http]\nlisten = "{http}"\n'
    file.write_text(text)


@pytest.fixture(params=["bookworm", "trixie"])
def root(request: pytest.FixtureRequest) -> Iterator[Root]:
    need([*missing(inside=False), *chroot.missing()])
    with Root(request.param) as made:
        yield made


def test_a_package_from_dpkg_i_to_purge_loses_no_event(
    root: Root, rabbitmq: RabbitMQ, vhost: str, tmp_path: Path
) -> None:
    new = package("deb")
    given = os.environ.get("VIRTBUS_PACKAGE_BEFORE")
    old = Path(given) if given else earlier(new, BEFORE, tmp_path)

    # Installed: nothing starts, nothing is enabled, and the program says what it lacks.
    said = root.install(old)
    assert "set bus.url in /etc/virtbus/virtbus.toml" in said
    assert root.asked_of_systemd() == START
    assert not (root.path / STATE).exists()
    if not given:
        assert root.run("virtbus", "--version").stdout == f"virtbus {BEFORE}\n"
    assert "uid=" in root.run("id", "virtbus").stdout
    assert root.run("stat", "-c", "%U:%G %a", f"/{CONFIG}", "/etc/virtbus").stdout.split("\n")[:2] == [
        "root:virtbus 640",
        "root:virtbus 750",
    ]
    unset = root.run("virtbus", "config", "check", check=False)
    assert unset.returncode == 78
    assert "bus.url" in unset.stderr
    refused = root.run("virtbus", "run", user="virtbus", check=False)
    assert refused.returncode == 78  # the unit's RestartPreventExitStatus
    assert "bus.url" in refused.stderr

    # The id can be had before the first start, and the agent's user owns it.
    seeded = root.run("virtbus", "agent-id", "--create").stdout.strip()
    assert root.run("stat", "-c", "%U %a", f"/{STATE}/agent-id").stdout == "virtbus 600\n"

    http = f"127.0.0.1:{free_ports(1)[0]}"
    nowhere = f"amqp://guest:guest@127.0.0.1:{free_ports(1)[0]}/{vhost}"
    url = rabbitmq.url(vhost)
    with Lab(root=root.path) as lab:
        told = Told(root, url)
        try:
            configure(root, url, lab, http)
            assert root.run("virtbus", "config", "check", user="virtbus").returncode == 0
            guest = lab.guest("db1").start()
            with agent(root, http):
                doctor = root.run("virtbus", "doctor", user="virtbus")
                assert "FAIL" not in doctor.stdout
                fail(guest)
                wait_until(
                    lambda: told.errors() == guest.injected() > 0, "the first error is consumed", SECONDS
                )

            # The broker is away: what happens waits in the spool, and so it does while the agent is upgraded.
            configure(root, nowhere, lab, http)
            with agent(root, http):
                for _ in range(3):
                    fail(guest)
                wait_until(lambda: backlog(root) >= 3, "three errors wait in the spool", SECONDS)
            waiting = backlog(root)
            identity = (root.path / STATE / "agent-id").read_text()
            edited = (root.path / CONFIG).read_text()
            root.install(new)
            assert root.asked_of_systemd() == [
                "daemon-reload",
                "daemon-reload",
                "try-restart virtbus.service",
            ]
            assert root.run("virtbus", "--version").stdout == f"virtbus {__version__}\n"
            assert (root.path / CONFIG).read_text() == edited
            assert (root.path / STATE / "agent-id").read_text() == identity
            assert backlog(root) == waiting

            configure(root, url, lab, http)
            with agent(root, http):
                fail(guest)
                wait_until(lambda: told.errors() >= guest.injected(), "the backlog is consumed", SECONDS)
                wait_until(lambda: backlog(root) == 0, "the spool is empty", SECONDS)
            assert (guest.injected(), told.errors()) == (5, 5)
            assert {source for source, _ in told.events} == {f"/virtbus/agents/{seeded}"}
        finally:
            told.close()

        # Removed: the program goes, what it knows and what it was told stays.
        root.run("dpkg", "-r", "virtbus")
        assert root.asked_of_systemd() == ["disable --now virtbus.service", *RELOAD]
        assert not (root.path / "opt/virtbus").exists()
        assert not (root.path / "usr/bin/virtbus").is_symlink()
        assert (root.path / CONFIG).read_text() != ""
        assert (root.path / STATE / "agent-id").read_text() == identity
        # Purged: that goes, too.
        root.run("dpkg", "-P", "virtbus")
        assert root.status("virtbus") in ("", "not-installed")
        for gone in (STATE, "etc/virtbus", "opt/virtbus"):
            assert not (root.path / gone).exists()


def backlog(root: Root) -> int:
    """How many events wait in the spool."""
    status = json.loads(root.run("virtbus", "spool", "status", "--json", user="virtbus").stdout)
    return int(status["pending"])


def test_the_wheel_is_installed_without_a_compiler_and_has_no_relative_link(tmp_path: Path) -> None:
    (wheel,) = DIST.glob("*.whl")
    subprocess.run([sys.executable, "-m", "venv", str(tmp_path / "venv")], check=True)
    python = str(tmp_path / "venv/bin/python")
    subprocess.run(
        [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--only-binary", ":all:",
         str(wheel)],
        check=True,
    )  # fmt: skip
    shown = (
        "import importlib.metadata as m; from virtbus import Consumer, IoError; import virtbus.fleet;"
        "print(m.metadata('virtbus').get_payload() or m.metadata('virtbus')['Description'])"
    )
    readme = subprocess.run([python, "-I", "-c", shown], check=True, capture_output=True, text=True).stdout
    links = re.findall(r"\]\(([^)\s]+)\)", readme)
    assert len(links) > 10
    assert [link for link in links if "://" not in link and not link.startswith("#")] == []
    validated = subprocess.run(
        [str(tmp_path / "venv/bin/virtbus"), "schema", "list"], check=True, capture_output=True
    )
    assert b"io.virtbus.domain.io_error.v1" in validated.stdout


# ------------------------------------------------------------------------------------------ the files


def test_the_deb_takes_all_it_needs_from_the_distribution(root: Root) -> None:
    """Every dependency is a package of this suite, and every library is found with those alone."""
    root.install(package("deb"))
    loose = root.run(
        "sh", "-c", "find /opt/virtbus -name '*.so*' -type f -exec ldd {} + 2>&1 | grep 'not found' || true"
    ).stdout
    assert loose == ""
    used = "import ctypes, hashlib, lzma, sqlite3, ssl, uuid, zlib, pyexpat, libvirt, confluent_kafka, kombu"
    root.run("/opt/virtbus/bin/python", "-I", "-c", used)


def test_what_the_operator_changed_in_etc_survives_an_upgrade(root: Root) -> None:
    root.install(package("deb"))
    root.run("chgrp", "nogroup", "/etc/virtbus")
    (root.path / CONFIG).unlink()  # all settings in the environment, say
    root.install(package("deb"))
    assert root.status("virtbus") == "installed"
    assert not (root.path / CONFIG).exists()
    assert root.run("stat", "-c", "%G %a", "/etc/virtbus").stdout == "nogroup 750\n"


def test_no_file_of_the_package_names_the_folder_it_was_built_in(tmp_path: Path) -> None:
    """Where a second build would be another one."""
    subprocess.run(["dpkg-deb", "--extract", str(package("deb")), str(tmp_path)], check=True)
    cache = CHECKOUT / ".cache/packages"
    named = ["grep", "-rlF", "-e", str(CHECKOUT), "-e", str(cache), "-e", str(cache.resolve()), str(tmp_path)]
    found = subprocess.run(named, capture_output=True, text=True)
    assert (found.returncode, found.stdout) == (1, "")


def test_the_manual_pages_and_the_completion_are_read_without_a_warning(tmp_path: Path) -> None:
    subprocess.run(["dpkg-deb", "--extract", str(package("deb")), str(tmp_path)], check=True)
    pages = sorted((tmp_path / "usr/share/man/man1").glob("*.1*"))
    assert {"virtbus.1", "virtbus-run.1"} <= {page.name.removesuffix(".gz") for page in pages}
    subprocess.run(
        ["bash", "-n", str(tmp_path / "usr/share/bash-completion/completions/virtbus")], check=True
    )


def test_systemd_takes_the_unit_and_finds_it_hardened(tmp_path: Path) -> None:
    subprocess.run(["dpkg-deb", "--extract", str(package("deb")), str(tmp_path)], check=True)
    unit = tmp_path / "usr/lib/systemd/system/virtbus.service"
    # Its program is not on this machine.
    text = unit.read_text()
    unit.write_text(text.replace("ExecStart=/usr/bin/virtbus", "ExecStart=/bin/true"))
    verified = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", str(unit)], capture_output=True, text=True
    )
    assert (verified.returncode, verified.stderr) == (0, "")
    rated = subprocess.run(
        ["systemd-analyze", "security", "--offline=yes", "--threshold=20", str(unit)],
        capture_output=True,
        text=True,
    )
    assert rated.returncode == 0, rated.stdout + rated.stderr


# -------------------------------------------------------------------------------------------- the rpm


def rpm(*words: str) -> str:
    done = subprocess.run(["rpm", *words], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_rpm_holds_the_same_files_as_the_deb() -> None:
    listed = set(rpm("-qpl", str(package("rpm"))).splitlines())
    packed = subprocess.run(
        ["sh", "-euc", 'dpkg-deb --fsys-tarfile "$1" | tar --list', "sh", str(package("deb"))],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    files = {f"/{line.removeprefix('./')}" for line in packed.stdout.splitlines() if not line.endswith("/")}
    assert len(files) > 500
    # A licence's place differs between the two.
    assert files - listed == {"/usr/share/doc/virtbus/copyright"}
    assert "/usr/share/licenses/virtbus/LICENSE" in listed


def test_the_rpm_is_whole_and_its_scripts_are_shell(tmp_path: Path) -> None:
    file = str(package("rpm"))
    assert "digests OK" in rpm("-K", "--nosignature", file)
    for tag in ("PREIN", "POSTIN", "PREUN", "POSTUN"):
        script = tmp_path / tag
        script.write_text(rpm("-qp", "--queryformat", f"%{{{tag}}}", file))
        subprocess.run(["sh", "-n", str(script)], check=True)
    assert rpm("-qp", "--configfiles", file).split() == [f"/{CONFIG}"]
    assert rpm("-qp", "--queryformat", "%{VERSION}", file) == __version__


def test_rpmlint_finds_no_error_in_the_rpm() -> None:
    settings = CHECKOUT / ".packaging/rpmlint.toml"
    done = subprocess.run(
        ["rpmlint", "--config", str(settings), str(package("rpm"))], capture_output=True, text=True
    )
    assert re.search(r"\b0 errors, 0 warnings\b", done.stdout), done.stdout[-4000:] + done.stderr


def test_the_rpm_is_installed_and_erased_by_rpm_and_keeps_what_was_edited(root: Root) -> None:
    """By rpm's own database, without the dependencies: their names are those of another distribution."""
    where = ["--root", str(root.path), "--dbpath", "/var/lib/rpm"]
    rpm(*where, "--install", "--nodeps", "--noplugins", str(package("rpm")))
    assert root.asked_of_systemd() == START
    assert root.run("virtbus", "--version").stdout == f"virtbus {__version__}\n"
    assert root.run("stat", "-c", "%U:%G %a", f"/{CONFIG}").stdout == "root:virtbus 640\n"
    with (root.path / CONFIG).open("a") as file:
        file.write("# edited\n")
    rpm(*where, "--upgrade", "--force", "--nodeps", "--noplugins", str(package("rpm")))
    assert (root.path / CONFIG).read_text().endswith("# edited\n")
    root.asked_of_systemd()
    (root.path / STATE).mkdir(parents=True)
    rpm(*where, "--erase", "--noplugins", "virtbus")
    assert root.asked_of_systemd() == ["disable --now virtbus.service", *RELOAD]
    assert not (root.path / "opt/virtbus").exists()
    assert (root.path / STATE).exists()
    assert (root.path / f"{CONFIG}.rpmsave").read_text().endswith("# edited\n")
