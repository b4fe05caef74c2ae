"""The systemd unit of `virtbus print unit`, by systemd-analyze."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import need

VIRTBUS = str(Path(sys.executable).with_name("virtbus"))


@pytest.fixture
def unit(tmp_path: Path) -> Path:
    need([] if shutil.which("systemd-analyze") else ["systemd-analyze (Debian package systemd)"])
    file = tmp_path / "virtbus.service"
    # verify wants a user that is there; the real one is the host's to make.
    done = subprocess.run(
        [VIRTBUS, "print", "unit", "--user", "daemon"], capture_output=True, text=True, check=True
    )
    file.write_text(done.stdout, encoding="utf-8")
    return file


def _analyze(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["systemd-analyze", *arguments], capture_output=True, text=True, timeout=60)


def test_systemd_takes_every_line_of_the_unit(unit: Path) -> None:
    done = _analyze("verify", "--recursive-errors=no", str(unit))
    complaints = [line for line in done.stderr.splitlines() if "virtbus.service" in line]
    assert (done.returncode, complaints) == (0, [])


def test_systemd_refuses_a_line_that_it_does_not_know(unit: Path) -> None:
    """So that the test above can fail."""
    unit.write_text(unit.read_text().replace("ProtectHome=yes", "ProtectHouse=yes"))
    assert "ProtectHouse" in _analyze("verify", "--recursive-errors=no", str(unit)).stderr


def test_the_unit_is_exposed_less_than_systemds_own_daemons(unit: Path) -> None:
    """systemd-analyze security: 0 is best, 10 is worst; systemd-resolved, say, has 2.1."""
    done = _analyze("security", "--offline=yes", "--threshold=20", "--no-pager", str(unit))
    assert done.returncode == 0, done.stdout


def test_what_is_left_open_is_what_the_agent_needs(unit: Path) -> None:
    done = _analyze("security", "--offline=yes", "--json=short", str(unit))
    open_doors = {row["json_field"] for row in json.loads(done.stdout) if row["set"] is False}
    assert open_doors == {
        "PrivateNetwork", "PrivateUsers", "IPAddressDeny", "RootDirectoryOrRootImage", "ProcSubset",
        "RestrictAddressFamilies_AF_INET_INET6", "RestrictAddressFamilies_AF_UNIX",
        "DeviceAllow",  # the clock, for reading: part of ProtectClock
    }  # fmt: skip


def test_the_unit_starts_this_very_program(unit: Path) -> None:
    assert f"ExecStart={VIRTBUS} run\n" in unit.read_text()


def test_the_time_to_stop_is_longer_than_the_drain(tmp_path: Path) -> None:
    settings = tmp_path / "virtbus.toml"
    settings.write_text("drain_seconds = 45.5\n")
    done = subprocess.run(
        [VIRTBUS, "print", "unit", "--config", str(settings)], capture_output=True, text=True, check=True
    )
    assert "TimeoutStopSec=66\n" in done.stdout


def test_a_program_that_systemd_would_read_differently_is_refused() -> None:
    for path in ("bin/virtbus", "/opt/my tools/virtbus", "/opt/100%/virtbus"):
        done = subprocess.run(
            [VIRTBUS, "print", "unit", "--command", path], capture_output=True, text=True, check=False
        )
        assert done.returncode == 78
        assert "--command" in done.stderr
